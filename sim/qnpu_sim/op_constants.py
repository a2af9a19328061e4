"""Constants of each kernel, made once on the host from scales and zero points.

Every real number is rounded here, in float32 or float64 as the kernel's C++ does it. The kernels
themselves see integers, and in LiteRT's profiles the factors and tables that LiteRT keeps in
floating point. `qnpu_sim.rounding.Rules` says where profiles differ.

In equations sx, sy and s are the scales of the inputs and the output. f32(..) and f64(..) say in
which precision a product or quotient is rounded.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from qnpu_sim import elementwise, exact_dots, fixedpoint, gelu, gemmlowp, tables, xnnpack
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
from qnpu_sim.rounding import Rules, Scale


class QuantizedType(NamedTuple):
    """Quantization of an activation or input: real = scale (code - zero_point).

    >>> QuantizedType(np.float32(0.5), -3).narrow
    True

    Attributes:
      scale: float32 real units per code, > 0.
      zero_point: the code of real 0; 0 for int16.
      bits: width of a code; up to 8 are held as int8, more as int16.
    """

    scale: np.float32
    zero_point: int = 0
    bits: int = 8

    @property
    def narrow(self) -> bool:
        """Whether the codes are int8."""
        return self.bits <= 8


class Weights(NamedTuple):
    """Weights and bias of a FULLY_CONNECTED.

    Attributes:
      codes: (N, K) int8; zero point 0.
      bias: (N,) int32, or int64 (int16 activations only) for a 64-bit accumulator.
      scale: float32 real units per code, () for the tensor or (N,) per channel.
      bits: width of a weight in the file, 8 or 4.
    """

    codes: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | np.float32
    bits: int = 8


def prepare_fully_connected(
    x: QuantizedType, w: Weights, out: QuantizedType, rules: Rules, *, tight: bool = False
) -> FullyConnectedConstants:
    """Makes the constants of `kernels.fully_connected`.

    The zero point of int8 codes, and the 128 that is left when int16 codes are split into bytes
    (`kernels`), are added to every code of the input. So they contribute a constant per channel,
    which joins the bias:

        offset = bias - zero_point rowsum(w)   (int8)
        offset = bias + 128 rowsum(w)          (int16)

    The accumulator equals the kernel's modulo 2^32 or 2^64.

    Args:
      tight: the sum is not proved to fit `rules.accumulator_bits`.

    Raises:
      UserError: XNNPACK fails at these scales.

    Reference: LiteRT kernels/fully_connected.cc, `Prepare`.
    """
    row_sum = w.codes.sum(1, dtype=np.int64)
    offset = w.bias.astype(np.int64) + (-x.zero_point if x.narrow else 128) * row_sum
    limit = _limit(rules, tight, x.zero_point if x.narrow else 0, w.bias)
    scale, limit = _linear_scale(x, w, out, rules, limit)
    dot = exact_dots.fastest(w.codes) if rules.floats else exact_dots.INT8
    offset = offset.astype(w.bias.dtype)
    return FullyConnectedConstants(offset, scale, _int32(out.zero_point), limit, dot)


def _linear_scale(
    x: QuantizedType, w: Weights, out: QuantizedType, rules: Rules, limit: Limit
) -> tuple[Scale, Limit]:
    """Rescaling of a FULLY_CONNECTED by sx sw / s, and the limit of its accumulator.

    The product sx sw is float64, or float32 where `rules.one_scale` says so.
    """
    weight_scales = np.broadcast_to(np.asarray(w.scale, np.float32), w.bias.shape)
    scales = (x.scale, weight_scales, out.scale)
    input_size = w.codes.shape[1]
    if x.narrow and rules.xnnpack and xnnpack.takes_linear(*scales, w.bits, input_size=input_size):
        product = xnnpack.product_scale(*scales)
        xnnpack.check_linear(product)
        return product, Wrap(xnnpack.INT4_BITS) if w.bits <= 4 else limit
    wide = w.bias.dtype == np.int64 or isinstance(limit, Saturate)
    single = np.size(w.scale) == 1 and not wide and rules.one_scale == "float32"
    real = x.scale * weight_scales if single else np.float64(x.scale) * weight_scales
    rule = rules.linear8 if x.narrow else rules.linear16
    return (rules.linear16_wide if wide else rule)(real.astype(np.float64) / out.scale), limit


def _limit(rules: Rules, tight: bool, x_zero_point: int, start: np.ndarray) -> Limit:
    """Limit of an accumulator; None where its sum is proved to fit.

    Args:
      start: the accumulator before the first product.
    """
    if not tight:
        return None
    assert rules.accumulator_bits is not None
    if rules.overflow == "saturate":
        return Saturate(_int32(x_zero_point), start, rules.accumulator_bits)
    return Wrap(rules.accumulator_bits)


def prepare_batch_matmul(
    x: QuantizedType, y: QuantizedType, out: QuantizedType, rules: Rules, *, tight: bool = False
) -> BatchMatmulConstants:
    """Makes the constants of `kernels.batch_matmul`: factor f64(f32(sx sy) / s), XNNPACK's
    f32(f32(sx sy) / s).

    Args:
      x, y: an int16 operand that was widened from int8 is given with 16 bits, but with the scale
        and zero point of its int8 codes, which the kernel multiplies.
      tight: the sum is not proved to fit `rules.accumulator_bits`.

    Raises:
      UserError: XNNPACK fails at these scales, here and in the functions below.

    Reference: LiteRT kernels/kernel_util.cc, `GetQuantizedConvolutionMultipler`.
    """
    limit = _limit(rules, tight, x.zero_point, np.zeros(1, np.int32))
    scales = (x.scale, y.scale, out.scale)
    if x.narrow and rules.xnnpack and xnnpack.takes_batch_matmul(*scales, y.zero_point):
        made = xnnpack.product_scale(*scales)
    else:
        wide = not x.narrow or isinstance(limit, Saturate)
        real = np.float64(x.scale * y.scale) / np.float64(out.scale)
        made = (rules.matmul16 if wide else rules.matmul8)(real)
    zero_points = (_int32(x.zero_point), _int32(y.zero_point))
    return BatchMatmulConstants(*zero_points, made, _int32(out.zero_point), limit)


def prepare_add(
    x: QuantizedType, y: QuantizedType, out: QuantizedType, rules: Rules
) -> elementwise.Add:
    """Makes the constants of `elementwise.add`.

    With t = 2 max(sx, sy), the factors of the inputs are sx / t and sy / t, and the sum's is
    t / (2^L s); L is 20 for int8 and 15 for int16.

    Reference: LiteRT kernels/add.cc, `Prepare`.
    """
    zero_points = (_int32(x.zero_point), _int32(y.zero_point))
    scales = (x.scale, y.scale, out.scale)
    if x.narrow and rules.xnnpack and xnnpack.takes_add(*scales):
        return elementwise.XnnAdd(
            *zero_points, *xnnpack.add_factors(*scales), _int32(out.zero_point)
        )
    left = 20 if x.narrow else 15
    twice_max = 2.0 * np.float64(max(x.scale, y.scale))
    total = twice_max / np.float64(np.float32(1 << left) * out.scale)
    x_factor, y_factor = (rules.elementwise(np.float64(t.scale) / twice_max) for t in (x, y))
    factors = (x_factor, y_factor, rules.elementwise(total))
    made = AddConstants(zero_points[0], zero_points[1], *factors, _int32(out.zero_point))
    return elementwise.LaneAdd(made) if rules.lanes else made


def prepare_mul(
    x: QuantizedType, y: QuantizedType, out: QuantizedType, rules: Rules
) -> elementwise.Mul:
    """Makes the constants of `elementwise.mul`: factor f32(f32(sx sy) / s).

    Reference: LiteRT kernels/mul.cc, `Prepare`.
    """
    scales = (x.scale, y.scale, out.scale)
    taken = x.narrow and rules.xnnpack and xnnpack.takes_mul(*scales)
    if taken:
        product = xnnpack.product_scale(*scales)
    else:
        product = rules.elementwise(np.float64(x.scale * y.scale / out.scale))
    zero_points = (_int32(x.zero_point), _int32(y.zero_point))
    made = MulConstants(*zero_points, product, _int32(out.zero_point))
    return elementwise.LaneMul(made) if x.narrow and rules.lanes and not taken else made


def prepare_quantize(x: QuantizedType, out: QuantizedType, rules: Rules) -> elementwise.Quantize:
    """Makes the constants of `elementwise.quantize`: factor f64(sx / s).

    Args:
      out: may have another width than x.

    Reference: LiteRT kernels/quantize.cc, `Prepare`.
    """
    narrow = x.narrow and out.narrow
    zero_points = _int32(x.zero_point), _int32(out.zero_point)
    if narrow and rules.xnnpack and xnnpack.takes_quantize(x.scale, out.scale):
        factor = xnnpack.quantize_factor(x.scale, out.scale)
        return elementwise.XnnQuantize(zero_points[0], factor, zero_points[1])
    made = rules.elementwise(np.float64(x.scale) / np.float64(out.scale))
    constants = QuantizeConstants(zero_points[0], made, zero_points[1])
    return elementwise.LaneQuantize(constants) if narrow and rules.lanes else constants


def prepare_softmax_int8(
    x_scale: np.float32, rules: Rules
) -> SoftmaxInt8Constants | SoftmaxFloatConstants:
    """Makes the constants of `kernels.softmax_int8`: exp(-sx d) for d = row maximum - code.

    In fixed point, -sx d is made as Q5.26 by SRDHM with the multiplier of sx 2^26. A difference
    above the input radius, where Q5.26 would overflow, gives 0.

    Args:
      x_scale: of the logits.

    Reference: LiteRT internal/quantization_util.cc, `PreprocessSoftmaxScaling`,
      `CalculateInputRadius`; internal/reference/softmax.h, `Softmax` (int8).
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


