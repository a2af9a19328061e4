"""Fixed-point arithmetic on integers: the primitives of the kernels, each as its reference defines
it.

Rescaling. A kernel has an integer accumulator acc and needs round(acc r) for a real factor r, for
example input scale * weight scale / output scale. `quantize_multiplier` writes r as

    r = M 2^(shift - 31),   M in [2^30, 2^31),

and the kernel computes MBQM (multiply by quantized multiplier) from two rounded steps:

    MBQM(x, M, shift) = RDBP(SRDHM(x 2^max(shift, 0), M), max(-shift, 0))
    SRDHM(a, b)       = round(a b / 2^31)      saturating rounding doubling high multiply
    RDBP(x, e)        = round(x / 2^e)         rounding divide by power of two

The variants below differ in where a tie goes, in the bits of M they keep, and in the accumulator's
width. All use operators only, so one definition serves NumPy arrays (tables made on the host) and
JAX arrays (traced kernels). Shifts and multipliers are arrays, so one compiled kernel serves many
layers.

A product of two int32 needs int64. JAX has int64 only inside `with jax.enable_x64():`, which the
caller opens around tracing and running. Without it these functions raise instead of losing bits.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Codes: TypeAlias = Any
"""Integer array or scalar of NumPy or JAX (floats in `round_half_away`); results are of the library
of the arguments. JAX and NumPy type their operators differently: a union would satisfy neither."""

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

Rounding = Literal["double", "single"]
"""How often a rescaling rounds: after the high multiply and after the shift, or once."""
Ties = Literal["up", "away", "even"]
"""Where a value half-way between two integers goes: towards plus infinity, away from zero, or to
the even neighbour."""


def wide(x: Codes) -> Codes:
    """Casts to int64.

    Raises:
      RuntimeError: JAX runs without 64-bit types.
    """
    y = x.astype(np.int64)
    if y.dtype != np.int64:
        raise RuntimeError(
            "the simulator needs 64-bit integers; trace and run it inside `with jax.enable_x64():`"
        )
    return y


def quantize_multiplier(real: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Writes a real factor as multiplier and shift: real = M 2^(shift - 31), M in [2^30, 2^31).

    M is rounded half away from zero.

    >>> multiplier, shift = quantize_multiplier(0.75)
    >>> int(multiplier) == 0.75 * 2**31, int(shift)
    (True, 0)

    Args:
      real: float64 >= 0, any shape. A factor below 2^-32 gives (0, 0).

    Returns:
      int32 multiplier and int32 shift, of the shape of `real`. A positive shift is to the left.

    Reference: LiteRT tflite/kernels/internal/quantization_util.cc, `QuantizeMultiplier`.
    """
    fraction, shift = np.frexp(np.asarray(real, np.float64))
    # Exact: a float64 in [2^30, 2^31) plus one half still fits 53 bits.
    multiplier = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    carried = multiplier == 2**31
    multiplier = np.where(carried, 2**30, multiplier)
    shift = np.where(carried, shift + 1, shift)
    flushed = (shift < -31) | (multiplier == 0)
    return np.where(flushed, 0, multiplier).astype(np.int32), np.where(flushed, 0, shift).astype(
        np.int32
    )


def _high_multiply(a: Codes, b: Codes) -> Codes:
    """Rounds a b / 2^31 to the nearest, ties upwards, as int64.

    The reference adds a nudge that depends on the sign and truncates. Both steps together are
    floor((a b + 2^30) / 2^31), which is one addition and one arithmetic shift.
    """
    return (wide(a) * wide(b) + np.int64(2**30)) >> np.int64(31)


def srdhm(a: Codes, b: Codes) -> Codes:
    """SRDHM, saturating rounding doubling high multiply: round(a b / 2^31), ties upwards.

    >>> int(srdhm(np.int32(3), np.int32(2**30)))  # 1.5
    2

    Args:
      a, b: int32 that broadcast. Only (-2^31)^2 saturates, to 2^31 - 1.

    Returns:
      int32.

    Reference: gemmlowp fixedpoint/fixedpoint.h, `SaturatingRoundingDoublingHighMul`.
    """
    high = _high_multiply(a, b)
    return (high - (high == np.int64(2**31)).astype(np.int64)).astype(np.int32)


