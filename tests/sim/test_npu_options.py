"""An NPU's options: each against plain Python integers, and a whole model under it."""

import dataclasses
import functools
import subprocess
import sys
from fractions import Fraction
from math import floor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import simulated

from qnpu_jax.errors import UserError
from qnpu_jax.integer.accumulators import proved_bounds
from qnpu_sim import fixedpoint, kernels, op_constants, tables
from qnpu_sim.narrow_accumulators import Saturate, saturating_sum, wrap
from qnpu_sim.op_constants import QuantizedType, Weights
from qnpu_sim.program import compile_model, run
from qnpu_sim.rounding import ChosenScale, FixedScaleWide, Npu

IDS = tiny.random_ids((tiny.TOKENS,), 3)


@functools.cache
def plain_run(plan: str):
    """Of the `npu` profile with its defaults: codes of every tensor."""
    return simulated(tiny.quantized("gqa_llama3", plan), IDS, "npu")


multipliers = st.one_of(st.just(0), st.integers(2**30, 2**31 - 1))


def rounded(value: Fraction, ties: str) -> int:
    """To the nearest integer."""
    below = floor(value)
    rest = value - below
    if rest != Fraction(1, 2):
        return below + (rest > Fraction(1, 2))
    return {"up": below + 1, "away": below + (value > 0), "even": below + below % 2}[ties]


@given(
    st.integers(-(2**47), 2**47) | st.sampled_from([-(2**47), 2**47]),
    multipliers,
    st.integers(-31, 31),
    st.sampled_from(["up", "away", "even"]),
    st.sampled_from(["single", "double"]),
)
@settings(max_examples=500)
def test_roundings_are_exact(x, m, shift, ties, rounding):
    left, right = max(shift, 0), max(-shift, 0)
    product = Fraction((x << left) * m, 2**31)
    if rounding == "single":
        exact = rounded(product / 2**right, ties)
    else:
        exact = rounded(Fraction(rounded(product, "up"), 2**right), ties)
    args = (np.int64(x), np.int32(m), np.int32(shift))
    got = fixedpoint.multiply_by_quantized_multiplier_wide(*args, rounding, ties)
    assert int(got) == max(min(exact, 2**31 - 1), -(2**31))


@given(st.integers(-255, 255), st.integers(0, 63), st.sampled_from(["up", "away", "even"]))
def test_ties_are_hit(odd, exponent, ties):
    """Products that lie half between two codes, which random ones never do."""
    x, shift = 2 * odd + 1, -(exponent % 8)
    # x 2^30 2^(shift - 31) = x 2^(shift - 1)
    got = fixedpoint.multiply_by_quantized_multiplier_wide(
        np.int64(x), np.int32(2**30), np.int32(shift), "single", ties
    )
    assert int(got) == rounded(Fraction(x, 2 ** (1 - shift)), ties)


@pytest.mark.slow
@pytest.mark.parametrize("plan", pairwise.often(["w8a8", "w8a16"], ["w8a16"]))
def test_the_shortcuts_of_the_default_are_its_general_form(plan, monkeypatch):
    """MBQM where no option asks for more: fewer operations, the same bits."""
    rules = Npu().rules()
    assert isinstance(rules.linear16_wide(0.01), FixedScaleWide)
    model = tiny.quantized("gqa_llama3", plan)
    short = plain_run(plan)
    names = ("linear8", "linear16", "linear16_wide", "matmul8", "matmul16", "elementwise")

    def chosen(real: Any) -> ChosenScale:
        return ChosenScale(*fixedpoint.quantize_multiplier(real), "double", "away")

    general = dataclasses.replace(rules, **dict.fromkeys(names, chosen))
    monkeypatch.setattr("qnpu_sim.program.rules_of", lambda _: general)
    for name, codes in simulated(model, IDS, "npu").items():
        np.testing.assert_array_equal(codes, short[name], err_msg=name)


