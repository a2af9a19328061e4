"""Integer primitives against exact arithmetic on Python integers and fractions."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnpu_sim import fixedpoint, gemmlowp

INT32 = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-(2**31), 2**31 - 1, -1, 0, 1, 2**30])
MULTIPLIER = st.just(0) | st.integers(2**30, 2**31 - 1)


def wrap32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def half_away(x: Fraction) -> int:
    return half_up(x) if x >= 0 else -half_up(-x)


def srdhm(a: int, b: int) -> int:
    """As gemmlowp writes it: a nudge that depends on the sign, then division that truncates."""
    if a == b == -(2**31):
        return 2**31 - 1
    nudged = a * b + (2**30 if a * b >= 0 else 1 - 2**30)
    return abs(nudged) // 2**31 * (1 if nudged >= 0 else -1)


def mbqm(x: int, multiplier: int, shift: int) -> int:
    high = srdhm(wrap32(x << max(shift, 0)), multiplier)
    return half_away(Fraction(high, 2 ** max(-shift, 0)))


def evaluate(function, *args: int, dtypes=None) -> int:
    """The primitive's value, equal on NumPy and JAX arrays."""
    dtypes = dtypes or [np.int32] * len(args)
    arrays = [np.asarray([a], d) for a, d in zip(args, dtypes, strict=True)]
    host = function(*arrays)
    with jax.enable_x64():
        traced = jax.jit(function)(*arrays)
    assert host.dtype == traced.dtype
    assert host[0] == traced[0]
    return int(host[0])


@given(INT32, INT32)
def test_srdhm(a, b):
    assert evaluate(fixedpoint.srdhm, a, b) == srdhm(a, b)


@pytest.mark.slow
@given(INT32, st.integers(0, 31))
def test_rounding_divide_by_pot(x, exponent):
    expected = half_away(Fraction(x, 2**exponent))
    assert evaluate(fixedpoint.rounding_divide_by_pot, x, exponent) == expected


@given(INT32, MULTIPLIER, st.integers(-31, 30))
def test_multiply_by_quantized_multiplier(x, multiplier, shift):
    expected = mbqm(x, multiplier, shift)
    assert evaluate(fixedpoint.multiply_by_quantized_multiplier, x, multiplier, shift) == expected


@given(st.integers(-(2**47) + 1, 2**47 - 1), MULTIPLIER, st.integers(-31, 7))
def test_multiply_by_quantized_multiplier_64(x, multiplier, shift):
    reduced = min((multiplier + 2**15) >> 16, 0x7FFF)
    expected = wrap32(half_up(Fraction(x * reduced, 2 ** (15 - shift))))
    function = fixedpoint.multiply_by_quantized_multiplier_64
    dtypes = (np.int64, np.int32, np.int32)
    assert evaluate(function, x, multiplier, shift, dtypes=dtypes) == expected


@given(INT32, MULTIPLIER, st.integers(-31, 19))
def test_multiply_by_quantized_multiplier_64_in_double(x, multiplier, shift):
    reduced = min((multiplier + 2**15) >> 16, 0x7FFF)
    expected = wrap32(half_up(x * reduced * Fraction(2) ** (shift - 15)))
    function = fixedpoint.multiply_by_quantized_multiplier_64_in_double
    with jax.enable_x64():
        got = jax.jit(function)(*(jnp.asarray(v, jnp.int32) for v in (x, multiplier, shift)))
    assert got == expected


@given(st.integers(-(2**47), 2**47), MULTIPLIER, st.integers(-31, 31))
def test_multiply_by_quantized_multiplier_wide(x, multiplier, shift):
    high = half_up(Fraction((x << max(shift, 0)) * multiplier, 2**31))
    expected = max(min(half_away(Fraction(high, 2 ** max(-shift, 0))), 2**31 - 1), -(2**31))
    function = fixedpoint.multiply_by_quantized_multiplier_wide
    dtypes = (np.int64, np.int32, np.int32)
    assert evaluate(function, x, multiplier, shift, dtypes=dtypes) == expected


