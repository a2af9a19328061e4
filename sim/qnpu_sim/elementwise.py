"""ADD, MUL and QUANTIZE on integer codes.

Each has up to three definitions, whose bits differ: LiteRT's scalar code, the vector code that its
optimized kernels run on x86 for most elements (lanes), and XNNPACK's. The type of the constants
chooses the definition. Letters: x, y inputs, z output; zx, zy their zero points.
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
"""A constant's array: NumPy when it is prepared, a JAX tracer inside a jitted kernel."""

LANES = 16
"""Elements that the vector code computes at a time."""


class AddConstants(NamedTuple):
    """ADD: zero points of inputs and output (int32), and rescalings.

    Attributes:
      x_scale, y_scale: bring an input, shifted left by L bits, to the scale of the sum.
      scale: brings the sum to the output.
    """

    x_zero_point: Leaf
    y_zero_point: Leaf
    x_scale: Scale
    y_scale: Scale
    scale: Scale
    zero_point: Leaf


class MulConstants(NamedTuple):
    """MUL: zero points of inputs and output (int32), and the rescaling of the product."""

    x_zero_point: Leaf
    y_zero_point: Leaf
    scale: Scale
    zero_point: Leaf


class QuantizeConstants(NamedTuple):
    """QUANTIZE: zero points of input and output (int32), and the rescaling of x - x_zero_point."""

    x_zero_point: Leaf
    scale: Scale
    zero_point: Leaf


class LaneAdd(NamedTuple):
    """ADD of the optimized kernels: vector code where `in_lanes` says so, else `scalar`."""

    scalar: AddConstants


class LaneMul(NamedTuple):
    """MUL of the optimized kernels: vector code where `in_lanes` says so, else `scalar`."""

    scalar: MulConstants


class LaneQuantize(NamedTuple):
    """QUANTIZE of the optimized kernels: vector code where `in_lanes` says so, else `scalar`."""

    scalar: QuantizeConstants


class XnnAdd(NamedTuple):
    """ADD of XNNPACK: integer factors of x and y, in units of 2^-shift."""

    x_zero_point: Leaf
    y_zero_point: Leaf
    x_factor: Leaf
    y_factor: Leaf
    shift: Leaf
    zero_point: Leaf


class XnnQuantize(NamedTuple):
    """QUANTIZE of XNNPACK: an integer factor, in units of 2^-8."""

    x_zero_point: Leaf
    factor: Leaf
    zero_point: Leaf


Add = AddConstants | LaneAdd | XnnAdd
Mul = MulConstants | LaneMul
Quantize = QuantizeConstants | LaneQuantize | XnnQuantize


def add(x: Array, y: Array, c: Add) -> Array:
    """Adds: z = clip(rescale(rescale((x - zx) 2^L) + rescale((y - zy) 2^L)) + zero_point).

    Inputs are shifted left by L = 20 bits (int8) or 15 bits (int16), so that bringing them to one
    scale keeps their low bits.

    Args:
      x, y: codes of one type, int8 or int16; shapes broadcast as in NumPy.
      c: from `prepare_add`.

    Returns:
      Codes of the broadcast shape, of x's type.

    Reference: LiteRT reference/add.h, `AddElementwise`; kernels/add.cc, `Prepare` with
      pot_scale_int16 = False.
    """
    match c:
        case LaneAdd(scalar):
            # int16 ADD has vector code for equal shapes only.
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
    """Brings an input of `add` to the scale of the sum: rescale((x - zero_point) 2^L), int32."""
    return rescale(_less(x, zero_point) << _left(x), scale)