@given(st.floats(1e-9, 100))
def test_a_multiplier_of_15_bits_has_15_bits(real):
    made: Any = Npu(multiplier_bits=15).rules().linear8(real)
    value = float(made.multiplier) * 2.0 ** (float(made.shift) - 31)
    assert int(made.multiplier) % 2**16 == 0 and 2**30 <= made.multiplier < 2**31
    assert value == pytest.approx(real, rel=2.0**-15)


@pytest.mark.parametrize("entries", [33, 257, 513, 65537])
def test_more_entries_come_closer(entries):
    """Against the function in real numbers: the error is that of linear interpolation."""
    types = (QuantizedType(np.float32(scale), bits=16) for scale in (2**-12, 1 / 32768))
    rules = Npu(table_entries=entries).rules()
    table = op_constants.prepare_unary("logistic", *types, rules=rules).table
    exact = 32768 / (1 + np.exp(-tables.INT16_CODES * 2.0**-12))
    step = 2.0**-12 * 65536 / (entries - 1)
    # h^2 / 8 max|f''|, f'' <= 0.0963; half a code each for the sample and the interpolation.
    limit = step**2 / 8 * 0.0963 * 32768 + 1
    assert np.abs(np.minimum(exact, 32767) - table).max() <= limit


@pytest.mark.parametrize("entries", [33, 257, 65537])
def test_samples_of_rsqrt_and_exp(entries):
    """Against the functions in real numbers: linear interpolation errs by h^2 / 8 max|f''|."""
    rules, step = Npu(table_entries=entries).rules(), 65536 / (entries - 1)
    types = (QuantizedType(np.float32(scale), bits=16) for scale in (2.0**-10, 2.0**-13))
    table = op_constants.prepare_unary("rsqrt", *types, rules=rules).table
    code = np.arange(2**14, 2**15)
    factor = 2.0**13 / np.sqrt(2.0**-10)
    limit = step**2 / 8 * 0.75 * factor * 2.0 ** (-14 * 2.5) + 1
    assert np.abs(factor / np.sqrt(code) - table[code + 2**15]).max() <= limit

    exp = op_constants.prepare_softmax_int16(np.float32(10 / 65535), rules).exp
    exact = 32768 * np.exp(-np.arange(65536) * 10 / 65535)
    # exp(0) ends below 1 (32,762); one code for both roundings, and 5 for an index off by one.
    assert np.abs(exp - exact).max() <= (10 * step / 65536) ** 2 / 8 * 32768 + 6 + 1

    exp = op_constants.prepare_softmax_int8(np.float32(0.05), rules).exp
    exact = np.minimum(2.0**31 * np.exp(-0.05 * np.arange(256)), 2**31 - 1)
    step = max(256 / (entries - 1), 1)  # at a sample per code only rounding is left
    interpolated = (0.05 * step) ** 2 / 8 * 2**31 if step > 1 else 0
    float32 = 2.0**31 * 255 * 0.05 * 2.0**-25  # of the scale
    assert np.abs(exp - exact).max() <= interpolated + float32 + 1


def test_table_entries_of_8_bits_are_exact_from_257_on():
    types = (QuantizedType(np.float32(0.05), 3), QuantizedType(np.float32(1 / 256), -128))
    exact = np.rint(256 / (1 + np.exp(-(tables.INT8_CODES - 3) * np.float64(0.05)))) - 128
    table = op_constants.prepare_unary(
        "logistic", *types, rules=Npu(table_entries=257).rules()
    ).table
    np.testing.assert_array_equal(table, np.minimum(exact, 127))
    coarse = op_constants.prepare_unary(
        "logistic", *types, rules=Npu(table_entries=33).rules()
    ).table
    assert 0 < np.abs(coarse.astype(int) - exact).max() <= 2


