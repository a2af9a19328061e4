"""Constants of the kernels, made once on the host from scales and zero points.

Every real number is rounded here as the C++ does it, in float32 or float64 as written there; the
kernels see integers (and, in `litert_ref`, the float64 factors of FULLY_CONNECTED). What differs
between profiles is read from `sim.numerics.PROFILES`.

Scales are np.float32, zero points ints; those of int16 tensors are 0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim import fixedpoint, gemmlowp, lut
from sim.kernels import (
    AddConstants,
    BatchMatmulConstants,
    FullyConnectedConstants,
    MulConstants,
    QuantizeConstants,
    SoftmaxInt8Constants,
    SoftmaxInt16Constants,
    TableConstants,
)
from sim.numerics import PROFILES, FixedScale, FixedScale64, Profile, make_scale


def prepare_fully_connected(
    profile: Profile,
    dtype: np.dtype | type,
    weights: np.ndarray,
    bias: np.ndarray,
    x_scale: np.float32,
    x_zero_point: int,
    weight_scale: np.ndarray,
    scale: np.float32,
    zero_point: int,
) -> FullyConnectedConstants:
    """Constants of `kernels.fully_connected`.

    The input's zero point (int8) or the 128 of the byte split (int16) meets the weights only
    through their row sums: offset = bias - zero_point rowsum(w), or bias + 128 rowsum(w), equal to
    the kernel's sum modulo 2^32 or 2^64.

    Args:
      dtype: of the activations, int8 or int16.
      weights: (N, K) int8 codes.
      bias: (N,) int32, or int64 (int16 activations only) for a 64-bit accumulator.
      weight_scale: float32, one or (N,).
    """
    narrow = np.dtype(dtype) == np.int8
    row_sum = weights.sum(1, dtype=np.int64)
    offset = bias.astype(np.int64) + (-x_zero_point if narrow else 128) * row_sum
    # acc * double(sx) * double(sw) / double(sy), in this order of the two operations.
    weight_scales = np.broadcast_to(np.asarray(weight_scale, np.float64), bias.shape)
    real = np.float64(x_scale) * weight_scales / np.float64(scale)
    rules = PROFILES[profile]
    rule = rules.fully_connected_wide if bias.dtype == np.int64 else rules.fully_connected
    return FullyConnectedConstants(
        offset.astype(bias.dtype), make_scale(rule, real), _int32(zero_point)
    )


def prepare_batch_matmul(
    dtype: np.dtype | type,
    x_scale: np.float32,
    x_zero_point: int,
    y_scale: np.float32,
    y_zero_point: int,
    scale: np.float32,
    zero_point: int,
) -> BatchMatmulConstants:
    """Constants of `kernels.batch_matmul`: factor double(f32(sx sy)) / double(s) in every profile.

    Args:
      x_zero_point, y_zero_point: of an int16 operand that was widened from int8, those it had.

    Reference: LiteRT kernels/kernel_util.cc, `GetQuantizedConvolutionMultipler`.
    """
    real = np.float64(x_scale * y_scale) / np.float64(scale)
    rule = FixedScale if np.dtype(dtype) == np.int8 else FixedScale64
    return BatchMatmulConstants(
        _int32(x_zero_point), _int32(y_zero_point), make_scale(rule, real), _int32(zero_point)
    )


def prepare_add(
    dtype: np.dtype | type,
    x_scale: np.float32,
    x_zero_point: int,
    y_scale: np.float32,
    y_zero_point: int,
    scale: np.float32,
    zero_point: int,
) -> AddConstants:
    """Constants of `kernels.add`: with t = 2 max(sx, sy), factors sx / t, sy / t and t / (2^L s).

    Reference: LiteRT kernels/add.cc, `Prepare`.
    """
    left = 20 if np.dtype(dtype) == np.int8 else 15
    twice_max = 2.0 * np.float64(max(x_scale, y_scale))
    total = twice_max / np.float64(np.float32(1 << left) * scale)
    multiplier, shift = fixedpoint.quantize_multiplier(
        np.asarray([np.float64(x_scale) / twice_max, np.float64(y_scale) / twice_max, total])
    )
    return AddConstants(
        _int32(x_zero_point), _int32(y_zero_point), multiplier, shift, _int32(zero_point)
    )


def prepare_mul(
    x_scale: np.float32,
    x_zero_point: int,
    y_scale: np.float32,
    y_zero_point: int,
    scale: np.float32,
    zero_point: int,
) -> MulConstants:
    """Constants of `kernels.mul`: factor f32(f32(sx sy) / s).

    Reference: LiteRT kernels/mul.cc, `Prepare`.
    """
    product = make_scale(FixedScale, np.float64(x_scale * y_scale / scale))
    return MulConstants(_int32(x_zero_point), _int32(y_zero_point), product, _int32(zero_point))


def prepare_quantize(
    x_scale: np.float32, x_zero_point: int, scale: np.float32, zero_point: int
) -> QuantizeConstants:
    """Constants of `kernels.quantize`: factor double(sx) / double(s).

    Reference: LiteRT kernels/quantize.cc, `Prepare`.
    """
    real = np.float64(x_scale) / np.float64(scale)
    return QuantizeConstants(_int32(x_zero_point), make_scale(FixedScale, real), _int32(zero_point))


def prepare_softmax_int8(x_scale: np.float32) -> SoftmaxInt8Constants:
    """Constants of `kernels.softmax_int8`: the exponential of every difference to the row's
    maximum.

    Reference: LiteRT internal/quantization_util.cc, `PreprocessSoftmaxScaling`,
      `CalculateInputRadius`.
    """
    real = min(np.float64(x_scale) * 2.0**26, 2.0**31 - 1.0)
    multiplier, shift = fixedpoint.quantize_multiplier(real)
    radius = int(np.floor(31.0 * 2.0**26 / 2.0 ** int(shift)))
    below = np.arange(256, dtype=np.int32)
    difference = fixedpoint.srdhm(-below << shift, multiplier)
    exp = gemmlowp.exp_on_negative_values(difference)
    return SoftmaxInt8Constants(np.where(below <= radius, exp, 0).astype(np.int32))


def prepare_softmax_int16(x_scale: np.float32) -> SoftmaxInt16Constants:
    """Constants of `kernels.softmax_int16`: [-10, 0] is stretched over 65,536 steps, and clipped
    there.

    Reference: LiteRT kernels/activations.cc, `SoftmaxPrepare`; reference/softmax.h,
      `SoftMaxCalculateExp`.
    """
    exp, reciprocal = lut.softmax_tables()
    multiplier, shift = fixedpoint.quantize_multiplier(np.float64(x_scale) / (10.0 / 65535.0))
    below = np.arange(65536, dtype=np.int32)
    difference = fixedpoint.multiply_by_quantized_multiplier(-below, multiplier, shift)
    index = np.clip(difference + np.int32(32767), -32768, 32767)
    return SoftmaxInt16Constants(fixedpoint.lut_lookup(index, exp).astype(np.int16), reciprocal)


Unary = Literal["logistic", "sqrt", "rsqrt"]


def prepare_unary(
    op: Unary,
    profile: Profile,
    dtype: np.dtype | type,
    x_scale: np.float32,
    x_zero_point: int,
    scale: np.float32,
    zero_point: int,
) -> TableConstants:
    """Constants of `kernels.unary`: the op's value at every code of `dtype`.

    LOGISTIC's output is fixed at (1/256, -128) or (1/32768, 0) and does not depend on `scale` and
    `zero_point`.
    """
    narrow = np.dtype(dtype) == np.int8
    match op:
        case "logistic":
            table = (
                lut.logistic_int8(x_scale, x_zero_point) if narrow else lut.logistic_int16(x_scale)
            )
        case "sqrt":
            make = lut.sqrt_float32 if PROFILES[profile].sqrt == "float32" else lut.sqrt_integer
            table = make(x_scale, x_zero_point, scale, zero_point, dtype)
        case "rsqrt" if narrow:
            table = lut.rsqrt_int8(x_scale, x_zero_point, scale, zero_point)
        case "rsqrt":
            table = lut.rsqrt_int16(x_scale, scale)
    return TableConstants(table)


def _int32(value: int) -> np.ndarray:
    return np.asarray(value, np.int32)
