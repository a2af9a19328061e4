"""Qualcomm's compiler and emulator: what is read of them without the extra, and with it both on a
tiny model."""

from importlib import metadata

import numpy as np
import pytest
import tiny
from extras import needs

from qnpu_jax.compilers import emulator_differences, hexagon, hexagon_file
from qnpu_jax.compilers.hexagon import Traffic, read_log
from qnpu_jax.compilers.hexagon_emulator import EmulatedSignature
from qnpu_jax.errors import UserError
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.tflite import cached, writer
from qnpu_jax.tflite.forms import Integers
from qnpu_jax.tflite.named_forms import FORMS

TOKENS = 8
LOG = """
INFO: [compiler_plugin.cc:742] Partitioned subgraph<0>, selected 211 ops, from a total of 211 ops. resulted in 1 partitions.
INFO: [compiler_plugin.cc:742] Partitioned subgraph<1>, selected 9 ops, from a total of 12 ops. resulted in 2 partitions.
====== DDR bandwidth summary ======
     0.0ms [  INFO ]  spill_bytes=0
     0.0ms [  INFO ]  fill_bytes=0
     0.0ms [  INFO ]  write_total_bytes=3326464
     0.0ms [  INFO ]  read_total_bytes=36651008
====== DDR bandwidth summary ======
     0.0ms [  INFO ]  spill_bytes=331776
     0.0ms [  INFO ]  fill_bytes=528384
     0.0ms [  INFO ]  write_total_bytes=10
     0.0ms [  INFO ]  read_total_bytes=20
====== DDR bandwidth summary ======
     0.0ms [  INFO ]  spill_bytes=1
     0.0ms [  INFO ]  fill_bytes=2
     0.0ms [  INFO ]  write_total_bytes=3
     0.0ms [  INFO ]  read_total_bytes=4
"""  # noqa: E501 - as the compiler prints it


needs_extra = needs(hexagon.check_installed)


def test_the_log_tells_of_every_signature():
    prefill, decode = read_log(LOG, ("prefill_128", "decode"))
    assert prefill.whole and prefill.traffic == Traffic(36651008, 3326464, 0, 0)
    assert (decode.ops, decode.on_npu, decode.partitions, decode.whole) == (12, 9, 2, False)
    assert decode.traffic == Traffic(24, 13, 331777, 528386)


@pytest.mark.parametrize("log", ["", LOG[: LOG.rindex("======\n")]])
def test_a_log_cut_short_is_refused(log):
    with pytest.raises(UserError, match=r"told of . subgraphs and the traffic of . partitions"):
        read_log(log, ("prefill_128", "decode"))


def test_an_unknown_soc_is_refused(tmp_path):
    with pytest.raises(UserError, match="--soc SM1: the compiler does not know it; expected one"):
        hexagon.compile_file(tmp_path / "m.tflite", "SM1", tmp_path / "out.tflite")


@pytest.mark.parametrize("got", ["2.5.0", "3.0.0"])
def test_another_version_is_refused(monkeypatch, got):
    monkeypatch.setattr(metadata, "version", lambda name: got if "qnn" in name else "2.3.0")
    with pytest.raises(UserError, match=rf'qnn: version {got}, expected 2.6.\*; install .*"qnn"'):
        hexagon.check_installed()


def test_without_the_extra_it_is_named(no_packages):
    with pytest.raises(UserError, match=r'not installed; install .* pip install "qnpu\[qnn\]"'):
        hexagon.check_installed()


def test_an_uncompiled_file_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    cached.build_cached(tiny.quantized("gqa_llama3", "w8a8"), 4, 24).write(path)
    assert hexagon_file.signatures(path) == ("prefill_4", "decode")
    with pytest.raises(UserError, match=r"prefill_4 has \d+ ops, 0 of them compiled"):
        hexagon_file.read(path)


@pytest.mark.parametrize("size", [0, 6, 40, 20_000, -1])
def test_a_truncated_file_is_refused_where_it_is_read(tmp_path, size):
    path = tmp_path / "m.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w8a8"), path, TOKENS)
    path.write_bytes(path.read_bytes()[:size])
    for read in (hexagon_file.read, hexagon_file.signatures):
        with pytest.raises(UserError, match=r"m\.tflite: (cannot be read|not a) .*; (check|exp)"):
            read(path)


