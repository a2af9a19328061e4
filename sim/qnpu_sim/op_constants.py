"""Constants of the kernels, made once on the host from scales and zero points.

Every real number is rounded here as the C++ does it, in float32 or float64 as written there; the
kernels see integers (and, in LiteRT's profiles, the factors and tables that it has in floating
point). What differs between profiles is read from `qnpu_sim.rounding.Rules`.

Scales are np.float32, zero points ints; those of int16 tensors are 0.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from qnpu_sim import elementwise, exact_dots, fixedpoint, gemmlowp, tables, xnnpack
from qnpu_sim.elementwise import AddConstants, MulConstants, QuantizeConstants
from qnpu_sim.kernels import (
    BatchMatmulConstants,
    FullyConnectedConstants,
    SoftmaxFloatConstants,
    SoftmaxInt8Constants,
    SoftmaxInt16Constants,
    TableConstants,
)
from qnpu_sim.narrow_accumulators import Limit, Saturate, Wrap
from qnpu_sim.rounding import Rules


def prepare_fully_connected(
    rules: Rules,
    dtype: np.dtype | type,
    weights: np.ndarray,
    bias: np.ndarray,
    x_scale: np.float32,
    x_zero_point: int,
    weight_scale: np.ndarray | np.float32,
    scale: np.float32,
    zero_point: int,
    *,
    weight_bits: int = 8,
    tight: bool = False,
) -> FullyConnectedConstants:
    """Constants of `kernels.fully_connected`.

    The input's zero point (int8) or the 128 of the byte split (int16) meets the weights only
    through their row sums: offset = bias - zero_point rowsum(w), or bias + 128 rowsum(w), equal to
    the kernel's sum modulo 2^32 or 2^64.

    Args:
      dtype: of the activations, int8 or int16.
      weights: (N, K) int8 codes.
      bias: (N,) int32, or int64 (int16 activations only) for a 64-bit accumulator.
      weight_scale: float32, one or (N,): their products with x_scale are of float64, or by
        `rules.one_scale`.
      weight_bits: of the codes in the file.
      tight: the sum is not proved to fit `rules.accumulator_bits`.

    Raises:
      UserError: the profile cannot represent the op.
    """
    narrow = np.dtype(dtype) == np.int8
    row_sum = weights.sum(1, dtype=np.int64)
    offset = bias.astype(np.int64) + (-x_zero_point if narrow else 128) * row_sum
    weight_scales = np.broadcast_to(np.asarray(weight_scale, np.float32), bias.shape)
    limit = _limit(rules, tight, x_zero_point if narrow else 0, bias)
    scales = (x_scale, weight_scales, scale)
    if (
        narrow
        and rules.xnnpack
        and xnnpack.takes_linear(*scales, weight_bits, input_size=weights.shape[1])
    ):
        made = xnnpack.product_scale(*scales)
        xnnpack.check_linear(made)
        limit = Wrap(xnnpack.INT4_BITS) if weight_bits <= 4 else limit
    else:
        wide = bias.dtype == np.int64 or isinstance(limit, Saturate)
        single = np.size(weight_scale) == 1 and not wide and rules.one_scale == "float32"
        product = x_scale * weight_scales if single else np.float64(x_scale) * weight_scales
        rule = rules.linear8 if narrow else rules.linear16
        made = (rules.linear16_wide if wide else rule)(product.astype(np.float64) / scale)
    dot = exact_dots.fastest(weights) if rules.floats else exact_dots.INT8
    offset = offset.astype(bias.dtype)
    return FullyConnectedConstants(offset, made, _int32(zero_point), limit, dot)


def _limit(rules: Rules, tight: bool, x_zero_point: int, start: np.ndarray) -> Limit:
    if not tight:
        return None
    assert rules.accumulator_bits is not None
    if rules.overflow == "saturate":
        return Saturate(_int32(x_zero_point), start, rules.accumulator_bits)
    return Wrap(rules.accumulator_bits)


def prepare_batch_matmul(
    rules: Rules,
    dtype: np.dtype | type,
    x_scale: np.float32,
    x_zero_point: int,
    y_scale: np.float32,
    y_zero_point: int,
    scale: np.float32,
    zero_point: int,
    *,
    tight: bool = False,
) -> BatchMatmulConstants:
    """Constants of `kernels.batch_matmul`: factor double(f32(sx sy)) / double(s) in every profile
    but XNNPACK's.

    Args:
      x_zero_point, y_zero_point: of an int16 operand that was widened from int8, those it had.
      tight: the sum is not proved to fit `rules.accumulator_bits`.

    Reference: LiteRT kernels/kernel_util.cc, `GetQuantizedConvolutionMultipler`.
    """
    narrow = np.dtype(dtype) == np.int8
    limit = _limit(rules, tight, x_zero_point, np.zeros(1, np.int32))
    scales = (x_scale, y_scale, scale)
    if narrow and rules.xnnpack and xnnpack.takes_batch_matmul(*scales, y_zero_point):
        made = xnnpack.product_scale(*scales)
    else:
        wide = not narrow or isinstance(limit, Saturate)
        real = np.float64(x_scale * y_scale) / np.float64(scale)
        made = (rules.matmul16 if wide else rules.matmul8)(real)
    zero_points = (_int32(x_zero_point), _int32(y_zero_point))
    return BatchMatmulConstants(*zero_points, made, _int32(zero_point), limit)


def prepare_add(
    rules: Rules,
    dtype: np.dtype | type,
    x_scale: np.float32,
    x_zero_point: int,
    y_scale: np.float32,
    y_zero_point: int,
    scale: np.float32,
    zero_point: int,
) -> elementwise.Add:
    """Constants of `elementwise.add`: with t = 2 max(sx, sy), factors sx / t, sy / t and
    t / (2^L s).

    Reference: LiteRT kernels/add.cc, `Prepare`.
    """
    narrow = np.dtype(dtype) == np.int8
    zero_points = (_int32(x_zero_point), _int32(y_zero_point))
    if narrow and rules.xnnpack and xnnpack.takes_add(x_scale, y_scale, scale):
        factors = xnnpack.add_factors(x_scale, y_scale, scale)
        return elementwise.XnnAdd(*zero_points, *factors, _int32(zero_point))
    left = 20 if narrow else 15
    twice_max = 2.0 * np.float64(max(x_scale, y_scale))
    total = twice_max / np.float64(np.float32(1 << left) * scale)
    x, y = (rules.elementwise(np.float64(s) / twice_max) for s in (x_scale, y_scale))
    made = AddConstants(*zero_points, x, y, rules.elementwise(total), _int32(zero_point))
    return elementwise.LaneAdd(made) if rules.lanes else made


def prepare_mul(
    rules: Rules,
    dtype: np.dtype | type,
    x_scale: np.float32,
    x_zero_point: int,
    y_scale: np.float32,
    y_zero_point: int,
    scale: np.float32,
    zero_point: int,
) -> elementwise.Mul:
    """Constants of `elementwise.mul`: factor f32(f32(sx sy) / s).

    Reference: LiteRT kernels/mul.cc, `Prepare`.
    """
    narrow = np.dtype(dtype) == np.int8
    taken = narrow and rules.xnnpack and xnnpack.takes_mul(x_scale, y_scale, scale)
    if taken:
        product = xnnpack.product_scale(x_scale, y_scale, scale)
    else:
        product = rules.elementwise(np.float64(x_scale * y_scale / scale))
    zero_points = (_int32(x_zero_point), _int32(y_zero_point))
    made = MulConstants(*zero_points, product, _int32(zero_point))
    return elementwise.LaneMul(made) if narrow and rules.lanes and not taken else made


def prepare_quantize(
    rules: Rules,
    dtype: np.dtype | type,
    output: np.dtype | type,
    x_scale: np.float32,
    x_zero_point: int,
    scale: np.float32,
    zero_point: int,
) -> elementwise.Quantize:
    """Constants of `elementwise.quantize`: factor double(sx) / double(s).

    Reference: LiteRT kernels/quantize.cc, `Prepare`.
    """
    narrow = np.dtype(dtype) == np.dtype(output) == np.int8
    zero_points = _int32(x_zero_point), _int32(zero_point)
    if narrow and rules.xnnpack and xnnpack.takes_quantize(x_scale, scale):
        factor = xnnpack.quantize_factor(x_scale, scale)
        return elementwise.XnnQuantize(zero_points[0], factor, zero_points[1])
    made = rules.elementwise(np.float64(x_scale) / np.float64(scale))
    constants = QuantizeConstants(zero_points[0], made, zero_points[1])
    return elementwise.LaneQuantize(constants) if narrow and rules.lanes else constants


def prepare_softmax_int8(
    rules: Rules, x_scale: np.float32
) -> SoftmaxInt8Constants | SoftmaxFloatConstants:
    """Constants of `kernels.softmax_int8`: the exponential of every difference to the row's
    maximum.

    Reference: LiteRT internal/quantization_util.cc, `PreprocessSoftmaxScaling`,
      `CalculateInputRadius`.
    """
    if rules.softmax8 == "float32":
        return SoftmaxFloatConstants(tables.softmax_exp(x_scale))
    if rules.table_entries is not None:

        def exp(code: np.ndarray) -> np.ndarray:
            return np.exp(-np.float64(x_scale) * (code + 128)) * 2.0**31

        return SoftmaxInt8Constants(tables.sampled(exp, np.int8, rules.table_entries, np.int32))
    real = min(np.float64(x_scale) * 2.0**26, 2.0**31 - 1.0)
    multiplier, shift = fixedpoint.quantize_multiplier(real)
    radius = int(np.floor(31.0 * 2.0**26 / 2.0 ** int(shift)))
    below = np.arange(256, dtype=np.int32)
    difference = fixedpoint.srdhm(-below << shift, multiplier)
    exponential = gemmlowp.exp_on_negative_values(difference)
    return SoftmaxInt8Constants(np.where(below <= radius, exponential, 0).astype(np.int32))


def prepare_softmax_int16(rules: Rules, x_scale: np.float32) -> SoftmaxInt16Constants:
    """Constants of `kernels.softmax_int16`: [-10, 0] is stretched over 65,536 steps, and clipped
    there.

    Reference: LiteRT kernels/activations.cc, `SoftmaxPrepare`; reference/softmax.h,
      `SoftMaxCalculateExp`.
    """
    exp, reciprocal = tables.softmax_tables(rules.table_entries or 513)
    multiplier, shift = fixedpoint.quantize_multiplier(np.float64(x_scale) / (10.0 / 65535.0))
    below = np.arange(65536, dtype=np.int32)
    difference = fixedpoint.multiply_by_quantized_multiplier(-below, multiplier, shift)
    index = np.clip(difference + np.int32(32767), -32768, 32767)
    return SoftmaxInt16Constants(fixedpoint.lut_lookup(index, exp).astype(np.int16), reciprocal)


Unary = Literal["logistic", "sqrt", "rsqrt"]


def prepare_unary(
    op: Unary,
    rules: Rules,
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
    entries = rules.table_entries
    match op:
        case "sqrt":
            make = tables.sqrt_float32 if rules.sqrt == "float32" else tables.sqrt_integer
            table = make(x_scale, x_zero_point, scale, zero_point, dtype)
        case "logistic" | "rsqrt" if entries is not None:
            output = (float(scale), zero_point)
            if op == "logistic":
                output = (2.0**-8, -128) if narrow else (2.0**-15, 0)
            table = _sampled(op, dtype, entries, float(x_scale), x_zero_point, *output)
        case "logistic" if narrow:
            taken = rules.xnnpack and xnnpack.takes_logistic(x_scale)
            make = tables.logistic_xnn if taken else tables.logistic_int8
            table = make(x_scale, x_zero_point)
        case "logistic":
            table = tables.logistic_int16(x_scale, gemmlowp_at_2_12=rules.lanes)
        case "rsqrt" if narrow:
            table = tables.rsqrt_int8(x_scale, x_zero_point, scale, zero_point)
        case "rsqrt":
            table = tables.rsqrt_int16(x_scale, scale)
    return TableConstants(table)


def _sampled(
    op: Literal["logistic", "rsqrt"],
    dtype: np.dtype | type,
    entries: int,
    x_scale: float,
    x_zero_point: int,
    scale: float,
    zero_point: int,
) -> np.ndarray:
    """LOGISTIC or RSQRT in so many samples; codes at or below the zero point of RSQRT give its
    largest."""

    def function(code: np.ndarray) -> np.ndarray:
        x = (code - x_zero_point) * x_scale
        if op == "logistic":
            y = 1 / (1 + np.exp(-np.clip(x, -700, 700)))
        else:
            y = np.where(x > 0, 1 / np.sqrt(np.where(x > 0, x, 1)), 2**16 * scale)
        return y / scale + zero_point

    return tables.sampled(function, dtype, entries)


def _int32(value: int) -> np.ndarray:
    return np.asarray(value, np.int32)
