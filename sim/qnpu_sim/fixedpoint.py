"""Integer primitives of the kernels, each as its reference defines it.

They are written with operators only, so one definition serves NumPy arrays (tables made on the
host) and JAX arrays (traced kernels). Shifts and multipliers are arrays, never Python numbers: one
compiled kernel serves many layers.

Products of two int32 need int64. In JAX that exists only inside `with jax.enable_x64():`, which the
caller opens around tracing and running; without it these functions raise instead of losing bits.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Codes: TypeAlias = Any
"""An integer array or scalar of NumPy or JAX (`round_half_away`: of floats); results are of the
library of the arguments. A union would be no help: JAX and NumPy type their operators differently.
"""

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

Rounding = Literal["double", "single"]
Ties = Literal["up", "away", "even"]
"""Where half a code goes: towards plus infinity, away from zero, to the even neighbour."""


def wide(x: Codes) -> Codes:
    """x as int64.

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
    """(M, s) with real = M 2^(s - 31): M in [2^30, 2^31), rounded half away from zero.

    Args:
      real: float64 >= 0, any shape. Below 2^-32 the result is (0, 0).

    Returns:
      int32 multiplier and int32 shift, of the shape of `real`; a positive shift is to the left.

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
    """round(a b / 2^31), ties upwards, as int64.

    The reference adds a nudge and truncates; that is a floor of (ab + 2^30) / 2^31, which is one
    shift.
    """
    return (wide(a) * wide(b) + np.int64(2**30)) >> np.int64(31)


def srdhm(a: Codes, b: Codes) -> Codes:
    """Saturating rounding doubling high multiply: round(a b / 2^31), ties upwards.

    Args:
      a, b: int32, broadcasting; (-2^31)^2 alone saturates, to 2^31 - 1.

    Returns:
      int32.

    Reference: gemmlowp fixedpoint/fixedpoint.h, `SaturatingRoundingDoublingHighMul`.
    """
    high = _high_multiply(a, b)
    return (high - (high == np.int64(2**31)).astype(np.int64)).astype(np.int32)


def rounding_divide_by_pot(x: Codes, exponent: Codes) -> Codes:
    """x / 2^exponent, rounded half away from zero.

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
    """MBQM: x M 2^(shift - 31), rounded twice (high multiply, then division by a power of two).

    Args:
      x: int32; x 2^max(shift, 0) wraps at 32 bits as the kernel's does.
      multiplier: int32 in {0} or [2^30, 2^31), broadcasting.
      shift: int32 in [-31, 31].

    Returns:
      int32.

    Reference: LiteRT tflite/kernels/internal/common.h, `MultiplyByQuantizedMultiplier` (int32,
    TFLITE_SINGLE_ROUNDING=0).
    """
    zero = np.int32(0)
    left = shift * (shift > zero).astype(np.int32)
    # srdhm without its saturation, which takes two negative factors.
    high = _high_multiply(x << left, multiplier).astype(np.int32)
    return rounding_divide_by_pot(high, left - shift)


def multiply_by_quantized_multiplier_64(x: Codes, multiplier: Codes, shift: Codes) -> Codes:
    """MBQM64: floor(x m 2^(shift - 15) + 1/2) with m = M rounded to 15 bits.

    Args:
      x: int64, |x| 2^max(shift - 14, 0) < 2^47.
      multiplier: int32 in {0} or [2^30, 2^31), broadcasting.
      shift: int32 in [-31, 7]; up to 21 for an x that the reference has 2^7 or 2^14 times larger,
        with a shift as much smaller.

    Returns:
      int32; a larger result wraps, as the reference's cast does.

    Reference: LiteRT tflite/kernels/internal/common.h, `MultiplyByQuantizedMultiplier` (int64).
    """
    reduced = _upper_15_bits(multiplier)
    left = (wide(shift) - np.int64(14)) * (shift > np.int32(14)).astype(np.int64)
    total = np.int64(15) - wide(shift) + left
    half = np.int64(1) << (total - np.int64(1))
    return (((wide(x) << left) * reduced + half) >> total).astype(np.int32)


def _upper_15_bits(multiplier: Codes) -> Codes:
    """M / 2^16 rounded, in [0, 2^15), as int64."""
    reduced = (wide(multiplier) + np.int64(2**15)) >> np.int64(16)
    return reduced - (reduced >> np.int64(15))  # only 2^15 itself has that bit


def multiply_by_quantized_multiplier_64_in_double(
    x: jax.Array, multiplier: Codes, shift: Codes
) -> jax.Array:
    """MBQM64 of an int32, by float64, which has a fast multiply where int64 has none.

    Exact: x m has 46 bits, and with the half below or above them the sum still fits 53.

    Args:
      x: int32, |x| 2^shift < 2^51.
      multiplier, shift: as of `multiply_by_quantized_multiplier_64`.
    """
    power = (wide(shift) + np.int64(1023 - 15)) << np.int64(52)  # the bits of 2^(shift - 15)
    factor = _upper_15_bits(multiplier).astype(np.float64) * jax.lax.bitcast_convert_type(
        power, jnp.float64
    )
    return low_32_bits(jnp.floor(x.astype(jnp.float64) * factor + np.float64(0.5)))


