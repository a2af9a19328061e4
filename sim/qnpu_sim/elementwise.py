"""ADD, MUL and QUANTIZE on integer codes, in the scalar code that defines them, in the vector code
that x86 runs, and as XNNPACK computes them.

Which of them a kernel is, its constants' type says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from qnpu_sim.fixedpoint import rounding_divide_by_pot, saturate, srdhm
from qnpu_sim.rounding import FixedScale, Scale, SingleScale, rescale

Leaf = np.ndarray | Array
"""A constant: NumPy as prepared, traced inside a jitted kernel."""

LANES = 16
"""Elements that the vector code takes at a time."""


class AddConstants(NamedTuple):
    """Zero points of both inputs and the output; scales of x, of y and of the sum."""

    x_zero_point: Leaf
    y_zero_point: Leaf
    x_scale: Scale
    y_scale: Scale
    scale: Scale
    zero_point: Leaf


class MulConstants(NamedTuple):
    """Zero points of both inputs and the output; scale of the product."""

    x_zero_point: Leaf
    y_zero_point: Leaf
    scale: Scale
    zero_point: Leaf


class QuantizeConstants(NamedTuple):
    """Zero points of input and output; scale of the difference."""

    x_zero_point: Leaf
    scale: Scale
    zero_point: Leaf


class LaneAdd(NamedTuple):
    """ADD in vector code as far as it goes, else by `scalar`."""

    scalar: AddConstants


class LaneMul(NamedTuple):
    """MUL in vector code as far as it goes, else by `scalar`."""

    scalar: MulConstants


class LaneQuantize(NamedTuple):
    """QUANTIZE in vector code as far as it goes, else by `scalar`."""

    scalar: QuantizeConstants


class XnnAdd(NamedTuple):
    """XNNPACK's: integer factors of x and y in units of 2^-shift."""

    x_zero_point: Leaf
    y_zero_point: Leaf
    x_factor: Leaf
    y_factor: Leaf
    shift: Leaf
    zero_point: Leaf


class XnnQuantize(NamedTuple):
    """XNNPACK's: an integer factor in units of 2^-8."""

    x_zero_point: Leaf
    factor: Leaf
    zero_point: Leaf


Add = AddConstants | LaneAdd | XnnAdd
Mul = MulConstants | LaneMul
Quantize = QuantizeConstants | LaneQuantize | XnnQuantize


def add(x: Array, y: Array, c: Add) -> Array:
    """z = clip(rescale(rescale((x - zx) 2^L) + rescale((y - zy) 2^L)) + zero_point), L = 20 for
    int8, 15 for int16.

    Args:
      x, y: codes of one type, shapes that broadcast as in NumPy.
      c: from `prepare_add`.

    Returns:
      Codes of the broadcast shape.

    Reference: LiteRT reference/add.h, `AddElementwise`; kernels/add.cc, `Prepare` with
      pot_scale_int16 = False.
    """
    match c:
        case LaneAdd(scalar):
            # At 16 bits only equal shapes have vector code.
            some = x.dtype == jnp.int8 or x.shape == y.shape
            lanes = in_lanes(x.shape, y.shape) if some else False
            return _merge(lanes, lambda: _add_lanes(x, y, scalar), lambda: add(x, y, scalar))
        case XnnAdd():
            return _add_xnn(x, y, c)
        case AddConstants():
            a = add_term(x, c.x_zero_point, c.x_scale)
            b = add_term(y, c.y_zero_point, c.y_scale)
            return add_terms(a, b, c, dtype=x.dtype)


def add_term(x: Array, zero_point: Leaf, scale: Scale) -> Array:
    """One summand of `add` in the scale of the sum, int32: rescale((x - zero_point) 2^L)."""
    return rescale(_less(x, zero_point) << _left(x), scale)


def add_terms(a: Array, b: Array, c: AddConstants, *, dtype: np.dtype | type) -> Array:
    """What `add` makes of its two terms: clip(rescale(a + b) + zero_point)."""
    return saturate(rescale(_sum(a, b), c.scale) + jnp.asarray(c.zero_point), dtype)