def test_how_sure_a_ratio_of_perplexities_is():
    """Logarithms of the ratios: 0.01, 0.03; their mean 0.02, its standard error 0.01."""
    ratios = np.exp([0.01, 0.03])
    found = emulator_differences.TextDifference(
        (20.0, 45.0), tuple(np.array([20.0, 45.0]) * ratios), 0.875
    )
    np.testing.assert_allclose([found.ratio, found.error], [np.exp(0.02), 0.01], rtol=1e-12)
    assert str(found) == (
        "simulator 30.00, emulator 30.61 (+2.02%, standard error 1.00%); 87.5% of the logits'"
        " codes differ"
    )
    alone = emulator_differences.TextDifference((20.0,), (21.0,), 0.5)
    assert np.isnan(alone.error)
    assert str(alone).startswith("simulator 20.00, emulator 21.00 (+5.00%); 50.0%")


@pytest.mark.parametrize("size", [0, 6, 40, 20_000, -1])
@pytest.mark.parametrize("profile", [*FORMS])
@needs_extra
def test_a_truncated_file_leaves_nothing(tmp_path, profile, size):
    path, out = tmp_path / "m.tflite", tmp_path / "out.tflite"
    model = tiny.quantized("gqa_llama3", "w8a8")
    writer.build_prefill(model, TOKENS, form=FORMS[profile](model)).write(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        UserError, match=r"m\.tflite: LiteRT cannot load it .*; write it again"
    ) as e:
        hexagon.compile_file(path, "SM8650", out)
    assert "\n" not in str(e.value)
    assert [*tmp_path.iterdir()] == [path]


@needs_extra
def test_a_compiled_file_cut_off_is_refused(tmp_path):
    path, out = tmp_path / "m.tflite", tmp_path / "out.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w8a8"), path, TOKENS)
    hexagon.compile_file(path, "SM8650", out)
    size = out.stat().st_size
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{size - 1} bytes, expected {size}; it is cut off"):
        EmulatedSignature(out, "prefill_8")


@needs_extra
def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.tflite: no such file; expected a \.tflite"):
        hexagon.compile_file(tmp_path / "none.tflite", "SM8650", tmp_path / "out.tflite")
    assert not [*tmp_path.iterdir()]


@needs_extra
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["w8a8", "w4a8s8"])
def test_the_emulator_is_near_the_simulator(tmp_path, plan):
    """Ops on equal inputs: int8 linears differ by one code at most, widening not at all."""
    model, ids = tiny.quantized("gqa_llama3", plan), tiny.random_ids((TOKENS,), 3)
    values, dec = Simulated(model, TOKENS).tensors(ids), model.decoder(TOKENS)
    source = tmp_path / "ops.tflite"
    emulator_differences.build_ops(model, dec, 1).write(source)
    made = hexagon.compile_file(source, "SM8650", tmp_path / "compiled.tflite")
    assert all(s.whole for s in made.signatures)
    rows = [*emulator_differences.op_differences(made.path, model, dec, 1, values)]
    linears = [r for r in rows if r.op.startswith("FullyConnected")]
    assert len(linears) == 7 and max(r.largest for r in linears) <= 1
    assert not any(r.count for r in rows if r.op == "Requantize 8>16")
    # 16-bit products round an operand to its upper byte, which a widened byte fills.
    scores = [r for r in rows if r.tensor.endswith(".scores")]
    assert len(scores) == 2 and max(r.largest for r in scores) <= 50
    for form in (Integers(model), FORMS["hexagon"](model)):
        (whole := tmp_path / "whole.tflite").unlink(missing_ok=True)
        emulator_differences.build_layer(form, dec, 1).write(source)
        hexagon.compile_file(source, "SM8650", whole)
        layer = emulator_differences.layer_difference(whole, model, dec, 1, values)
        assert layer.emulator < 1.5 * layer.simulator + 0.01


@needs_extra
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["w8a8s8", "w8a8i8"])
@pytest.mark.parametrize("name", [*FORMS])
def test_a_compiled_model_runs(tmp_path, name, plan):
    """Norms of 16 bits and of 8, which are spelled as diagonals."""
    model, ids = tiny.quantized("gqa_llama3", plan), tiny.random_ids((TOKENS,), 3)
    source = tmp_path / "m.tflite"
    writer.build_prefill(model, TOKENS, form=FORMS[name](model)).write(source)
    made = hexagon.compile_file(source, "SM8750", tmp_path / "compiled.tflite")
    assert [s.name for s in made.signatures] == ["prefill_8"] and made.signatures[0].whole
    got = EmulatedSignature(made.path, "prefill_8").run({"ids": ids})["logits"]
    expected = np.asarray(Simulated(model, TOKENS).logits(ids))
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.99
