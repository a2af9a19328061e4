"""gemmlowp's fixed-point exp, 1 / (1 + x), 1 / sqrt(x) and sigmoid.

int8 SOFTMAX computes with the first two, int8 RSQRT with the third, int16 LOGISTIC at an input
scale of 2^-12 with the last.

Qm.n is a fixed-point format: m integer bits and n fraction bits beside the sign, so an integer code
c stands for c 2^-n. n is 31 - m in an int32, and 15 - m in an int16.
As in `qnpu_sim.fixedpoint`, functions use operators only and take NumPy and JAX arrays.

Reference: gemmlowp fixedpoint/fixedpoint.h; LiteRT tflite/kernels/internal/common.h.
"""

from __future__ import annotations

import numpy as np

from qnpu_sim.fixedpoint import INT32_MAX, INT32_MIN, Codes, rounding_divide_by_pot, srdhm, wide


def saturating_shift_left(x: Codes, exponent: int) -> Codes:
    """Returns x 2^exponent, saturated to int32.

    >>> [int(saturating_shift_left(np.int32(x), 2)) for x in (5, 2**30)]
    [20, 2147483647]

    Args:
      x: int32.
      exponent: in [1, 30].

    Reference: fixedpoint.h, `SaturatingRoundingMultiplyByPOT` with a positive exponent. It compares
      with thresholds where this clips; both send -2^(31 - exponent) to -2^31.
    """
    product = wide(x) << np.int64(exponent)
    low, high = np.int64(INT32_MIN), np.int64(INT32_MAX)
    return product.clip(low, high).astype(np.int32)


def _exp_on_last_quarter(a: Codes) -> Codes:
    """Returns exp(a) by the Taylor series of order 4 around -1/8; a is Q0.31 in [-1/4, 0).

        exp(a) = exp(-1/8) (1 + x + x^2/2 + x^3/6 + x^4/24),   x = a + 1/8

    The sum of the last three terms is computed as ((x^4 / 4 + x^3) / 3 + x^2) / 2.

    Returns:
      Q0.31.

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
"""exp(-2^k) as Q0.31, for k from -2 to 4."""


def exp_on_negative_values(a: Codes) -> Codes:
    """Returns exp(a) for a <= 0.

    a is split into a rest in [-1/4, 0) and a multiple of 1/4. Each binary digit d_k of the multiple
    multiplies the exponential of the rest by a constant:

        a = rest - sum_k d_k 2^k,   exp(a) = exp(rest) prod_k exp(-2^k)^d_k,   k = -2..4

    >>> exp = exp_on_negative_values(np.int32(-(2**26)))  # a = -1
    >>> round(int(exp) / 2**31, 5)
    0.36788

    Args:
      a: Q5.26 in int32, <= 0.

    Returns:
      Q0.31 in int32; 2^31 - 1 for a = 0.

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
    """Returns 1 / (1 + a) for a in [0, 1), by Newton-Raphson division.

    With d = (1 + a) / 2 in [1/2, 1), three steps approach 1 / d, and the result is half of it:

        x_0 = 48/17 - 32/17 d,   x_(n+1) = x_n + x_n (1 - d x_n)

    x is Q2.29.

    >>> round(int(one_over_one_plus_x(np.int32(2**30))) / 2**31, 6)  # a = 1/2
    0.666667

    Args:
      a: Q0.31 in int32, >= 0.

    Returns:
      Q0.31 in int32.

    Reference: fixedpoint.h, `one_over_one_plus_x_for_x_in_0_1`.
    """
    half_denominator = ((wide(a) + np.int64(2**31)) >> np.int64(1)).astype(np.int32)
    x = srdhm(half_denominator, np.int32(-1010580540)) + np.int32(1515870810)
    for _ in range(3):
        error = np.int32(1 << 29) - srdhm(half_denominator, x)
        x = x + saturating_shift_left(srdhm(x, error), 2)
    return saturating_shift_left(x, 1)


def inverse_sqrt(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Writes 1 / sqrt(value) as r 2^(s - 31), by five Newton-Raphson steps from 1.

    With v = value scaled by a power of 4 into [1/4, 1), x is Q3.28:

        x_0 = 1,   x_(n+1) = 3/2 x_n - v/2 x_n^3

    >>> root, shift = inverse_sqrt(np.array([4]))
    >>> round(int(root[0]) * 2.0 ** (int(shift[0]) - 31), 6)
    0.5

    Args:
      value: int32 in [1, 2^29).

    Returns:
      int32 r and int32 s <= 0, of the shape of `value`. A value of 1 gives (2^31 - 1, 0).

    Reference: LiteRT common.h, `GetInvSqrtQuantizedMultiplierExp` with reverse_shift -1.
    """
    value = np.asarray(value, np.int32)
    # The exponent that frexp returns is the number of bits of an integer, exactly; the reference
    # counts leading zeros.
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
    """SRDHM of int16 values held as int32: round(a b / 2^15), ties upwards.

    Only (-2^15)^2 would saturate, and no factor here is -2^15.

    Reference: fixedpoint.h, `SaturatingRoundingDoublingHighMul` (int16).
    """
    return (a * np.int32(b) + np.int32(2**14)) >> np.int32(15)


def _clip16(x: Codes) -> Codes:
    return x.clip(np.int32(-(2**15)), np.int32(2**15 - 1))


def _exp16(a: np.ndarray) -> np.ndarray:
    """Returns exp(a) as Q0.15 for a in [-8, 0] as Q3.12: `exp_on_negative_values` in int16.

    Its constants are those of int32, rounded to their upper 16 bits.
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
    """Returns the sigmoid 1 / (1 + exp(-a)), by exponential and Newton-Raphson division in int16.

    Negative a take the symmetry sigmoid(a) = 1 - sigmoid(-a).

    Args:
      a: Q3.12 in int32, within the int16 range.

    Returns:
      Q0.15 in int32, within the int16 range.

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