def multiply_by_quantized_multiplier_single(x: Codes, multiplier: Codes, shift: Codes) -> Codes:
    """x M 2^(shift - 31) by the vector code of x86: rounded twice, ties upwards both times.

    Args:
      x: int32; x 2^max(shift, 0) wraps at 32 bits.
      multiplier: int32 in {0} or [2^30, 2^31), broadcasting.
      shift: int32 in [-31, 31].

    Returns:
      int32.

    Reference: ruy apply_multiplier.cc, `MultiplyByQuantizedMultiplier`; LiteRT optimized
      `MultiplyByQuantizedMultiplier4Rows` in its NEON form, which x86 runs by translation.
    """
    zero = np.int32(0)
    left = shift * (shift > zero).astype(np.int32)
    high = _high_multiply(x << left, multiplier)
    exponent = wide(left - shift)
    return ((high + ((np.int64(1) << exponent) >> np.int64(1))) >> exponent).astype(np.int32)


def multiply_by_quantized_multiplier_wide(
    x: Codes, multiplier: Codes, shift: Codes, rounding: Rounding = "double", ties: Ties = "away"
) -> Codes:
    """x M 2^(shift - 31) of a 64-bit accumulator with all 31 bits of the multiplier.

    `double` rounds as a rounding doubling high multiply (ties upwards) and a rounding shift
    (`ties`) do, one after the other: MBQM. `single` rounds the whole product once.

    Args:
      x: int64, |x| <= 2^47.
      multiplier: int32 in {0} or [2^30, 2^31), broadcasting.
      shift: int32 in [-31, 31].

    Returns:
      int32; a larger result saturates.

    Reference: own; `double` with ties `away` is equal to `multiply_by_quantized_multiplier`
      wherever that neither wraps nor saturates.
    """
    m, s = wide(multiplier), wide(shift)
    left = s * (s > np.int64(0)).astype(np.int64)
    # From 2^47 on, what is shifted to the left saturates whatever it is.
    most = np.int64(2**47) >> left
    x = wide(x).clip(-most, most) << left
    # x M = 2^16 high + low: as one number it would not fit 64 bits.
    product = (x & np.int64(0xFFFF)) * m
    high, low = (x >> np.int64(16)) * m + (product >> np.int64(16)), product & np.int64(0xFFFF)
    if rounding == "double":
        y = _divide((high + np.int64(2**14)) >> np.int64(15), left - s, ties)
    else:
        y = _divide(high, left - s + np.int64(15), ties, sticky=low)
    return y.clip(np.int64(INT32_MIN), np.int64(INT32_MAX)).astype(np.int32)


def _divide(x: Codes, exponent: Codes, ties: Ties, sticky: Codes = 0) -> Codes:
    """x / 2^exponent rounded to the nearest; `sticky` > 0 says that x is really a little larger.

    Args:
      x: int64.
      exponent: int64 in [0, 62], broadcasting.
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
    """x rounded half away from zero, as C's `round`: exact for every float32 and float64.

    Adding one half before truncation would round 0.49999999999999994 up.
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
"""Between 2^52 and 2^53 a float64 is an integer, and this many more leave it in its low bits."""


def low_32_bits(x: jax.Array) -> jax.Array:
    """An integral float64, |x| <= 2^51, modulo 2^32 as int32.

    In two instructions: XLA's cast, which saturates, takes seven.
    """
    return jax.lax.bitcast_convert_type(x + _ULP_IS_1, jnp.int64).astype(jnp.int32)


def cast_to_int32(x: jax.Array) -> jax.Array:
    """An integral float64 as x86 casts it to int32: values that do not fit become -2^31.

    So does a FULLY_CONNECTED whose result passes 2^31: the code is the lowest, whatever the sign.

    Reference: Intel SDM, CVTTSD2SI, "integer indefinite".
    """
    low, high = np.float64(INT32_MIN), np.float64(INT32_MAX)
    return low_32_bits(jnp.where((x >= low) & (x <= high), x, low))


def saturate(x: jax.Array, dtype: np.dtype | type) -> jax.Array:
    """int32 clipped to the range of int8 or int16 and cast to it."""
    limits = np.iinfo(dtype)
    return jnp.clip(x, np.int32(limits.min), np.int32(limits.max)).astype(dtype)


def integer_sqrt(x: np.ndarray) -> np.ndarray:
    """floor(sqrt(x)) of int64 in [0, 2^62), bit by bit.

    Reference: the digit-by-digit (abacus) algorithm; no floating point.
    """
    root, rest = np.zeros_like(x), x
    for bit in range(60, -1, -2):
        trial = root + np.int64(1 << bit)
        fits = (rest >= trial).astype(np.int64)
        rest = rest - fits * trial
        root = (root >> np.int64(1)) + fits * np.int64(1 << bit)
    return root


def lut_lookup(x: Codes, lut: Codes) -> Codes:
    """Linear interpolation in a table of 2^n + 1 entries over the int16 range: n bits index, the
    other 16 - n interpolate.

    Args:
      x: int32 in [-2^15, 2^15).
      lut: int16; LiteRT's have 513 entries.

    Returns:
      int32 in the int16 range: base + (slope offset + half) / 2^(16 - n), base and slope wrapping
      at 16 bits.

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
