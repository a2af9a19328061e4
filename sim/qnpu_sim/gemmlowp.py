"""Transcendental functions in fixed point: the arithmetic behind int8 SOFTMAX and RSQRT, and int16
LOGISTIC at one scale.

A Qm.n number is an int32 with m integer bits and n = 31 - m fraction bits. As in `qnpu_sim.fixedpoint`,
operators only: the functions take NumPy and JAX arrays.

Reference: gemmlowp fixedpoint/fixedpoint.h; LiteRT tflite/kernels/internal/common.h.
"""

from __future__ import annotations

import numpy as np

from qnpu_sim.fixedpoint import INT32_MAX, INT32_MIN, Codes, rounding_divide_by_pot, srdhm, wide


def saturating_shift_left(x: Codes, exponent: int) -> Codes:
    """x 2^exponent clipped to int32; exponent in [1, 30].

    Reference: fixedpoint.h, `SaturatingRoundingMultiplyByPOT` with a positive exponent, whose
      threshold sends
    -2^(31 - exponent) to -2^31 too: the clip below is equal to it.
    """
    product = wide(x) << np.int64(exponent)
    low, high = np.int64(INT32_MIN), np.int64(INT32_MAX)
    return product.clip(low, high).astype(np.int32)


def _exp_on_last_quarter(a: Codes) -> Codes:
    """exp(a) as Q0.31 for a Q0.31 in [-1/4, 0): Taylor of order 4 around -1/8.

    Reference: fixedpoint.h, `exp_on_interval_between_negative_one_quarter_and_0_excl`.
    """
    exp_of_minus_eighth, third = np.int32(1895147668), np.int32(715827883)
    x = a + np.int32(1 << 28)
    x2 = srdhm(x, x)
    x3, x4 = srdhm(x2, x), srdhm(x2, x2)
    higher = rounding_divide_by_pot(
        srdhm(rounding_divide_by_pot(x4, np.int32(2)) + x3, third) + x2, np.int32(1)
    )
    return srdhm(x + higher, exp_of_minus_eighth) + exp_of_minus_eighth


_EXP_OF_POWERS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
"""Q0.31 of exp(-2^k), k = -2..4."""


def exp_on_negative_values(a: Codes) -> Codes:
    """exp(a) as Q0.31 for a Q5.26, a <= 0.

    a is split in a multiple of 1/4, whose binary digits pick factors, and a rest in [-1/4, 0).

    Reference: fixedpoint.h, `exp_on_negative_values`.
    """
    quarter = np.int32(1 << 24)
    rest = (a & (quarter - np.int32(1))) - quarter
    result = _exp_on_last_quarter(saturating_shift_left(rest, 5))
    remainder = rest - a
    for k, factor in enumerate(_EXP_OF_POWERS):
        picked = ((remainder >> np.int32(24 + k)) & np.int32(1)) == np.int32(1)
        product = srdhm(result, np.int32(factor))
        result = result + (product - result) * picked.astype(np.int32)
    is_zero = (a == np.int32(0)).astype(np.int32)
    return result + (np.int32(INT32_MAX) - result) * is_zero


def one_over_one_plus_x(a: Codes) -> Codes:
    """1 / (1 + a) as Q0.31 for a Q0.31 in [0, 1): three Newton-Raphson steps on the half
    denominator.

    Reference: fixedpoint.h, `one_over_one_plus_x_for_x_in_0_1`.
    """
    half_denominator = ((wide(a) + np.int64(2**31)) >> np.int64(1)).astype(np.int32)
    x = srdhm(half_denominator, np.int32(-1010580540)) + np.int32(1515870810)
    for _ in range(3):
        error = np.int32(1 << 29) - srdhm(half_denominator, x)
        x = x + saturating_shift_left(srdhm(x, error), 2)
    return saturating_shift_left(x, 1)