@given(st.integers(-(2**31) + 1, 2**31 - 1), MULTIPLIER, st.integers(-31, 0))
def test_wide_equals_narrow_on_32_bits(x, multiplier, shift):
    narrow = evaluate(fixedpoint.multiply_by_quantized_multiplier, x, multiplier, shift)
    dtypes = (np.int64, np.int32, np.int32)
    function = fixedpoint.multiply_by_quantized_multiplier_wide
    assert evaluate(function, x, multiplier, shift, dtypes=dtypes) == narrow


@given(st.floats(1e-12, 2.0**30))
def test_quantize_multiplier(real):
    multiplier, shift = (int(v) for v in fixedpoint.quantize_multiplier(real))
    if multiplier == 0:
        assert shift == 0
        assert real < 2.0**-31
        return
    assert 2**30 <= multiplier < 2**31
    exact = Fraction(real) * Fraction(2) ** (31 - shift)
    # The one value that rounds to 2^31 carries into the shift, which halves the unit.
    assert multiplier == half_away(exact) or exact < 2**30


def test_quantize_multiplier_carries_and_flushes():
    real = np.asarray([np.nextafter(1.0, 0.0), 0.0, 2.0**-33, 2.0**-32, 0.75])
    multiplier, shift = fixedpoint.quantize_multiplier(real)
    np.testing.assert_array_equal(multiplier, [2**30, 0, 0, 2**30, 3 * 2**29])
    np.testing.assert_array_equal(shift, [1, 0, 0, -31, 0])


@given(st.floats(-(2.0**60), 2.0**60) | st.sampled_from([0.49999999999999994, 0.5, -0.5, 2.5]))
def test_round_half_away(x):
    expected = half_away(Fraction(x))
    assert fixedpoint.round_half_away(np.asarray([x]))[0] == expected
    with jax.enable_x64():
        assert fixedpoint.round_half_away(jnp.asarray([x], jnp.float64))[0] == expected


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (2.0**31 - 1, 2**31 - 1),
        (-(2.0**31), -(2**31)),
        (2.0**31, -(2**31)),
        (-(2.0**31) - 1, -(2**31)),
        (1e300, -(2**31)),
        (-float("inf"), -(2**31)),
        (-0.0, 0),
        (-7.0, -7),
    ],
)
def test_cast_to_int32_is_indefinite_out_of_range(x, expected):
    with jax.enable_x64():
        assert fixedpoint.cast_to_int32(jnp.asarray(x, jnp.float64)) == expected


@given(INT32)
def test_saturate(x):
    for dtype in (np.int8, np.int16):
        limits = np.iinfo(dtype)
        y = fixedpoint.saturate(jnp.asarray(x, jnp.int32), dtype)
        assert y.dtype == dtype
        assert y == min(max(x, limits.min), limits.max)


@given(st.integers(0, 2**62 - 1) | st.integers(0, 2**31 - 1).map(lambda r: r * r))
def test_integer_sqrt(x):
    assert fixedpoint.integer_sqrt(np.asarray([x]))[0] == math.isqrt(x)


@given(st.integers(-(2**31), 0))
def test_exp_on_negative_values(a):
    y = evaluate(gemmlowp.exp_on_negative_values, a)
    assert abs(y / 2.0**31 - math.exp(a / 2.0**26)) < 1e-6


@given(st.integers(0, 2**31 - 1))
def test_one_over_one_plus_x(a):
    y = evaluate(gemmlowp.one_over_one_plus_x, a)
    assert abs(y / 2.0**31 - 1 / (1 + a / 2.0**31)) < 1e-6


@given(st.integers(1, 2**29 - 1))
def test_inverse_sqrt(value):
    root, shift = gemmlowp.inverse_sqrt(np.asarray([value]))
    assert abs(root[0] * 2.0 ** (int(shift[0]) - 31) * math.sqrt(value) - 1) < 1e-5


@pytest.mark.slow
@given(st.integers(-(2**15), 2**15 - 1))
def test_lut_lookup(x):
    table = np.random.default_rng(0).integers(-(2**14), 2**14, 513, np.int16)
    index, offset = divmod(x + 2**15, 128)
    base, following = int(table[index]), int(table[index + 1])
    expected = base + half_up(Fraction((following - base) * offset, 128))
    traced_table = jnp.asarray(table)

    def lookup(codes):
        tables = traced_table if isinstance(codes, jax.Array) else table
        return fixedpoint.lut_lookup(codes, tables)

    assert evaluate(lookup, x) == expected