def add_terms(a: Array, b: Array, c: AddConstants, *, dtype: np.dtype | type) -> Array:
    """Finishes `add` from its two terms: clip(rescale(a + b) + zero_point), as `dtype`."""
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
    """ADD in vector code.

    It differs from the scalar code in two ways. An input is shifted by L and by its own shift at
    once, before the high multiply. The int8 sum keeps only its low 16 bits before the zero point is
    added.

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
        z = z.astype(jnp.int16)  # keeps the low 16 bits
        return saturate(_plus_16(z, c.zero_point), jnp.int8)
    return saturate(z + jnp.asarray(c.zero_point), jnp.int16)


def _plus_16(z: Array, zero_point: Leaf) -> Array:
    """Adds an int16 zero point with wrap at 16 bits; returns int32."""
    return (z + jnp.asarray(zero_point).astype(jnp.int16)).astype(jnp.int32)


def _add_xnn(x: Array, y: Array, c: XnnAdd) -> Array:
    """ADD of XNNPACK: z = clip(((A (x - zx) + B (y - zy) + 2^(s - 1)) >> s) + zero_point).

    A, B and s are the constants' x_factor, y_factor and shift.

    Reference: XNNPACK src/qs8-vadd, `xnn_qs8_vadd_minmax_ukernel`; src/microparams-init.c.
    """
    shift = jnp.asarray(c.shift)
    a = _less(x, c.x_zero_point) * jnp.asarray(c.x_factor)
    b = _less(y, c.y_zero_point) * jnp.asarray(c.y_factor)
    z = (_sum(a, b) + (np.int32(1) << (shift - np.int32(1)))) >> shift
    return saturate(z + jnp.asarray(c.zero_point), jnp.int8)


def mul(x: Array, y: Array, c: Mul) -> Array:
    """Multiplies: z = clip(rescale((x - zx) (y - zy)) + zero_point).

    Args:
      x, y: codes of one type, int8 or int16; shapes broadcast as in NumPy.
      c: from `prepare_mul`.

    Returns:
      Codes of the broadcast shape, of x's type.

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
    """MUL in vector code: the product saturates to 16 bits, then adding the zero point wraps.

    Reference: LiteRT optimized/integer_ops/mul.h, `MulElementwise`, `MulSimpleBroadcast`.
    """
    z = rescale(_product(x, y, c), c.scale)
    return saturate(_plus_16(saturate(z, jnp.int16), c.zero_point), jnp.int8)


def quantize(x: Array, c: Quantize, *, dtype: np.dtype | type) -> Array:
    """Requantizes: y = clip(rescale(x - x_zero_point) + zero_point).

    Args:
      x: int8 or int16 codes of any shape.
      c: from `prepare_quantize`.
      dtype: int8 or int16, of the result.

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
    """Finds the elements of a result that vector code computes.

    The vector code is called on runs of consecutive elements. Equal shapes are one run. Otherwise a
    run is made of the innermost dimensions that are equal, or of those in which one shape is
    broadcast. In every run of n elements scalar code computes the last n % `LANES`. It computes
    everything where the shapes do not fold into five dimensions.

    >>> in_lanes((2, 16), (2, 16))
    True
    >>> int(in_lanes((2, 9), (2, 9)).sum())  # one run of 18 elements
    16

    Args:
      x, y: shapes of the operands.

    Returns:
      True for all elements, False for none, or a mask of the result's shape.

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
    """Length of a run for two shapes of one rank; 0 where the vector code is not called."""
    if x == y:
        return int(np.prod(x))
    axes = list(zip(x, y, strict=True))
    last = next(a for a in reversed(axes) if a[0] != a[1])
    if last[0] != 1:
        axes = [(b, a) for a, b in axes]  # first of a pair: what is broadcast innermost
    folds = []
    for same in (True, False, True):
        folds.append(_take(axes, lambda a, same=same: a[0] == a[1] if same else a[0] == 1))
    _take(axes, lambda a: a[1] == 1)
    _take(axes, lambda a: a[0] == a[1])
    inner, broadcast, _ = folds
    return 0 if axes else inner if inner > 1 else broadcast


def _take(axes: list[tuple[int, int]], fits: Callable[[tuple[int, int]], bool]) -> int:
    """Removes axes from the end as long as they fit; returns their number of elements."""
    size = 1
    while axes and fits(axes[-1]):
        size *= max(axes.pop())
    return size


def _merge(lanes: bool | Array, vector: Callable[[], Array], scalar: Callable[[], Array]) -> Array:
    if isinstance(lanes, bool):
        return vector() if lanes else scalar()
    return jnp.where(lanes, vector(), scalar())