def inverse_sqrt(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(r, s) with 1 / sqrt(value) = r 2^(s - 31), by five Newton-Raphson steps from 1.

    Args:
      value: int32 in [1, 2^29).

    Returns:
      int32 r and int32 s <= 0; value 1 gives (2^31 - 1, 0).

    Reference: LiteRT common.h, `GetInvSqrtQuantizedMultiplierExp` with reverse_shift -1.
    """
    value = np.asarray(value, np.int32)
    # frexp counts the bits of an integer exactly; the reference counts leading zeros.
    pairs = (31 - np.frexp(value.astype(np.float64))[1]) // 2 - 1
    x_input = (value << (2 * pairs).astype(np.int32)) >> np.int32(1)
    half_input = rounding_divide_by_pot(x_input, np.int32(1))
    half_three = np.int32((1 << 28) + (1 << 27))
    x = np.full_like(value, 1 << 28)
    for _ in range(5):
        cube = saturating_shift_left(srdhm(srdhm(x, x), x), 6)
        x = saturating_shift_left(srdhm(x, half_three) - srdhm(half_input, cube), 3)
    x = srdhm(x, np.int32(1518500250))
    shift = 11 - pairs
    x = x << np.maximum(-shift, 0).astype(np.int32)
    is_one = value == 1
    return (
        np.where(is_one, INT32_MAX, x).astype(np.int32),
        np.where(is_one, 0, -np.maximum(shift, 0)).astype(np.int32),
    )


def _high16(a: Codes, b: Codes | int) -> Codes:
    """round(a b / 2^15) of int16 values held as int32, ties upwards.

    Reference: fixedpoint.h, `SaturatingRoundingDoublingHighMul` (int16); no factor here is -2^15.
    """
    return (a * np.int32(b) + np.int32(2**14)) >> np.int32(15)


def _clip16(x: Codes) -> Codes:
    return x.clip(np.int32(-(2**15)), np.int32(2**15 - 1))


def _exp16(a: np.ndarray) -> np.ndarray:
    """exp(a) as Q0.15 for a Q3.12 in [-8, 0]: as `exp_on_negative_values`, in int16.

    Its constants are those of int32, rounded to their upper half.
    """
    quarter = np.int32(1 << 10)
    rest = (a & (quarter - np.int32(1))) - quarter
    x = (rest << np.int32(3)) + np.int32(1 << 12)
    x2 = _high16(x, x)
    x3, x4 = _high16(x2, x), _high16(x2, x2)
    third = _high16(rounding_divide_by_pot(x4, np.int32(2)) + x3, 10923)
    higher = rounding_divide_by_pot(third + x2, np.int32(1))
    result = _clip16(np.int32(28918) + _high16(x + higher, 28918))
    for k, factor in enumerate(_EXP_OF_POWERS[:5]):
        picked = ((rest - a) >> np.int32(10 + k)) & np.int32(1) == 1
        multiplier = int(rounding_divide_by_pot(np.int32(factor), np.int32(16)))
        result = np.where(picked, _high16(result, multiplier), result)
    return np.where(a == 0, np.int32(2**15 - 1), result).astype(np.int32)


def logistic16(a: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-a)) as Q0.15 for a Q3.12: exponential and Newton-Raphson in int16.

    Args:
      a: int32 in the int16 range.

    Returns:
      int32 in the int16 range.

    Reference: fixedpoint.h, `logistic`, `one_over_one_plus_x_for_x_in_0_1` (int16).
    """
    half_denominator = (_exp16(-np.abs(a)) + np.int32(2**15)) >> np.int32(1)
    x = np.int32(23130) + _high16(half_denominator, -15420)
    for _ in range(3):
        error = np.int32(1 << 13) - _high16(half_denominator, x)
        x = x + _clip16(_high16(x, error) << np.int32(2))
    positive = _clip16(x << np.int32(1))
    y = np.where(a > 0, positive, np.int32(2**15 - 1) - positive)
    return np.where(a == 0, np.int32(1 << 14), y).astype(np.int32)
