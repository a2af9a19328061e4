"""Goals of the benchmarks of compilers, memory and the simulator's speed hold, and can fail."""

import dataclasses
import importlib
import math
import sys
from argparse import Namespace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax.compilers.emulator_differences import TextDifference
from qnpu_jax.compilers.hexagon import CompiledForHexagon, HexagonSignature, Traffic
from qnpu_jax.errors import UserError
from qnpu_jax.integer.model import dequantize
from qnpu_sim.program import compile_model, run
from qnpu_sim.rounding import PROFILES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
hexagon = importlib.import_module("hexagon")
sim_scaling = importlib.import_module("sim_scaling")
sim_speed = importlib.import_module("sim_speed")
step_memory = importlib.import_module("step_memory")


# Goals of hexagon.py.


def compiled(recipe, prefill: float | None = 1.0, on_npu=9, partitions=1, soc="SM8650"):
    """A row whose signatures take `prefill` and a tenth of it, in seconds."""
    moved = Traffic(10, 2, 0, 0)
    signatures = (HexagonSignature("prefill_8", 9, on_npu, partitions, moved),)
    signatures += (HexagonSignature("decode", 9, 9, 1, moved),)
    made = CompiledForHexagon(Path("m.tflite"), soc, signatures, 100, 1.0, 2**20)
    estimates = {"prefill_8": prefill, "decode": prefill / 10} if prefill else None
    return hexagon.Row(recipe, "hexagon", made, estimates)


def emulated(recipe, ratio):
    text = TextDifference((20.0, 30.0), (20.0 * ratio, 30.0 * ratio), 0.5) if ratio else None
    return hexagon.Emulated(recipe, "hexagon", [], [], text)


def test_the_goals_of_hexagon_hold_and_can_fail():
    fine = [compiled("w4a8", 0.84), compiled("w4a16"), compiled("w8a8", None, soc="SM8850")]
    near = [emulated("w8a8", 1.019), emulated("w4a8", 0.981), emulated("w4a8", None)]
    assert not hexagon.verdict(fine, near)
    assert not hexagon.verdict([compiled("w4a8")], [])  # nothing to compare with
    assert hexagon.verdict([compiled("w4a8", 0.86), compiled("w4a16")], []) == [
        "SM8650 hexagon: w4a8's estimated prefill 14.0% below w4a16's, expected 15.1%"
    ]
    assert hexagon.verdict([compiled("w8a8", on_npu=8), compiled("w8a8", partitions=2)], []) == [
        "w8a8 hexagon SM8650 prefill_8: 8 of 9 ops on the NPU in 1 partitions",
        "w8a8 hexagon SM8650 prefill_8: 9 of 9 ops on the NPU in 2 partitions",
    ]
    short = hexagon.verdict([], [emulated("w8a8", 1.03), emulated("w4a8", math.nan)])
    assert [s.split(":")[0] for s in short] == ["w8a8 hexagon", "w4a8 hexagon"]


def test_the_headline_of_hexagon_is_the_worst():
    rows = [compiled("w4a8", 0.84), compiled("w4a16", on_npu=8)]
    assert hexagon.headline(rows, [emulated("w8a8", 1.01), emulated("w4a8", 0.985)]) == (
        "whole on the NPU: 3 of 4; w4a8 prefill 16.0% below w4a16 (estimate);"
        " emulated perplexity within 1.50% of the simulator's"
    )


def test_hexagon_wants_folders_or_a_quick_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hexagon"])
    with pytest.raises(SystemExit) as end:
        hexagon.arguments()
    assert end.value.code == 2 and "expected folders" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["hexagon", "--quick"])
    args = hexagon.arguments()
    assert (args.windows, args.profiles) == (0, ["plain", "unpacked", "hexagon"])


def test_hexagon_without_the_extra_could_not_run(monkeypatch, capsys):
    def missing():
        raise UserError("onnxruntime-qnn: not installed")

    monkeypatch.setattr(sys, "argv", ["hexagon", "--quick"])
    monkeypatch.setattr(hexagon.hexagon, "check_installed", missing)
    assert hexagon.main() == 2
    assert capsys.readouterr().err == "onnxruntime-qnn: not installed\n"


# Memory of a step, planned for shapes.