def rounding_divide_by_pot(x: Codes, exponent: Codes) -> Codes:
    """RDBP, rounding divide by power of two: x / 2^exponent, rounded half away from zero.

    >>> [int(rounding_divide_by_pot(np.int32(x), np.int32(1))) for x in (3, -3)]  # 1.5 and -1.5
    [2, -2]

    Args:
      x: int32.
      exponent: int32 in [0, 31], broadcasting.

    Returns:
      int32.

    Reference: gemmlowp fixedpoint/fixedpoint.h, `RoundingDivideByPOT`.
    """
    mask = ~(np.int32(-1) << exponent)
    threshold = (mask >> np.int32(1)) + (x < np.int32(0)).astype(np.int32)
    return (x >> exponent) + ((x & mask) > threshold).astype(np.int32)


def multiply_by_quantized_multiplier(x: Codes, multiplier: Codes, shift: Codes) -> Codes:
    """MBQM, multiply by quantized multiplier: x M 2^(shift - 31), rounded twice.

        y = RDBP(SRDHM(x 2^max(shift, 0), M), max(-shift, 0))

    >>> multiplier, shift = quantize_multiplier(0.3)
    >>> int(multiply_by_quantized_multiplier(np.int32(1000), multiplier, shift))
    300

    Args:
      x: int32; x 2^max(shift, 0) wraps at 32 bits, as in the kernel.
      multiplier: M, int32: 0 or in [2^30, 2^31); broadcasts.
      shift: int32 in [-31, 31].

    Returns:
      int32.

    Reference: LiteRT tflite/kernels/internal/common.h, `MultiplyByQuantizedMultiplier` (int32,
      TFLITE_SINGLE_ROUNDING=0).
    """
    zero = np.int32(0)
    left = shift * (shift > zero).astype(np.int32)
    # `srdhm` without its saturation: that needs two negative factors, and M is not negative.
    high = _high_multiply(x << left, multiplier).astype(np.int32)
    return rounding_divide_by_pot(high, left - shift)


def multiply_by_quantized_multiplier_64(x: Codes, multiplier: Codes, shift: Codes) -> Codes:
    """MBQM64, for 64-bit accumulators: floor(x m 2^(shift - 15) + 1/2), m = M / 2^16 rounded.

    The multiplier keeps 15 of its 31 bits, so that x m fits 64 bits.

    Args:
      x: int64, |x| 2^max(shift - 14, 0) < 2^47.
      multiplier: M, int32: 0 or in [2^30, 2^31); broadcasts.
      shift: int32 in [-31, 7]. A BATCH_MATMUL of widened operands passes shifts up to 21: its x is
        2^7 or 2^14 times smaller than the reference's, and its shift as much larger.

    Returns:
      int32. A larger result wraps, as in the reference's cast.

    Reference: LiteRT tflite/kernels/internal/common.h, `MultiplyByQuantizedMultiplier` (int64).
    """
    reduced = _upper_15_bits(multiplier)
    left = (wide(shift) - np.int64(14)) * (shift > np.int32(14)).astype(np.int64)
    total = np.int64(15) - wide(shift) + left
    half = np.int64(1) << (total - np.int64(1))
    return (((wide(x) << left) * reduced + half) >> total).astype(np.int32)


def _upper_15_bits(multiplier: Codes) -> Codes:
    """Rounds M to its upper 15 bits: M / 2^16 in [0, 2^15), as int64; 2^15 becomes 2^15 - 1."""
    reduced = (wide(multiplier) + np.int64(2**15)) >> np.int64(16)
    return reduced - (reduced >> np.int64(15))  # only 2^15 itself has that bit


def multiply_by_quantized_multiplier_64_in_double(
    x: jax.Array, multiplier: Codes, shift: Codes
) -> jax.Array:
    """MBQM64 of an int32 accumulator, computed in float64: CPUs multiply float64 faster than int64.

    It is exact: x m has 46 bits, and with the half that is added, which may lie below or above
    them, it fits the 53 bits of a float64.

    Args:
      x: int32, |x| 2^shift < 2^51.
      multiplier, shift: as in `multiply_by_quantized_multiplier_64`.

    Returns:
      int32, the bits of `multiply_by_quantized_multiplier_64`.
    """
    # The float64 2^(shift - 15), made from its exponent field.
    power = (wide(shift) + np.int64(1023 - 15)) << np.int64(52)
    factor = _upper_15_bits(multiplier).astype(np.float64) * jax.lax.bitcast_convert_type(
        power, jnp.float64
    )
    return low_32_bits(jnp.floor(x.astype(jnp.float64) * factor + np.float64(0.5)))


