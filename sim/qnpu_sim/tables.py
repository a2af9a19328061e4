"""Look-up tables of one-input ops, made on the host.

An op of one int8 or int16 input has 256 or 65,536 possible inputs, so its kernel can be a look-up
and can be checked on every code. This file computes the tables, with the arithmetic of the kernels.

    softmax exponentials   exp(-scale d), d = row maximum - code
    LOGISTIC               1 / (1 + exp(-x))
    SQRT, RSQRT            sqrt(x), 1 / sqrt(x)

Unless a function says otherwise, a table is indexed by code - qmin, has 256 entries for int8 and
65,536 for int16, and holds output codes of the input's type. Scales are float32 real units per
code; zero points are codes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from qnpu_sim import fixedpoint, gemmlowp

INT8_CODES = np.arange(-128, 128, dtype=np.int32)
"""Every int8 code in rising order."""
INT16_CODES = np.arange(-32768, 32768, dtype=np.int32)
"""Every int16 code in rising order."""


def codes(dtype: np.dtype | type) -> np.ndarray:
    """Returns every code of int8 or int16 in rising order, as int32.

    >>> codes(np.int8)[[0, -1]].tolist()
    [-128, 127]
    """
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
    """Samples a function over the int16 range, for `fixedpoint.lut_lookup`; output zero point 0.

    Interpolating between exact samples errs on one side of a curve. So each sample is moved by half
    of the interpolation error in the middle of its interval.

    Args:
      function: real to real, on arrays of the type of the scales.
      scale, zero_point: of the input.
      output_scale: float32 like `scale`, or both float64 where the kernel computes in double.
      entries: 2^n + 1.

    Returns:
      int16, (entries,).

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
    """Tabulates a function as a machine with few samples computes it: interpolated linearly between
    equally spaced codes, ties rounded upwards.

    >>> square = lambda code: code**2 / 16
    >>> few, every = (sampled(square, np.int8, entries) for entries in (33, 257))
    >>> int(few[128 + 9]), int(every[128 + 9])  # 9^2 / 16 = 5.06, between samples 4 and 16
    (6, 5)

    Args:
      function: float64 codes, up to qmax + 1, to float64 output codes before rounding.
      dtype: int8 or int16, of the input.
      entries: 2^n + 1 samples over the range of `dtype`.
      output: integer type of the result; None: `dtype`.

    Returns:
      One entry per code of `dtype`.
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
    """Makes the two tables of int16 SOFTMAX: exp(x) on [-10, 0], and 1 / (1 + x) on [0, 1].

    Each spans the int16 range, for `fixedpoint.lut_lookup`; outputs are Q0.15.

    Args:
      entries: samples of exp, 2^n + 1; the reciprocal has 513.

    Returns:
      int16 (entries,) and int16 (513,).

    Reference: LiteRT tflite/kernels/activations.cc, `SoftmaxPrepare`.
    """
    span, output = np.float64(65535.0), np.float64(2.0) / np.float64(65535.0)
    exp = interpolation_table(np.exp, np.float64(10.0) / span, 32767, output, entries)
    reciprocal = interpolation_table(
        lambda x: 1.0 / (1.0 + x), np.float64(1.0) / span, -32768, output
    )
    return exp, reciprocal


def softmax_exp(scale: np.float32) -> np.ndarray:
    """Tabulates exp(-scale d) in float32, for d from 0 to 255: (256,), indexed by d.

    Reference: LiteRT optimized/optimized_ops.h, `PopulateSoftmaxLookupTable`.
    """
    # The C library's expf rounds correctly in all but rare cases; NumPy's float32 exp does not.
    x = -scale * np.arange(256, dtype=np.float32)
    return np.exp(x.astype(np.float64)).astype(np.float32)


def logistic_int8(scale: np.float32, zero_point: int) -> np.ndarray:
    """Tabulates LOGISTIC on int8 as LiteRT does: in float32, rounded half away from zero.

    The output has scale 1/256 and zero point -128.

    >>> table = logistic_int8(np.float32(0.1), 0)
    >>> int(table[128]) + 128  # 256 sigmoid(0)
    128

    Reference: LiteRT common.h, `LUTPopulateInt8`; activations.cc, `SigmoidPrepare`.
    """
    x = scale * (INT8_CODES - zero_point).astype(np.float32)
    # The C library's expf rounds correctly in all but rare cases; NumPy's float32 exp does not.
    with np.errstate(over="ignore"):
        exp = np.exp(-x.astype(np.float64)).astype(np.float32)
    y = np.float32(1) / (np.float32(1) + exp)
    return _saturate(fixedpoint.round_half_away(y * np.float32(256)) - np.float32(128), np.int8)


def logistic_xnn(scale: np.float32, zero_point: int) -> np.ndarray:
    """Tabulates LOGISTIC on int8 as XNNPACK does: sigmoid in float64, scaling in float32, rounded
    half to even after the zero point is added.

    The output has scale 1/256 and zero point -128.

    Reference: XNNPACK src/reference/unary-elementwise.cc. That its sigmoid is as precise as float64
      was measured (ai-edge-litert 2.3.0): float32 differs at 3 of a million codes.
    """
    x = scale * (INT8_CODES - zero_point).astype(np.float32)
    with np.errstate(over="ignore"):
        y = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    return _saturate(np.rint(y * np.float32(256) - np.float32(128)), np.int8)


def _logistic_multiplier(scale: np.float32) -> tuple[int, int]:
    """Multiplier and right shift that bring an int16 code to units of 1 / (3 * 2^12).

    Reference: LiteRT activations.cc, `SigmoidPrepare`. Its `CheckedLog2` treats a scale within
      0.07% of 2^-12 as 2^-12.
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
    """Tabulates LOGISTIC on int16: interpolates in `sigmoid_table`, which covers [0, 10.7).

    Negative inputs take the symmetry sigmoid(-x) = 1 - sigmoid(x). Input and output have zero point
    0; the output's scale is 1/32768.

    Args:
      scale: of the input.
      gemmlowp_at_2_12: use gemmlowp's fixed point for an input scale within 0.07% of 2^-12, as the
        optimized kernels do.

    Reference: LiteRT reference/integer_ops/logistic.h, `Logistic` (int16); activations.cc,
      `SigmoidEval`.
    """
    multiplier, shift = _logistic_multiplier(scale)
    if gemmlowp_at_2_12 and (multiplier, shift) == (3, 0):
        return gemmlowp.logistic16(INT16_CODES).astype(np.int16)
    half = 1 << (shift - 1) if shift else 0
    # The kernel's product is an int32, which wraps; its shift is arithmetic.
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
"""Indices of the entries of `sigmoid_table` that lie one above the rounded value."""


