"""Kernels: one pure function per op, on arrays of integer codes.

A kernel takes codes and a NamedTuple of constants, which `qnpu_sim.op_constants` makes from scales
and zero points. Constants are arrays, so one jitted kernel serves every layer of equal shapes.
Static are only dtypes, shapes and keyword arguments. All functions can be jitted, vmapped and
scanned. Call them inside `with jax.enable_x64():`; without 64-bit integers they raise.

Accumulators are 32 bits wide and wrap, as in LiteRT, unless a function says otherwise. int8 arrays
are multiplied by exact dots (`qnpu_sim.exact_dots`). An int16 operand is split into two of them:

    x = 256 high + low + 128,   x w^T = 256 (high w^T) + low w^T + 128 rowsum(w)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qnpu_jax.graph import WIDENING
from qnpu_sim.elementwise import Leaf
from qnpu_sim.exact_dots import INT8, Dot, dot
from qnpu_sim.fixedpoint import Codes, lut_lookup, rounding_divide_by_pot, saturate, srdhm, wide
from qnpu_sim.gemmlowp import one_over_one_plus_x
from qnpu_sim.narrow_accumulators import Limit, Saturate, Wrap, saturating_sum, wrap
from qnpu_sim.rounding import Scale, rescale


class FullyConnectedConstants(NamedTuple):
    """Constants of `fully_connected`.

    Attributes:
      offset: (N,) the bias, minus zero_point rowsum(w) (int8) or plus 128 rowsum(w) (int16). int32
        for an accumulator of 32 bits, int64 for one of 64.
      scale: of the accumulator to the output.
      zero_point: of the output.
      limit: of an accumulator that may be too narrow.
      dot: instructions of the product.
    """

    offset: Leaf
    scale: Scale
    zero_point: Leaf
    limit: Limit = None
    dot: Dot = INT8


class BatchMatmulConstants(NamedTuple):
    """Constants of `batch_matmul`: zero points of inputs and output (int32 scalars), the rescaling
    of the accumulator, and the limit of one that may be too narrow."""

    x_zero_point: Leaf
    y_zero_point: Leaf
    scale: Scale
    zero_point: Leaf
    limit: Limit = None


class SoftmaxInt8Constants(NamedTuple):
    """exp: (256,) exp(-scale d) as Q0.31, indexed by d = row maximum - code; 0 where the kernel
    drops the term."""

    exp: Leaf


class SoftmaxFloatConstants(NamedTuple):
    """exp: (256,) exp(-scale d) as float32, indexed by d = row maximum - code."""

    exp: Leaf


class SoftmaxInt16Constants(NamedTuple):
    """Constants of `softmax_int16`.

    Attributes:
      exp: (65536,) exp(-scale d) as Q0.15, indexed by d = row maximum - code.
      reciprocal: (513,) 1 / (1 + x) on [0, 1] as Q0.15, for `lut_lookup`.
    """

    exp: Leaf
    reciprocal: Leaf


class TableConstants(NamedTuple):
    """table: (256,) or (65536,) output codes, indexed by input code - qmin."""

    table: Leaf


def fully_connected(x: Array, w: Array, c: FullyConnectedConstants) -> Array:
    """Multiplies by constant weights: y = clip(rescale(x w^T + offset) + zero_point).

    Args:
      x: (..., K) int8 or int16 codes.
      w: (N, K) int8 codes; int4 weights are int8 in [-8, 7].
      c: from `prepare_fully_connected`. An int64 offset makes the accumulator 64 bits wide (int16
        only).

    Returns:
      (..., N) codes of x's type.

    Reference: LiteRT reference/integer_ops/fully_connected.h, `FullyConnectedPerChannel`.
    """
    offset = _row(c.offset, x.ndim)
    if isinstance(c.limit, Saturate):
        rows = _less(x, c.limit.x_zero_point).reshape(1, -1, x.shape[-1])
        acc = saturating_sum(rows, w.T[None], c.limit).reshape(*x.shape[:-1], w.shape[0])
    elif x.dtype == jnp.int8:
        acc = dot(x, w, (((x.ndim - 1,), (1,)), ((), ())), c.dot) + offset
    else:
        # One dot for both halves of x reads the weights once.
        both = dot(jnp.stack(_bytes(x)), w, (((x.ndim,), (1,)), ((), ())), c.dot)
        both = both.astype(offset.dtype)
        acc = (both[0] << jnp.asarray(8, offset.dtype)) + both[1] + offset
    if isinstance(c.limit, Wrap):
        acc = wrap(acc, c.limit.bits)
    return codes_of_sums(acc, c, x.dtype)


@dataclass(frozen=True)
class OperandFacts:
    """Facts about the operands of a BATCH_MATMUL that are known when it is compiled. They save work
    and change no bit.

    Attributes:
      x_is_byte, y_is_byte: the int16 operand was widened from int8, code by code:
        wide = WIDENING (code - zero_point). So wide / WIDENING + zero_point, with the zero point in
        the constants, is int8 again, and one int8 dot replaces two.
      y_is_symmetric: the constants' y_zero_point is 0.
    """

    x_is_byte: bool = False
    y_is_byte: bool = False
    y_is_symmetric: bool = False


NO_FACTS = OperandFacts()
"""Nothing is known."""


def batch_matmul(
    x: Array,
    y: Array,
    c: BatchMatmulConstants,
    *,
    adj_y: bool = False,
    facts: OperandFacts = NO_FACTS,
) -> Array:
    """Multiplies two computed operands: z = clip(rescale((x - zx) (y - zy)) + zero_point).

    The product is a matrix product, batch by batch. int8 accumulates in 32 bits and wraps; int16,
    whose zero points are 0, accumulates in 64 bits.

    Args:
      x: (B, M, K) int8 or int16 codes.
      y: (B, K, N) codes, or (B, N, K) with adj_y; of x's type.
      c: from `prepare_batch_matmul`.
      adj_y: y is transposed.
      facts: known properties of the operands.

    Returns:
      (B, M, N) codes of x's type.

    Reference: LiteRT reference/batch_matmul.h, `BatchMatMul` (FullyConnectedParams).
    """
    k_axis = 2 if adj_y else 1
    # |code - zero_point| <= 255, so a sum of K products of bytes is at most 255^2 K.
    small = facts.x_is_byte and facts.y_is_byte and x.shape[2] * 255**2 < 2**31
    if isinstance(c.limit, Saturate):
        y_real = _less(y.swapaxes(1, 2) if adj_y else y, c.y_zero_point)
        acc = saturating_sum(_less(x, c.x_zero_point), y_real, c.limit)
    elif x.dtype == jnp.int16 and x.shape[1] == y.shape[3 - k_axis] == 1:
        acc = _row_products(
            x // WIDENING if facts.x_is_byte else x, y // WIDENING if facts.y_is_byte else y
        )
    else:
        acc = _matmul(
            _digits(x, c.x_zero_point, facts.x_is_byte),
            _digits(y, None if facts.y_is_symmetric else c.y_zero_point, facts.y_is_byte),
            k_axis,
            jnp.int32 if x.dtype == jnp.int8 or small else jnp.int64,
        )
    if isinstance(c.limit, Wrap):
        acc = wrap(acc, c.limit.bits)
    return codes_of_sums(acc, c, x.dtype)


def codes_of_sums(
    acc: Array, c: FullyConnectedConstants | BatchMatmulConstants, dtype: np.dtype | type
) -> Array:
    """Brings accumulators to output codes: clip(rescale(acc) + zero_point), as `dtype`."""
    return saturate(rescale(acc, c.scale) + jnp.asarray(c.zero_point), dtype)


def _less(x: Array, zero_point: Leaf) -> Array:
    return x.astype(jnp.int32) - jnp.asarray(zero_point)


def _row_products(x: Array, y: Array) -> Array:
    """Sums products of (B, 1, K) and K values per batch, as int64.

    `dot_general` is slow for results of 1 x 1.
    """
    b, _, k = x.shape
    return jnp.sum(wide(x.reshape(b, k)) * wide(y.reshape(b, k)), 1)[:, None, None]


class _Digits(NamedTuple):
    """An operand minus its zero point, as int8 arrays: sum of weight * array over `terms`, plus
    `rest` (None: 0)."""

    terms: list[tuple[int, Array]]
    rest: Array | None


def _digits(x: Array, zero_point: Leaf | None, is_byte: bool) -> _Digits:
    """Splits an operand into int8 arrays: one for int8 codes and for those widened from int8, two
    for other int16 codes. A zero point of None is 0."""
    if x.dtype == jnp.int16 and not is_byte:
        high, low = _bytes(x)
        return _Digits([(256, high), (1, low)], jnp.int32(128))
    if zero_point is None:
        codes = x if x.dtype == jnp.int8 else (x // WIDENING).astype(jnp.int8)
        return _Digits([(1, codes)], None)
    zero = _row(zero_point, 0)
    codes = x if x.dtype == jnp.int8 else (x // WIDENING + zero.astype(jnp.int16)).astype(jnp.int8)
    return _Digits([(1, codes)], -zero)


def _matmul(x: _Digits, y: _Digits, k_axis: int, dtype: type) -> Array:
    """Matrix product of two operands over the axis K, as int32 (wraps) or int64.

    With x = X + a and y = Y + b, where X and Y are the weighted int8 arrays and a and b the rests:

        sum_k x y = sum_k X Y + a sum_k Y + b (sum_k X + K a)
    """

    def weighted(parts: list[tuple[int, Array]]) -> Array:
        terms = (jnp.asarray(weight, dtype) * part.astype(dtype) for weight, part in parts)
        return sum(terms, start=jnp.zeros((), dtype))

    def total(digits: _Digits, axis: int) -> Array:
        return weighted([(w, jnp.sum(codes, axis, dtype=jnp.int32)) for w, codes in digits.terms])

    assert x.rest is not None  # only y can be known to be symmetric
    dims = (((2,), (k_axis,)), ((0,), (0,)))
    products = [(v * w, dot(p, q, dims)) for v, p in x.terms for w, q in y.terms]
    acc = weighted(products) + x.rest.astype(dtype) * total(y, k_axis)[:, None, :]
    if y.rest is None:
        return acc
    size = jnp.asarray(x.terms[0][1].shape[2], dtype)
    return acc + y.rest.astype(dtype) * (total(x, 2) + size * x.rest.astype(dtype))[:, :, None]


def _bytes(x: Array) -> tuple[Array, Array]:
    """Splits int16 into two int8: x = 256 high + low + 128."""
    high = x >> np.int16(8)
    return high.astype(jnp.int8), ((x & np.int16(255)) - np.int16(128)).astype(jnp.int8)


def _row(leaf: Leaf, ndim: int) -> Array:
    """Adds axes in front of a vector, up to `ndim` dimensions; a scalar stays one."""
    array = jnp.asarray(leaf)
    return array.reshape((1,) * (ndim - array.ndim) + array.shape) if array.ndim else array


def softmax_int8(x: Array, c: SoftmaxInt8Constants | SoftmaxFloatConstants) -> Array:
    """SOFTMAX on int8: exp(x) / sum exp(x) over the last axis.

    In fixed point: exp is Q0.31, the sum Q12.19, written 2^k (1 + a) with a in [0, 1). The
    reciprocal 1 / (1 + a) is by Newton-Raphson, and a shift applies 2^-k.

    LiteRT aborts where the sum of exp reaches 512 (512 nearly equal logits). No probability is then
    above half a code; here all are 0.

    Args:
      x: (..., T) int8 codes, T < 4096: the sum of more may wrap.
      c: from `prepare_softmax_int8`; its type chooses fixed point or float32.

    Returns:
      (..., T) int8 at scale 1/256 and zero point -128.

    Reference: LiteRT reference/softmax.h, `Softmax` (int8), common.h, `GetReciprocal`.
    """
    below = jnp.max(x, -1, keepdims=True).astype(jnp.int32) - x.astype(jnp.int32)
    exp = _lookup(c.exp, below)
    if isinstance(c, SoftmaxFloatConstants):
        return _softmax_float(exp)
    total = jnp.sum(rounding_divide_by_pot(exp, np.int32(12)), -1, keepdims=True, dtype=jnp.int32)
    headroom = jax.lax.clz(total)
    mantissa = (total << headroom) ^ np.int32(-(2**31))  # a as Q0.31: the leading bit is removed
    reciprocal = one_over_one_plus_x(mantissa)
    exponent = np.int32(12 + 31 - 8) - headroom
    y = rounding_divide_by_pot(srdhm(exp, reciprocal), jnp.minimum(exponent, np.int32(31)))
    y = jnp.where(exponent > np.int32(31), np.int32(0), y)
    return saturate(y - np.int32(128), jnp.int8)


def _softmax_float(exp: Array) -> Array:
    """SOFTMAX on int8 in float32: round_half_away(exp (1 / (sum / 256))) - 128.

    float32 sums depend on their order; the kernel's is from left to right.

    Reference: LiteRT optimized/optimized_ops.h, `Softmax` (int8, with a table of exp).
    """
    total = jax.lax.fori_loop(
        0,
        exp.shape[-1],
        lambda i, total: total + jax.lax.dynamic_index_in_dim(exp, i, -1, keepdims=False),
        jnp.zeros(exp.shape[:-1], jnp.float32),
    )
    inverse = np.float32(1) / (total * np.float32(1 / 256))
    y = jax.lax.round(exp * inverse[..., None], jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    return saturate(y.astype(jnp.int32) - np.int32(128), jnp.int8)


def softmax_int16(x: Array, c: SoftmaxInt16Constants) -> Array:
    """SOFTMAX on int16: exp(x) / sum exp(x) over the last axis.

    exp is Q0.15 from a table that ends at exp(-10). A term that lies 10 or more below the maximum
    therefore never becomes 0.

    Args:
      x: (..., T) int16 codes, T < 65536.
      c: from `prepare_softmax_int16`.

    Returns:
      (..., T) int16 >= 0 at scale 1/32768 and zero point 0.

    Reference: LiteRT reference/softmax.h, `SoftmaxInt16`.
    """
    below = jnp.max(x, -1, keepdims=True).astype(jnp.int32) - x.astype(jnp.int32)
    exp = _lookup(c.exp, below).astype(jnp.int32)
    total = jnp.sum(exp, -1, keepdims=True, dtype=jnp.int32)
    return softmax_quotient(exp, total, jnp.asarray(c.reciprocal))


def softmax_quotient(exp: Array, total: Array, reciprocal: Codes) -> Array:
    """Divides a row's exponentials by their sum, as int16 SOFTMAX does: exp / total.

    The sum is written 2^k (1 + a) with a in [0, 1); a table gives 1 / (1 + a), and a rounding shift
    applies 2^-k.

    Args:
      exp: (..., T) int32, Q0.15.
      total: (..., 1) int32, the sum over the whole row, > 0.
      reciprocal: (513,) int16, as in `SoftmaxInt16Constants`: an array, or a Pallas reference.

    Returns:
      (..., T) int16 at scale 1/32768.
    """
    headroom = jax.lax.clz(total)
    # 1 + a as Q1.16, rounded.
    normalized = ((wide(total) << wide(headroom - np.int32(1))) + np.int64(2**13)) >> np.int64(14)
    # a 2^16 - 2^15: the table's index is an int16.
    index = jnp.clip(
        normalized.astype(jnp.int32) - np.int32(2**15 + 2**16), np.int32(-32768), np.int32(32767)
    )
    right = np.int32(31) - headroom
    half = np.int32(1) << (right - np.int32(1))
    y = (exp * lut_lookup(index, reciprocal) + half) >> right
    return jnp.clip(y, np.int32(0), np.int32(32767)).astype(jnp.int16)


def unary(x: Array, c: TableConstants) -> Array:
    """LOGISTIC, GELU, SQRT or RSQRT on int8 or int16, by look-up: y = table[x - qmin].

    `qnpu_sim.tables` and `qnpu_sim.gelu` define the tables.
    """
    return _lookup(c.table, x.astype(jnp.int32) - np.int32(jnp.iinfo(x.dtype).min))


def _lookup(table: Leaf, index: Array) -> Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")
