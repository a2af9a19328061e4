"""LiteRT's interpreter: what it is given, what it gives, and what is said of files it refuses."""

import numpy as np
import pytest
import tiny
from extras import needs
from workspace import PREFILL, VOCAB, workspace

from qnpu_jax import extras
from qnpu_jax.errors import UserError
from qnpu_jax.integer import storage
from qnpu_jax.proof.verified import verify_file
from qnpu_jax.tflite import writer
from qnpu_jax.tflite.interpreter import LiteRT

IDS = np.arange(PREFILL, dtype=np.int32)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return workspace(tmp_path_factory.getbasetemp() / "tiny") / "out"


def test_signature(out, tmp_path):
    runner = LiteRT(out / "model.tflite")
    assert (runner.tokens, runner.logits) == (PREFILL, "all")
    every = runner.run(IDS)
    assert (every.shape, every.dtype) == ((PREFILL, VOCAB), np.int8)
    writer.write_prefill(storage.load(out), tmp_path / "last.tflite", PREFILL, "last")
    runner = LiteRT(tmp_path / "last.tflite")
    assert (runner.tokens, runner.logits) == (PREFILL, "last")
    np.testing.assert_array_equal(runner.run(IDS), every[-1:])


def test_every_tensor_by_name(out):
    runner = LiteRT(out / "model.tflite", keep_tensors=True)
    logits = runner.run(IDS)
    tensors = dict(runner.tensors())
    np.testing.assert_array_equal(tensors["ids"], IDS)
    np.testing.assert_array_equal(tensors["head.logits"], logits)
    weight = storage.load(out).codes["layers.mlp.up.weight"]
    np.testing.assert_array_equal(tensors["layers.1.mlp.up.weight"], weight[1])
    assert tensors["layers.0.attn.q"].dtype == np.int8
    assert tensors["layers.0.attn.residual"].dtype == np.int16


@pytest.mark.parametrize("kernels", ["ref", "opt", "xnn"])
def test_kernel_sets_are_quiet(out, capfd, kernels):
    logits = LiteRT(out / "model.tflite", kernels, threads=1).run(IDS)
    assert logits.shape == (PREFILL, VOCAB)
    assert capfd.readouterr() == ("", "")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"m\.tflite: no such file; expected a \.tflite; run"):
        LiteRT(tmp_path / "m.tflite")


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -64])
def test_truncated_file(out, tmp_path, size, capfd):
    (tmp_path / "m.tflite").write_bytes((out / "model.tflite").read_bytes()[:size])
    with pytest.raises(UserError, match=r"m\.tflite: LiteRT cannot load it \(.*\); write it again"):
        LiteRT(tmp_path / "m.tflite")
    assert capfd.readouterr().err == ""


def test_another_file(tmp_path):
    (tmp_path / "m.tflite").write_text("a text, not a model" * 100)
    with pytest.raises(UserError, match="LiteRT cannot load it"):
        LiteRT(tmp_path / "m.tflite")


# TensorFlow's own interpreter.


def test_without_tensorflow(out, monkeypatch):
    def missing(name: str) -> str:
        raise extras.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "version", missing)
    with pytest.raises(UserError, match=r'tensorflow: not installed; .*"qnpu\[tensorflow\]"'):
        LiteRT(out / "model.tflite", "tf")


tensorflow = needs(lambda: extras.version("tensorflow", "tensorflow"))


@tensorflow
def test_tensorflow_has_the_bits_of_the_simulator(tmp_path):
    model = tiny.quantized("gqa_llama3", "w8a8i8")
    writer.write_prefill(model, tmp_path / "m.tflite", PREFILL)
    found = verify_file(tmp_path / "m.tflite", model, tiny.random_ids((PREFILL,)), "tf")
    assert found.elements > 50_000 and found.differing == 0


@tensorflow
def test_tensorflow_refuses_what_it_has_no_kernel_for(out):
    message = r"TensorFlow cannot load it \(.*QUANTIZE.*\); choose --kernels ref, or a recipe"
    with pytest.raises(UserError, match=message):
        LiteRT(out / "model.tflite", "tf")