def _sum(x: Array, y: Array) -> Array:
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    return jnp.broadcast_to(x, shape) + jnp.broadcast_to(y, shape)


def _product(x: Array, y: Array, c: MulConstants) -> Array:
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    x_real, y_real = _less(x, c.x_zero_point), _less(y, c.y_zero_point)
    return jnp.broadcast_to(x_real, shape) * jnp.broadcast_to(y_real, shape)


def _left(x: Array) -> np.int32:
    return np.int32(20 if x.dtype == jnp.int8 else 15)


def _less(x: Array, zero_point: Leaf) -> Array:
    return x.astype(jnp.int32) - jnp.asarray(zero_point)


def _add_lanes(x: Array, y: Array, c: AddConstants) -> Array:
    """Both shifts of an input at once, before its high multiply; at 8 bits the sum loses all but
    16 bits before the zero point.

    Reference: LiteRT optimized/integer_ops/add.h, `AddElementwiseInt8`, `AddElementwiseInt16`.
    """

    def term(codes: Array, zero_point: Leaf, scale: Scale) -> Array:
        assert isinstance(scale, FixedScale)
        shift = jnp.asarray(scale.shift) + _left(x)
        real = _less(codes, zero_point)
        left, right = jnp.maximum(shift, 0), jnp.minimum(jnp.maximum(-shift, 0), 31)
        return srdhm((real << left) >> right, jnp.asarray(scale.multiplier))

    assert isinstance(c.scale, FixedScale)
    a, b = term(x, c.x_zero_point, c.x_scale), term(y, c.y_zero_point, c.y_scale)
    z = srdhm(_sum(a, b), jnp.asarray(c.scale.multiplier))
    z = rounding_divide_by_pot(z, -jnp.asarray(c.scale.shift))
    if x.dtype == jnp.int8:
        z = z.astype(jnp.int16)  # keeps the low bits
        return saturate(_plus_16(z, c.zero_point), jnp.int8)
    return saturate(z + jnp.asarray(c.zero_point), jnp.int16)


def _plus_16(z: Array, zero_point: Leaf) -> Array:
    """A sum of int16 that wraps, as int32."""
    return (z + jnp.asarray(zero_point).astype(jnp.int16)).astype(jnp.int32)


def _add_xnn(x: Array, y: Array, c: XnnAdd) -> Array:
    """z = clip(((2^(s-1) + A (x - zx) + B (y - zy)) >> s) + zero_point).

    Reference: XNNPACK src/qs8-vadd, `xnn_qs8_vadd_minmax_ukernel`; src/microparams-init.c.
    """
    shift = jnp.asarray(c.shift)
    a = _less(x, c.x_zero_point) * jnp.asarray(c.x_factor)
    b = _less(y, c.y_zero_point) * jnp.asarray(c.y_factor)
    z = (_sum(a, b) + (np.int32(1) << (shift - np.int32(1)))) >> shift
    return saturate(z + jnp.asarray(c.zero_point), jnp.int8)


def mul(x: Array, y: Array, c: Mul) -> Array:
    """z = clip(rescale((x - zx)(y - zy)) + zero_point).

    Args:
      x, y: codes of one type, shapes that broadcast as in NumPy.
      c: from `prepare_mul`.

    Returns:
      Codes of the broadcast shape.

    Reference: LiteRT reference/integer_ops/mul.h, `MulElementwise`; XNNPACK src/qs8-vmul.
    """
    match c:
        case LaneMul(scalar):
            lanes = in_lanes(x.shape, y.shape)
            return _merge(lanes, lambda: _mul_lanes(x, y, scalar), lambda: mul(x, y, scalar))
        case MulConstants():
            return saturate(
                rescale(_product(x, y, c), c.scale) + jnp.asarray(c.zero_point), x.dtype
            )