def multiply_by_quantized_multiplier_single(x: Codes, multiplier: Codes, shift: Codes) -> Codes:
    """MBQM as x86 vector code computes it: x M 2^(shift - 31), rounded twice, ties upwards both
    times.

    It differs from `multiply_by_quantized_multiplier` only where the second rounding meets a
    negative tie.

    Args:
      x: int32; x 2^max(shift, 0) wraps at 32 bits.
      multiplier: M, int32: 0 or in [2^30, 2^31); broadcasts.
      shift: int32 in [-31, 31].

    Returns:
      int32.

    Reference: ruy apply_multiplier.cc, `MultiplyByQuantizedMultiplier`; LiteRT optimized
      `MultiplyByQuantizedMultiplier4Rows`, whose NEON intrinsics are translated to x86.
    """
    zero = np.int32(0)
    left = shift * (shift > zero).astype(np.int32)
    high = _high_multiply(x << left, multiplier)
    exponent = wide(left - shift)
    return ((high + ((np.int64(1) << exponent) >> np.int64(1))) >> exponent).astype(np.int32)


def multiply_by_quantized_multiplier_wide(
    x: Codes, multiplier: Codes, shift: Codes, rounding: Rounding = "double", ties: Ties = "away"
) -> Codes:
    """Rescales a 64-bit accumulator with all 31 bits of the multiplier: x M 2^(shift - 31).

    >>> half = quantize_multiplier(0.5)
    >>> wide_mbqm = multiply_by_quantized_multiplier_wide
    >>> [int(wide_mbqm(np.int64(5), *half, "single", ties)) for ties in ("up", "away", "even")]
    [3, 3, 2]

    Args:
      x: int64, |x| <= 2^47.
      multiplier: M, int32: 0 or in [2^30, 2^31); broadcasts.
      shift: int32 in [-31, 31].
      rounding: `double` rounds twice as MBQM does, after the high multiply (ties upwards) and after
        the shift (`ties`); `single` rounds the whole product once (`ties`).
      ties: of the last rounding.

    Returns:
      int32. A larger result saturates.

    Reference: own. `double` with ties `away` equals `multiply_by_quantized_multiplier` wherever
      that neither wraps nor saturates.
    """
    m, s = wide(multiplier), wide(shift)
    left = s * (s > np.int64(0)).astype(np.int64)
    # |x| 2^left > 2^47 saturates for every M > 0: clipping x keeps the shift from overflowing.
    most = np.int64(2**47) >> left
    x = wide(x).clip(-most, most) << left
    # x M has up to 78 bits. It is held in two parts: x M = 2^16 high + low, 0 <= low < 2^16.
    product = (x & np.int64(0xFFFF)) * m
    high, low = (x >> np.int64(16)) * m + (product >> np.int64(16)), product & np.int64(0xFFFF)
    if rounding == "double":
        y = _divide((high + np.int64(2**14)) >> np.int64(15), left - s, ties)
    else:
        y = _divide(high, left - s + np.int64(15), ties, sticky=low)
    return y.clip(np.int64(INT32_MIN), np.int64(INT32_MAX)).astype(np.int32)


def _divide(x: Codes, exponent: Codes, ties: Ties, sticky: Codes = 0) -> Codes:
    """Divides by 2^exponent, rounded to the nearest.

    Args:
      x: int64.
      exponent: int64 in [0, 62], broadcasting.
      ties: where a value half-way between two integers goes.
      sticky: the bits below x. Where they are not 0, the exact value is not a tie.
    """
    one, zero = np.int64(1), np.int64(0)
    half = (one << exponent) >> one
    y = (x + half) >> exponent
    if ties == "up":
        return y
    tied = ((x & ((one << exponent) - one)) == half) & (half > zero) & (sticky == zero)
    back = (x < zero) if ties == "away" else (y & one) == one
    return y - (tied & back).astype(np.int64)