@pytest.mark.slow
@given(
    st.sampled_from([1, 2, 6]).flatmap(lambda n: st.tuples(*[st.integers(-(2**20), 2**20)] * n)),
    st.integers(16, 40),
    st.data(),
)
def test_a_saturating_accumulator_clips_after_every_product(xs, bits, data):
    ys = data.draw(st.lists(st.integers(-128, 127), min_size=len(xs), max_size=len(xs)))
    start = data.draw(st.integers(-(2**30), 2**30))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = min(max(start, low), high)
    for x, y in zip(xs, ys, strict=True):
        expected = min(max(expected + x * y, low), high)
    with jax.enable_x64():
        limit = Saturate(np.zeros((), np.int32), np.asarray([start], np.int32), bits)
        x, y = (jnp.asarray(v, jnp.int32) for v in (xs, ys))
        assert int(saturating_sum(x[None, None], y[None, :, None], limit)[0, 0, 0]) == expected


@given(st.integers(-(2**31), 2**31 - 1), st.integers(16, 40))
def test_a_wrapping_accumulator_keeps_its_low_bits(acc, bits):
    with jax.enable_x64():
        got = int(wrap(jnp.asarray(acc, jnp.int64), bits))
    assert (got - acc) % 2**bits == 0 and -(2 ** (bits - 1)) <= got < 2 ** (bits - 1)


def widest(model) -> Any:
    bounds = proved_bounds(model.decoder(tiny.TOKENS), model.tensors)
    return max(bounds, key=lambda b: b.needed)


def test_a_model_that_may_overflow_is_refused_with_op_bound_and_options():
    model = tiny.quantized("gqa_llama3", "w8a8")
    dec, worst = model.decoder(tiny.TOKENS), widest(model)
    narrow = Npu(accumulator_bits=worst.needed - 1)
    with pytest.raises(UserError) as error:
        compile_model(model, dec, narrow)
    text = str(error.value)
    assert worst.tensor in text and f"[{worst.low}, {worst.high}]" in text and "\n" not in text
    assert f"accumulator_bits={worst.needed - 1}" in text and "'wrap' or 'saturate'" in text
    compile_model(model, dec, Npu(accumulator_bits=worst.needed))


def test_more_bits_than_the_requantization_takes_are_refused(monkeypatch):
    model = tiny.quantized("gqa_llama3", "w8a16")
    dec, worst = model.decoder(tiny.TOKENS), widest(model)
    monkeypatch.setattr("qnpu_sim.rounding.WIDEST", worst.needed)
    compile_model(model, dec, Npu())
    monkeypatch.setattr("qnpu_sim.rounding.WIDEST", worst.needed - 1)
    with pytest.raises(UserError, match=rf"{worst.tensor}.*takes {worst.needed - 1}; .* ops"):
        compile_model(model, dec, Npu())


def test_int4_sums_that_xnnpack_would_wrap_are_refused(monkeypatch):
    model = tiny.quantized("gqa_llama3", "w4a8")
    dec = model.decoder(tiny.TOKENS)
    bounds = proved_bounds(dec, model.tensors)
    worst = max(
        (b for b in bounds if b.op == "FULLY_CONNECTED" and b.tensor != "head.logits"),
        key=lambda b: b.needed,
    )
    monkeypatch.setattr("qnpu_sim.xnnpack.INT4_BITS", worst.needed)
    compile_model(model, dec, "litert_xnn")
    monkeypatch.setattr("qnpu_sim.xnnpack.INT4_BITS", worst.needed - 1)
    with pytest.raises(UserError, match=r"XNNPACK has .* beside int4 weights; .* litert_opt"):
        compile_model(model, dec, "litert_xnn")
    compile_model(model, dec, "litert_opt")


def one(plans, overflows) -> list[pairwise.Row]:
    return [(plans[0], overflows[0])]