@pytest.mark.nightly
def test_activations_grow_with_the_tokens_and_weights_do_not():
    config = dataclasses.replace(tiny.SMOLLM2, num_layers=2, vocab_size=256)
    args = Namespace(recipe="w8a8", stage=0)
    one, two = (step_memory.measure(config, args, batch, 64) for batch in (2, 4))
    assert one.weights == two.weights
    assert two.layer == 2 * one.layer > 0
    # Arguments: both models, the parameters and what Adam keeps of them.
    assert 2 * one.weights < one.arguments < 3 * one.weights
    assert 0 < two.temporary - one.temporary < 4 * one.layer


@pytest.mark.nightly
def test_seconds_of_a_step_are_measured(monkeypatch, capsys):
    config = dataclasses.replace(tiny.SMOLLM2, num_layers=1, vocab_size=64)
    monkeypatch.setattr(step_memory.checkpoint, "load", lambda _: Namespace(config=config))
    monkeypatch.setattr(sys, "argv", ["step_memory", "--quick", "--batches", "1", "2"])
    assert step_memory.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" windows: ")[0] for line in lines] == ["1", "2"]
    assert all(float(line.split()[2]) > 0 for line in lines)


def speed_rows(times_float: float, times_reference: float) -> list:
    """w8a8 beside a float model of 1,000 tokens/s at one length."""
    made = {
        ("-", "float32"): 1000.0,
        ("w8a8", "litert_ref"): 1000 * times_float,
        ("w8a8", "BUILTIN_REF"): 1000 * times_float / times_reference,
    }
    return [
        sim_speed.Row(recipe, reader, 128, 1, lambda: None, [128 / rate])
        for (recipe, reader), rate in made.items()
    ]


@pytest.mark.parametrize(
    ("times_float", "times_reference", "memory", "short"),
    [
        (1.01, 20.5, 1.4, []),
        (0.99, 20.5, 1.4, ["0.99x float32"]),
        (1.01, 19.5, 1.4, ["19.5x BUILTIN_REF"]),
        (1.01, 20.5, 1.6, ["1.60x the memory"]),
    ],
)
def test_the_goals_of_speed_hold_and_can_fail(capsys, times_float, times_reference, memory, short):
    rows = speed_rows(times_float, times_reference)
    found = sim_speed.report(rows, {"float32": 1000.0, "w8a8": 1000 * memory})
    assert len(found) == len(short)
    assert all(said in line for said, line in zip(short, found, strict=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("goals missed" if short else "goals met")
    assert f"at least {sim_speed.MIN_TIMES_FLOAT:g}x float32" in lines[-2 - len(short)]


@pytest.mark.nightly
def test_a_shallow_model_is_the_first_layers_of_it():
    model = tiny.quantized("gqa_llama3", "w8a8")
    params = {n: jnp.asarray(x) for n, x in dequantize(model).items()}
    cut, cut_params = sim_scaling.shallow(model, params, 1)
    ids = tiny.random_ids((8,))
    expected = run(compile_model(model, model.decoder(8)), ids, lambda n: "layers.0." in n)
    got = run(compile_model(cut, cut.decoder(8)), ids, lambda n: "layers.0." in n)
    for name in expected.keys() - {"head.logits"}:
        assert (np.asarray(expected[name]) == np.asarray(got[name])).all(), name
    rows = list(sim_scaling.rows_of(cut, cut_params, 8))
    assert [r.reader for r in rows] == ["float32", *PROFILES]
    shapes = {np.asarray(r.call()["head.logits"]).shape for r in rows[1:]}
    assert shapes == {(8, 96)}


@pytest.mark.slow
def test_bfloat16_is_the_float_model_in_bfloat16():
    model = tiny.quantized("gqa_llama3", "w8a8")
    dec, ids = model.decoder(8), jnp.asarray(tiny.random_ids((2, 8)))
    params = {n: jnp.asarray(x) for n, x in dequantize(model).items()}
    expected = sim_speed.float_logits(dec, params, ids)
    halves = {n: x.astype(jnp.bfloat16) for n, x in params.items()}
    got = sim_speed.float_logits(dec, halves, ids)
    assert got.dtype == jnp.bfloat16
    a, b = np.asarray(expected).ravel(), np.asarray(got.astype(jnp.float32)).ravel()
    assert np.corrcoef(a, b)[0, 1] > 0.98  # 8 bits of mantissa, through two layers
