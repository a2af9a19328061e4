"""Tables of functions of one code, made on the host.

An op of one int8 or int16 input is a function of 256 or 65,536 codes: its kernel is a look-up,
whatever the arithmetic behind it, and can be checked on every code. This file holds that
arithmetic, exactly as the kernels do it.

Tables are indexed by code - qmin and hold codes of the input's type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from qnpu_sim import fixedpoint, gemmlowp

INT8_CODES = np.arange(-128, 128, dtype=np.int32)
INT16_CODES = np.arange(-32768, 32768, dtype=np.int32)


def codes(dtype: np.dtype | type) -> np.ndarray:
    """All codes of int8 or int16 in rising order, as int32."""
    return INT8_CODES if np.dtype(dtype) == np.int8 else INT16_CODES


def _saturate(x: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.clip(x, limits.min, limits.max).astype(dtype)


def interpolation_table(
    function: Callable[[np.ndarray], np.ndarray],
    scale: np.floating,
    zero_point: int,
    output_scale: np.floating,
    entries: int = 513,
) -> np.ndarray:
    """Samples of a function over the int16 range, for `lut_lookup`; output zero point 0.

    Each sample is moved by half the interpolation error in the middle of its interval.

    Args:
      function: on arrays of the type of the scales.
      scale, output_scale: float32, or float64 where the kernel computes in double.
      entries: 2^n + 1.

    Returns:
      int16 (entries,).

    Reference: LiteRT tflite/kernels/internal/common.h, `LUTPopulateInt16`.
    """
    real = type(scale)
    low, high = scale * real(-32768 - zero_point), scale * real(32767 - zero_point)
    step = (high - low) / real(entries - 1)
    inverse = real(65536) / (output_scale * real(32767) - output_scale * real(-32768))
    i = np.arange(entries - 1).astype(real)
    here = function(low + i * step)
    middle = function(low + i * step + step / real(2))
    following = function(low + (i + real(1)) * step)
    sample = fixedpoint.round_half_away(here * inverse)
    interpolated = fixedpoint.round_half_away((following * inverse + sample) / real(2))
    error = interpolated - fixedpoint.round_half_away(middle * inverse)
    samples = sample - fixedpoint.round_half_away(error / real(2))
    last = fixedpoint.round_half_away(function(np.asarray([high])) * inverse)
    return _saturate(np.concatenate([samples, last]), np.int16)


def sampled(
    function: Callable[[np.ndarray], np.ndarray],
    dtype: np.dtype | type,
    entries: int,
    output: np.dtype | type | None = None,
) -> np.ndarray:
    """A function of one code as a machine with so many samples of it computes it: linear between
    equally spaced codes, rounded half upwards; exact where there is a sample per code.

    Args:
      function: float64 codes (up to qmax + 1) to float64 output codes, unrounded.
      entries: 2^n + 1 samples over the range of `dtype`.
      output: type of the result; None: `dtype`.
    """
    output = dtype if output is None else output
    limits, every = np.iinfo(output), codes(dtype).astype(np.int64)
    rest = max(np.iinfo(dtype).bits - (entries - 1).bit_length() + 1, 0)
    knots = np.arange(0, len(every) + 1, 2**rest) + every[0]
    samples = fixedpoint.round_half_away(function(knots.astype(np.float64)))
    samples = np.clip(samples, limits.min, limits.max).astype(np.int64)
    position = every - every[0]
    index, offset = position >> rest, position & (2**rest - 1)
    delta = (samples[index + 1] - samples[index]) * offset + (2**rest >> 1)
    return (samples[index] + (delta >> rest)).astype(output)


@cache
def softmax_tables(entries: int = 513) -> tuple[np.ndarray, np.ndarray]:
    """The tables of int16 SOFTMAX: exp on [-10, 0], and 1 / (1 + x) on [0, 1] in 513 entries.

    Reference: LiteRT tflite/kernels/activations.cc, `SoftmaxPrepare`.
    """
    span, output = np.float64(65535.0), np.float64(2.0) / np.float64(65535.0)
    exp = interpolation_table(np.exp, np.float64(10.0) / span, 32767, output, entries)
    reciprocal = interpolation_table(
        lambda x: 1.0 / (1.0 + x), np.float64(1.0) / span, -32768, output
    )
    return exp, reciprocal


def softmax_exp(scale: np.float32) -> np.ndarray:
    """float32 exp(-scale d), d in [0, 255].

    Reference: LiteRT optimized/optimized_ops.h, `PopulateSoftmaxLookupTable`.
    """
    # The C library's expf rounds correctly in all but rare cases; NumPy's float32 exp does not.
    x = -scale * np.arange(256, dtype=np.float32)
    return np.exp(x.astype(np.float64)).astype(np.float32)


def logistic_int8(scale: np.float32, zero_point: int) -> np.ndarray:
    """LOGISTIC on int8: float32, rounded half away, at output scale 1/256 and zero point -128.

    Reference: LiteRT common.h, `LUTPopulateInt8`; activations.cc, `SigmoidPrepare`.
    """
    x = scale * (INT8_CODES - zero_point).astype(np.float32)
    # The C library's expf rounds correctly in all but rare cases; NumPy's float32 exp does not.
    with np.errstate(over="ignore"):
        exp = np.exp(-x.astype(np.float64)).astype(np.float32)
    y = np.float32(1) / (np.float32(1) + exp)
    return _saturate(fixedpoint.round_half_away(y * np.float32(256)) - np.float32(128), np.int8)


def logistic_xnn(scale: np.float32, zero_point: int) -> np.ndarray:
    """LOGISTIC on int8 by XNNPACK: the function in float64, its scaling in float32, rounded half to
    even after the zero point is added.

    Reference: XNNPACK src/reference/unary-elementwise.cc; the precision is measured (ai-edge-litert
      2.3.0): float32 would differ at 3 of a million codes.
    """
    x = scale * (INT8_CODES - zero_point).astype(np.float32)
    with np.errstate(over="ignore"):
        y = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    return _saturate(np.rint(y * np.float32(256) - np.float32(128)), np.int8)


def _logistic_multiplier(scale: np.float32) -> tuple[int, int]:
    """(m, right shift) that bring an int16 code to units of 1 / (3 * 2^12).

    Reference: LiteRT activations.cc, `SigmoidPrepare`; `CheckedLog2` takes a scale within 0.07%
      of 2^-12 for it.
    """
    log2 = np.log(scale) * (np.float32(1) / np.log(np.float32(2)))
    rounded = fixedpoint.round_half_away(np.asarray([log2]))[0]
    if abs(log2 - rounded) < np.float32(1e-3) and int(rounded) == -12:
        return 3, 0
    multiplier, shift = float(scale) * 4096.0 * 3.0, 0
    while multiplier <= 32767.0 / 2.0 and shift <= 30:
        multiplier, shift = multiplier * 2.0, shift + 1
    return int(multiplier), shift


def logistic_int16(scale: np.float32, gemmlowp_at_2_12: bool = False) -> np.ndarray:
    """LOGISTIC on int16: a 256-entry sigmoid table on [0, 10.7), interpolated, point-symmetric.

    Args:
      gemmlowp_at_2_12: the kernels that compute an input scale of 2^-12 (within 0.07%) otherwise:
        the optimized ones.

    Reference: LiteRT reference/integer_ops/logistic.h, `Logistic` (int16); activations.cc,
      `SigmoidEval`.
    """
    multiplier, shift = _logistic_multiplier(scale)
    if gemmlowp_at_2_12 and (multiplier, shift) == (3, 0):
        return gemmlowp.logistic16(INT16_CODES).astype(np.int16)
    half = 1 << (shift - 1) if shift else 0
    # The kernel's product is an int32 and wraps; its shift is arithmetic.
    product = (INT16_CODES.astype(np.int64) * multiplier + half).astype(np.int32)
    x = (product >> np.int32(shift)).astype(np.int64)
    magnitude = np.abs(x)
    index = np.minimum(magnitude >> 9, 254)
    here, following = sigmoid_table()[index], sigmoid_table()[index + 1]
    result = (here << 9) + (magnitude & 511) * (following - here)
    result = np.where(magnitude >> 9 >= 255, 0x7FFF << 10, result)
    result = np.where(x >= 0, result + 512, (1 << 25) - result + 511)
    return (result >> 10).astype(np.int16)


_ONE_ABOVE = (
    4, 8, 12, 14, 15, 16, 17, 19, 20, 21, 22, 25, 27, 28, 29, 30, 31, 33, 34, 35, 37, 39, 40, 41,
    43, 44, 45, 46, 49, 50, 54, 62, 63, 64, 66, 82, 86, 93, 100, 103, 112, 116, 135, 255,
)  # fmt: skip
"""Entries of the sigmoid table that lie one above the rounded value."""


@cache
def sigmoid_table() -> np.ndarray:
    """2^16 sigmoid(i / 24), i < 256, int64, as the kernel has it: rounded, but for 44 entries.

    Reference: LiteRT common.h, `sigmoid_table_uint16`.
    """
    table = np.round(65536.0 / (1.0 + np.exp(-np.arange(256) / 24.0))).astype(np.int64)
    table[list(_ONE_ABOVE)] += 1
    return table


def sqrt_float32(
    scale: np.float32,
    zero_point: int,
    output_scale: np.float32,
    output_zero_point: int,
    dtype: np.dtype | type,
) -> np.ndarray:
    """SQRT as the interpreter computes it: float32, truncated.

    Codes below the zero point, which it refuses, give the code of 0.

    Reference: LiteRT tflite/kernels/elementwise.cc, `SqrtEvalQuantized`.
    """
    x = scale * np.maximum(codes(dtype) - zero_point, 0).astype(np.float32)
    y = np.trunc(np.sqrt(x) / output_scale)
    y = np.where(
        y < np.float32(2**31), y, np.float32(-(2.0**31))
    )  # the cast of a float that does not fit
    return _saturate(y.astype(np.int64) + output_zero_point, dtype)


def sqrt_integer(
    scale: np.float32,
    zero_point: int,
    output_scale: np.float32,
    output_zero_point: int,
    dtype: np.dtype | type,
) -> np.ndarray:
    """SQRT in integers: floor(sqrt(v M 2^(s - 31))), v = code - zero point.

    M 2^(s - 31) = scale / output_scale^2 is the only thing rounded.

    Codes below the zero point give the code of 0.
    """
    multiplier, shift = fixedpoint.quantize_multiplier(float(scale) / float(output_scale) ** 2)
    product = np.maximum(codes(dtype).astype(np.int64) - zero_point, 0) * np.int64(multiplier)
    right = 31 - int(shift)
    if right >= 0:
        square = product >> np.int64(min(right, 63))
    else:
        square = np.minimum(product, np.int64(2**62 - 1) >> np.int64(min(-right, 62))) << np.int64(
            min(-right, 62)
        )
    return _saturate(fixedpoint.integer_sqrt(square) + output_zero_point, dtype)


def rsqrt_int8(
    scale: np.float32, zero_point: int, output_scale: np.float32, output_zero_point: int
) -> np.ndarray:
    """RSQRT on int8: Newton-Raphson in Q3.28 on code - zero point.

    The zero point itself gives 127; codes below it, which the interpreter refuses, too. The kernel
    shifts right by more than 31 bits, which C++ leaves undefined, where 1 / (sqrt(scale)
    output_scale) < 2^-12: every result is then below half a code, and here it is 0.

    Reference: LiteRT tflite/kernels/elementwise.cc, `RsqrtEvalQuantizedInt8`,
      `SetRsqrtOutputMultiplier`.
    """
    multiplier, shift = fixedpoint.quantize_multiplier(1.0 / float(np.sqrt(scale) * output_scale))
    value = INT8_CODES - np.int32(zero_point)
    root, exponent = gemmlowp.inverse_sqrt(np.maximum(value, 1))
    mbqm = fixedpoint.multiply_by_quantized_multiplier
    data = mbqm(np.ones_like(value), root, exponent + np.int32(20))
    result = mbqm(data, multiplier, shift - np.int32(20)) + np.int32(output_zero_point)
    return _saturate(np.where(value > 0, result, 127), np.int8)


def rsqrt_int16(scale: np.float32, output_scale: np.float32) -> np.ndarray:
    """RSQRT on int16: 513 samples over the whole int16 range, interpolated, hence poor below 128.

    Codes 0 to 127 lie in the first interval, which starts at about 3/4 of the output's range at any
    scale: results there mean nothing. Negative codes, which the interpreter refuses, give 32767.

    Reference: LiteRT tflite/kernels/elementwise.cc, `GenericPrepare`, `RsqrtEvalQuantizedInt16`.
    """

    def function(x: np.ndarray) -> np.ndarray:
        positive = np.where(x > 0, x, np.float32(1))
        return np.where(x > 0, np.float32(1) / np.sqrt(positive), np.float32(32767) * output_scale)

    table = interpolation_table(function, scale, 0, output_scale)
    y = fixedpoint.lut_lookup(INT16_CODES, table)
    return np.where(INT16_CODES >= 0, y, 32767).astype(np.int16)