@cache
def sigmoid_table() -> np.ndarray:
    """Returns the kernel's 256 values of 2^16 sigmoid(i / 24), int64.

    They are the rounded values, except for 44 entries that lie one above.

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
    """Tabulates SQRT as LiteRT computes it: in float32, truncated.

    LiteRT refuses codes below the zero point; here they give the code of 0.

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
    """Tabulates SQRT in integers: floor(sqrt(v M 2^(shift - 31))), v = code - zero_point.

    The multiplier M 2^(shift - 31) is scale / output_scale^2, rounded to 31 bits; the rest is
    exact. Codes below the zero point give the code of 0.
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
    """Tabulates RSQRT on int8: Newton-Raphson in Q3.28 on code - zero_point.

    The zero point itself gives 127. So do codes below it, which LiteRT refuses. Where
    1 / (sqrt(scale) output_scale) < 2^-12, the kernel shifts right by more than 31 bits, which C++
    leaves undefined. Every result is then below half a code; here it is 0.

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
    """Tabulates RSQRT on int16: 513 samples over the int16 range, interpolated linearly.

    Samples are 128 codes apart. 1 / sqrt(x) is infinite at 0, so results of codes 0 to 127, the
    first interval, mean nothing: they start at about 3/4 of the output's range at any scale. LiteRT
    refuses negative codes; here they give 32767.

    Reference: LiteRT tflite/kernels/elementwise.cc, `GenericPrepare`, `RsqrtEvalQuantizedInt16`.
    """

    def function(x: np.ndarray) -> np.ndarray:
        positive = np.where(x > 0, x, np.float32(1))
        return np.where(x > 0, np.float32(1) / np.sqrt(positive), np.float32(32767) * output_scale)

    table = interpolation_table(function, scale, 0, output_scale)
    y = fixedpoint.lut_lookup(INT16_CODES, table)
    return np.where(INT16_CODES >= 0, y, 32767).astype(np.int16)
