"""Export profiles: other ops and other storage, which change no bit on a CPU."""

from typing import Any

import numpy as np
import pytest
import tiny
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from qnpu_jax.compilers import hexagon_file
from qnpu_jax.tflite import cached, writer
from qnpu_jax.tflite.forms import Composite
from qnpu_jax.tflite.interpreter import LiteRT, open_interpreter
from qnpu_jax.tflite.named_forms import FORMS, HEXAGON_FORM

TOKENS = 8
HEXAGON = FORMS["hexagon"]
NORMS = 2 * 2 + 1  # two a layer, and the head's


def read(path) -> Any:  # the object API says Optional and Union of everything
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))


def composites(model, graph):
    code = schema.BuiltinOperator.STABLEHLO_COMPOSITE
    return [op for op in graph.operators if model.operatorCodes[op.opcodeIndex].builtinCode == code]


def test_the_default_is_one_of_them():
    assert HEXAGON_FORM in FORMS and [*FORMS] == ["plain", "unpacked", "hexagon"]


def test_plain_is_what_export_writes(tmp_path):
    model = tiny.quantized("gqa_llama3", "w8a8")
    plain, other = tmp_path / "plain.tflite", tmp_path / "other.tflite"
    writer.build_prefill(model, TOKENS, form=FORMS["plain"](model)).write(plain)
    writer.write_prefill(model, other, TOKENS)
    assert plain.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["ref", "opt", "xnn"])
@pytest.mark.parametrize("plan", ["w8a8", "w4a8s8", "w8a8i8", "w4a16", "mixed"])
def test_no_profile_changes_a_bit_on_a_cpu(tmp_path, plan, kernels):
    model, ids = tiny.quantized("gqa_llama3", plan), tiny.random_ids((TOKENS,), 3)
    logits = []
    for name, profile in FORMS.items():
        path = tmp_path / f"{name}.tflite"
        writer.build_prefill(model, TOKENS, form=profile(model)).write(path)
        logits.append(LiteRT(path, kernels).run(ids))
    assert len(np.unique(logits[0])) > 8  # that the logits say something
    for others in logits[1:]:
        np.testing.assert_array_equal(others, logits[0])


def test_a_file_with_a_cache_runs_too(tmp_path):
    model = tiny.quantized("gqa_llama3", "w8a8")
    found = []
    for name, profile in FORMS.items():
        path = tmp_path / f"{name}.tflite"
        cached.build_cached(model, 4, 24, "all", profile(model)).write(path)
        assert hexagon_file.signatures(path) == ("prefill_4", "decode")
        runner = open_interpreter(path, "ref").get_signature_runner("decode")
        rng = np.random.default_rng(0)
        inputs = {
            key: rng.integers(-9, 9, d["shape"]).astype(d["dtype"])
            for key, d in runner.get_input_details().items()
        }
        inputs |= {"ids": np.array([5], np.int32), "positions": np.array([0], np.int32)}
        found.append(runner(**inputs)["logits"])
    for others in found[1:]:
        np.testing.assert_array_equal(others, found[0])


def test_a_composite_is_what_the_compiler_wants(tmp_path):
    """x and 16-bit gamma in, epsilon as an attribute; the decomposition takes what the op takes."""
    model = tiny.quantized("gqa_llama3", "w8a8")
    path = tmp_path / "m.tflite"
    writer.build_prefill(model, TOKENS, form=HEXAGON(model)).write(path)
    file = read(path)
    main = file.subgraphs[0]
    found = composites(file, main)
    assert len(found) == NORMS == len(file.subgraphs) - 1
    size, eps = model.config.hidden_size, model.config.rms_norm_eps
    for op in found:
        options = op.builtinOptions2
        assert options.name == b"odml.rms_norm"
        assert flexbuffers.Loads(bytes(options.compositeAttributes)) == {"epsilon": eps}
        x, gamma = (main.tensors[i] for i in op.inputs)
        assert [*x.shape] == [TOKENS, size] and [*gamma.shape] == [size]
        codes = np.frombuffer(bytes(file.buffers[gamma.buffer].data), np.int16)
        np.testing.assert_allclose(codes * gamma.quantization.scale, size**-0.5, rtol=1e-6)
        body = file.subgraphs[options.decompositionSubgraphIndex]
        assert [[*body.tensors[i].shape] for i in body.inputs] == [[TOKENS, size], [size]]
        assert [[*body.tensors[i].shape] for i in body.outputs] == [[TOKENS, size]]


def test_nothing_but_a_norm_is_wrapped():
    model = tiny.quantized("gqa_llama3", "w8a8")
    for graph in model.decoder(TOKENS).graphs:
        parts = HEXAGON(model).parts(graph)
        wrapped = [p for p in parts if isinstance(p, Composite)]
        flat = [n for p in parts for n in (p.nodes if isinstance(p, Composite) else (p,))]
        assert tuple(flat) == graph.nodes
        assert all(".norm." in f".{n.output}" for p in wrapped for n in p.nodes)
        assert all(len(p.inputs) == 1 and [*p.constants] == ["norm.eps"] for p in wrapped)


def test_unpacked_weights_are_those_of_prefill(tmp_path):
    """Of the signatures over a cache, decode keeps its 4-bit weights packed."""
    model = tiny.quantized("gqa_llama3", "w4a8")
    path = tmp_path / "m.tflite"
    cached.build_cached(model, 4, 24, form=FORMS["unpacked"](model)).write(path)
    name = "layers.1.mlp.down.weight"
    kinds = [
        {t.type for t in graph.tensors if t.name == name.encode()} for graph in read(path).subgraphs
    ]
    assert kinds == [{schema.TensorType.INT8}, {schema.TensorType.INT4}]