def round_half_away(x: Codes) -> Codes:
    """Rounds half away from zero, as C's `round`; exact for every float32 and float64.

    Adding one half and truncating would be wrong: it rounds 0.49999999999999994 up.

    >>> round_half_away(np.array([2.5, -2.5, 0.49999999999999994])).tolist()
    [3.0, -3.0, 0.0]
    """
    if not isinstance(x, np.ndarray):
        return jax.lax.round(x, jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    truncated = np.trunc(x)
    rest = (x - truncated) * x.dtype.type(2)
    return (
        truncated
        + (rest >= x.dtype.type(1)).astype(x.dtype)
        - (rest <= x.dtype.type(-1)).astype(x.dtype)
    )


_ULP_IS_1 = np.float64(1.5 * 2.0**52)
"""1.5 * 2^52. A float64 between 2^52 and 2^53 has a unit in the last place of 1, so x + 1.5 * 2^52
holds the integer x in the low bits of its mantissa."""


def low_32_bits(x: jax.Array) -> jax.Array:
    """Takes an integral float64 modulo 2^32, as int32.

    It costs two instructions; XLA's own cast, which saturates, costs seven.

    Args:
      x: float64 without a fraction, |x| <= 2^51.
    """
    return jax.lax.bitcast_convert_type(x + _ULP_IS_1, jnp.int64).astype(jnp.int32)


def cast_to_int32(x: jax.Array) -> jax.Array:
    """Casts an integral float64 to int32 as x86 does: a value that does not fit becomes -2^31.

    A FULLY_CONNECTED whose result passes 2^31 therefore gives the lowest code, whatever its sign.

    Reference: Intel SDM, CVTTSD2SI, "integer indefinite".
    """
    low, high = np.float64(INT32_MIN), np.float64(INT32_MAX)
    return low_32_bits(jnp.where((x >= low) & (x <= high), x, low))


def saturate(x: jax.Array, dtype: np.dtype | type) -> jax.Array:
    """Clips int32 to the range of int8 or int16 and casts it."""
    limits = np.iinfo(dtype)
    return jnp.clip(x, np.int32(limits.min), np.int32(limits.max)).astype(dtype)


def integer_sqrt(x: np.ndarray) -> np.ndarray:
    """Returns floor(sqrt(x)), one binary digit at a time, without floating point.

    >>> integer_sqrt(np.array([15, 16, 2**60])).tolist()
    [3, 4, 1073741824]

    Args:
      x: int64 in [0, 2^62).

    Reference: the digit-by-digit (abacus) algorithm.
    """
    root, rest = np.zeros_like(x), x
    for bit in range(60, -1, -2):
        trial = root + np.int64(1 << bit)
        fits = (rest >= trial).astype(np.int64)
        rest = rest - fits * trial
        root = (root >> np.int64(1)) + fits * np.int64(1 << bit)
    return root


def lut_lookup(x: Codes, lut: Codes) -> Codes:
    """Interpolates linearly in a table of 2^n + 1 samples over the int16 range.

    The upper n bits of x choose the interval, the lower r = 16 - n bits the place in it:

        y = lut[i] + ((lut[i + 1] - lut[i]) offset + 2^(r - 1)) / 2^r,   x + 2^15 = i 2^r + offset

    The difference of two entries and the sum wrap at 16 bits.

    Args:
      x: int32 in [-2^15, 2^15).
      lut: int16, (2^n + 1,); LiteRT's tables have 513 entries.

    Returns:
      int32 in the int16 range.

    Reference: LiteRT tflite/kernels/internal/common.h, `LUTLookup` (int16).
    """
    entries = lut.shape[0]
    rest = 16 - (entries - 1).bit_length() + 1
    if rest == 0:
        return lut[x + np.int32(2**15)].astype(np.int32)
    index = (x >> np.int32(rest)) + np.int32((entries - 1) // 2)
    base, following = lut[index], lut[index + np.int32(1)]
    slope = (following - base).astype(np.int32)
    offset = x & np.int32(2**rest - 1)
    delta = (slope * offset + np.int32(2 ** (rest - 1))) >> np.int32(rest)
    return (base.astype(np.int32) + delta).astype(np.int16).astype(np.int32)