def _mul_lanes(x: Array, y: Array, c: MulConstants) -> Array:
    """Saturates to 16 bits before the zero point is added, which then wraps.

    Reference: LiteRT optimized/integer_ops/mul.h, `MulElementwise`, `MulSimpleBroadcast`.
    """
    z = rescale(_product(x, y, c), c.scale)
    return saturate(_plus_16(saturate(z, jnp.int16), c.zero_point), jnp.int8)


def quantize(x: Array, c: Quantize, *, dtype: np.dtype | type) -> Array:
    """y = clip(rescale(x - x_zero_point) + zero_point) as `dtype` (int8 or int16).

    Reference: LiteRT reference/requantize.h, `Requantize`; optimized/optimized_ops.h, `Requantize`;
      XNNPACK src/qs8-vcvt.
    """
    match c:
        case LaneQuantize(scalar):
            assert isinstance(scalar.scale, FixedScale)
            vector = scalar._replace(scale=SingleScale(*scalar.scale))
            return _merge(
                in_lanes(x.shape, x.shape),
                lambda: quantize(x, vector, dtype=dtype),
                lambda: quantize(x, scalar, dtype=dtype),
            )
        case XnnQuantize(x_zero_point, factor, zero_point):
            scaled = _less(x, x_zero_point) * jnp.asarray(factor)
            y = ((jnp.asarray(zero_point) << np.int32(8)) + scaled + np.int32(128)) >> np.int32(8)
            return saturate(y, dtype)
        case QuantizeConstants():
            real = _less(x, c.x_zero_point)
            return saturate(rescale(real, c.scale) + jnp.asarray(c.zero_point), dtype)


def in_lanes(x: tuple[int, ...], y: tuple[int, ...]) -> bool | Array:
    """Which elements of a result vector code computes: all, none, or a mask of its shape.

    Equal shapes are one run of elements; otherwise the innermost dimensions that both have, or that
    one lacks, are a run. In every run the last n % `LANES` are left to scalar code, and all of it
    where the shapes do not fold into five dimensions.

    Reference: LiteRT reference/process_broadcast_shapes.h, `ProcessBroadcastShapes`;
      optimized/optimized_ops.h, `BinaryBroadcastFiveFold`.
    """
    shape = np.broadcast_shapes(x, y)
    run = _run(*((1,) * (len(shape) - len(s)) + s for s in (x, y)))
    vector = run // LANES * LANES
    if vector in (0, run):
        return vector > 0
    size = int(np.prod(shape))
    return (jnp.arange(size, dtype=jnp.int32) % np.int32(run) < np.int32(vector)).reshape(shape)


def _run(x: tuple[int, ...], y: tuple[int, ...]) -> int:
    """Elements per call of the vector code for two shapes of one rank; 0: none is made."""
    if x == y:
        return int(np.prod(x))
    axes = list(zip(x, y, strict=True))
    last = next(a for a in reversed(axes) if a[0] != a[1])
    if last[0] != 1:
        axes = [(b, a) for a, b in axes]  # the second is broadcast in the innermost place
    folds = []
    for same in (True, False, True):
        folds.append(_take(axes, lambda a, same=same: a[0] == a[1] if same else a[0] == 1))
    _take(axes, lambda a: a[1] == 1)
    _take(axes, lambda a: a[0] == a[1])
    inner, broadcast, _ = folds
    return 0 if axes else inner if inner > 1 else broadcast


def _take(axes: list[tuple[int, int]], fits: Callable[[tuple[int, int]], bool]) -> int:
    """Removes axes from the end as long as they fit, and gives their elements."""
    size = 1
    while axes and fits(axes[-1]):
        size *= max(axes.pop())
    return size


def _merge(lanes: bool | Array, vector: Callable[[], Array], scalar: Callable[[], Array]) -> Array:
    if isinstance(lanes, bool):
        return vector() if lanes else scalar()
    return jnp.where(lanes, vector(), scalar())