@pytest.mark.slow
@pairwise.parametrize(("plan", "overflow"), ("w8a8", "w8a16"), ("wrap", "saturate"), choose=one)
def test_an_accumulator_as_wide_as_its_sums_changes_nothing(plan, overflow):
    """Not proved to fit, and so limited, but wide enough for this text: the bits of no limit."""
    model = tiny.quantized("gqa_llama3", plan)
    bits = widest(model).needed - 1
    plain = plain_run(plan)
    limited = simulated(model, IDS, Npu(accumulator_bits=bits, overflow=overflow))
    for name, codes in plain.items():
        np.testing.assert_array_equal(codes, limited[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("overflow", pairwise.often(["wrap", "saturate"], ["saturate"]))
def test_a_narrow_accumulator_changes_the_model(overflow):
    model = tiny.quantized("gqa_llama3", "w8a8")
    program = compile_model(
        model, model.decoder(tiny.TOKENS), Npu(accumulator_bits=16, overflow=overflow)
    )
    plain = plain_run("w8a8")["head.logits"]
    assert (np.asarray(run(program, IDS)["head.logits"]) != plain).any()


@pytest.mark.slow
def test_saturation_costs_less_than_wrapping():
    """One FULLY_CONNECTED whose sums pass 16 bits: clipped ones stay near, wrapped ones do not."""
    rng = np.random.default_rng(0)
    x = rng.integers(60, 128, (8, 64)).astype(np.int8)
    w = rng.integers(-20, 128, (16, 64)).astype(np.int8)
    weights = Weights(w, np.zeros(16, np.int32), np.ones(16, np.float32))
    of_x, of_y = QuantizedType(np.float32(1)), QuantizedType(np.float32(2**13))

    def run(**options: Any) -> np.ndarray:
        rules, tight = Npu(**options).rules(), bool(options)
        c = op_constants.prepare_fully_connected(of_x, weights, of_y, rules, tight=tight)
        with jax.enable_x64():
            return np.asarray(kernels.fully_connected(jnp.asarray(x), jnp.asarray(w), c)).astype(
                int
            )

    exact = run()
    clipped, wrapped = (run(accumulator_bits=16, overflow=o) for o in ("saturate", "wrap"))
    assert np.abs(clipped - np.minimum(exact, 4)).max() <= 1 and clipped.max() == 4
    assert np.abs(wrapped - exact).mean() > np.abs(clipped - exact).mean()


WRONG = """
from qnpu_jax.errors import UserError
from qnpu_sim import Npu, compile_model
for name, value in {wrong}:
    try:
        compile_model(None, None, value) if name == "profile" else Npu(**{{name: value}})
    except UserError as error:
        print(error)
"""


def test_wrong_options_and_profiles_are_named():
    """In a process of its own: here, types are checked before values are."""
    wrong = [
        ("rounding", "triple"),
        ("ties", "down"),
        ("multiplier_bits", 16),
        ("accumulator_bits", 12),
        ("overflow", "ignore"),
        ("table_entries", 512),
        ("profile", "hexagon"),
        ("profile", ["npu"]),
    ]
    command = [sys.executable, "-c", WRONG.format(wrong=wrong)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for (name, value), line in zip(wrong, lines, strict=True):
        assert line.startswith(name) and str(value) in line, line
        assert ": expected one of " in line and line.endswith("; choose one of them"), line


def test_options_are_fields_of_a_frozen_dataclass():
    assert dataclasses.replace(Npu(), ties="even") == Npu(ties="even") != Npu()
    assert hash(Npu()) == hash(Npu())


OPTIONS = (
    {"rounding": "single"},
    {"rounding": "single", "ties": "even"},
    {"ties": "up"},
    {"multiplier_bits": 15},
    {"table_entries": 4097},
)


def few(options, plans) -> list[pairwise.Row]:
    """A rounding, a multiplier and a table, each in a plan."""
    return [*zip(options[1::2] + options[-1:], plans, strict=True)]


@pytest.mark.slow
@pairwise.parametrize(("options", "plan"), OPTIONS, ("w8a8", "w4a16", "w8a8i8"), choose=few)
def test_every_option_runs_a_model_near_the_plain_one(options, plan):
    """Rounding noise moves codes; it must not move the answer away by more than quantization."""
    model = tiny.quantized("gqa_llama3", plan)
    plain = plain_run(plan)["head.logits"].astype(np.int64)
    got = simulated(model, IDS, Npu(**options))["head.logits"].astype(np.int64)
    assert (got != plain).any()
    spread = np.std(plain)
    assert np.sqrt(np.mean((got - plain) ** 2)) < 0.5 * spread