def prepare_softmax_int16(x_scale: np.float32, rules: Rules) -> SoftmaxInt16Constants:
    """Makes the constants of `kernels.softmax_int16`: exp(-sx d) for d = row maximum - code.

    The interval [-10, 0] is stretched over the int16 range: index = 32767 - d sx 65535 / 10,
    clipped at -32768. The table of exp is interpolated there.

    Args:
      x_scale: of the logits.

    Reference: LiteRT kernels/activations.cc, `SoftmaxPrepare`; reference/softmax.h,
      `SoftMaxCalculateExp`.
    """
    exp, reciprocal = tables.softmax_tables(rules.table_entries or 513)
    multiplier, shift = fixedpoint.quantize_multiplier(np.float64(x_scale) / (10.0 / 65535.0))
    below = np.arange(65536, dtype=np.int32)
    difference = fixedpoint.multiply_by_quantized_multiplier(-below, multiplier, shift)
    index = np.clip(difference + np.int32(32767), -32768, 32767)
    return SoftmaxInt16Constants(fixedpoint.lut_lookup(index, exp).astype(np.int16), reciprocal)


Unary = Literal["logistic", "gelu", "sqrt", "rsqrt"]
"""An op of one input that is a look-up."""


def prepare_unary(op: Unary, x: QuantizedType, out: QuantizedType, rules: Rules) -> TableConstants:
    """Makes the constants of `kernels.unary`: the table of the op's output for every code of x.

    Args:
      out: of x's width. LOGISTIC's output has a fixed scale and zero point, (1/256, -128) or
        (1/32768, 0), and does not depend on it.

    Reference: see the functions of `qnpu_sim.tables` and `qnpu_sim.gelu`.
    """
    qparams = (x.scale, x.zero_point)
    dtype = np.int8 if x.narrow else np.int16
    match op:
        case "sqrt":
            make = tables.sqrt_float32 if rules.sqrt == "float32" else tables.sqrt_integer
            table = make(*qparams, out.scale, out.zero_point, dtype)
        case "logistic" | "gelu" | "rsqrt" if rules.table_entries is not None:
            table = _sampled(op, x, out, rules.table_entries)
        case "logistic" if x.narrow:
            taken = rules.xnnpack and xnnpack.takes_logistic(x.scale)
            make = tables.logistic_xnn if taken else tables.logistic_int8
            table = make(*qparams)
        case "logistic":
            table = tables.logistic_int16(x.scale, gemmlowp_at_2_12=rules.lanes)
        case "gelu" if x.narrow:
            table = gelu.gelu_int8(*qparams, out.scale, out.zero_point)
        case "gelu":
            table = gelu.gelu_int16(x.scale, out.scale)
        case "rsqrt" if x.narrow:
            table = tables.rsqrt_int8(*qparams, out.scale, out.zero_point)
        case "rsqrt":
            table = tables.rsqrt_int16(x.scale, out.scale)
    return TableConstants(table)


def _sampled(
    op: Literal["logistic", "gelu", "rsqrt"], x: QuantizedType, out: QuantizedType, entries: int
) -> np.ndarray:
    """Table of LOGISTIC, GELU or RSQRT from `entries` samples.

    RSQRT of codes at or below the zero point gives the largest output code.
    """
    x_scale, scale, zero_point = float(x.scale), float(out.scale), out.zero_point
    if op == "logistic":
        scale, zero_point = (2.0**-8, -128) if x.narrow else (2.0**-15, 0)

    def function(code: np.ndarray) -> np.ndarray:
        real = (code - x.zero_point) * x_scale
        if op == "logistic":
            y = 1 / (1 + np.exp(-np.clip(real, -700, 700)))
        elif op == "gelu":
            y = gelu.gelu_tanh(real, np.tanh)
        else:
            y = np.where(real > 0, 1 / np.sqrt(np.where(real > 0, real, 1)), 2**16 * scale)
        return y / scale + zero_point

    return tables.sampled(function, np.int8 if x.narrow else np.int16, entries)


def _int32(value: int) -> np.ndarray:
    return np.asarray(value, np.int32)
