"""The closed set of operations, at the granularity of TFLite kernels.

An op has one definition in real numbers (`eval_op`, here), one meaning on integers (`qnpu_sim.program`), one
spelling in a file (`qnpu_jax.tflite.emitter`), and one rule for the scale of its output (`constraint`).
Each is a `match` over `Op` that ends in `assert_never`, so that an op which lacks one fails type
checking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Embedding:
    """y[t] = table[ids[t]]; inputs ids (T,) int32, table (V, D). TFLite GATHER."""


@dataclass(frozen=True)
class FullyConnected:
    """y = x w^T + b; inputs x (T, K), w (N, K), b (N,)."""


@dataclass(frozen=True)
class BatchMatmul:
    """y[b] = x[b] z[b], or x[b] z[b]^T with adj_y; inputs (B, M, K) and (B, K, N) or (B, N, K).

    8-bit operands accumulate in 32 bits, 16-bit ones in 64.
    """

    adj_y: bool = False


@dataclass(frozen=True)
class Add:
    """y = x + z, with broadcasting."""


@dataclass(frozen=True)
class AddMask:
    """y = scores + mask, with an output scale so wide that a masked score lies at least `HEADROOM`
    below all others.

    The mask is 0 or -2032; masked sums saturate at the lowest code. TFLite ADD.
    """


@dataclass(frozen=True)
class Keep:
    """y = x keep, keep 1 or 0: x at its own scale, or exactly 0. TFLite MUL."""


@dataclass(frozen=True)
class Mul:
    """y = x z, with broadcasting."""


@dataclass(frozen=True)
class Requantize:
    """y = x at another scale or width. TFLite QUANTIZE."""


@dataclass(frozen=True)
class Softmax:
    """y = exp(x) / sum(exp(x)) over the last axis."""


@dataclass(frozen=True)
class Logistic:
    """y = 1 / (1 + exp(-x))."""


@dataclass(frozen=True)
class Sqrt:
    """y = sqrt(x), x >= 0."""


@dataclass(frozen=True)
class Rsqrt:
    """y = 1 / sqrt(x), x > 0."""


@dataclass(frozen=True)
class Reshape:
    """The same elements in another shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Transpose:
    """Axes permuted."""

    perm: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """x[begin : begin + size] on every axis."""

    begin: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Concat:
    """The inputs joined along one axis."""

    axis: int


Op = (
    Embedding
    | FullyConnected
    | BatchMatmul
    | Add
    | AddMask
    | Keep
    | Mul
    | Requantize
    | Softmax
    | Logistic
    | Sqrt
    | Rsqrt
    | Reshape
    | Transpose
    | Slice
    | Concat
)


def eval_op(op: Op, *x: Array) -> Array:
    """The op in real numbers: its definition, against which every other reading is held."""
    match op:
        case Embedding():
            return x[1][x[0]]
        case FullyConnected():
            return jax.lax.dot_general(x[0], x[1], (((1,), (1,)), ((), ()))) + x[2][None, :]
        case BatchMatmul(adj_y=adj_y):
            return jnp.einsum("bmk,bnk->bmn" if adj_y else "bmk,bkn->bmn", x[0], x[1])
        case Add() | AddMask():
            return x[0] + x[1]
        case Mul() | Keep():
            return x[0] * x[1]
        case Requantize():
            return x[0]
        case Softmax():
            return jax.nn.softmax(x[0], axis=-1)
        case Logistic():
            return jax.nn.sigmoid(x[0])
        case Sqrt():
            return _where_positive(jnp.sqrt, x[0], 0.0)
        case Rsqrt():
            return _where_positive(jax.lax.rsqrt, x[0], float("inf"))
        case Reshape(shape=shape):
            return jnp.reshape(x[0], shape)
        case Transpose(perm=perm):
            return jnp.transpose(x[0], perm)
        case Slice(begin=begin, size=size):
            return jax.lax.slice(
                x[0], begin, tuple(b + s for b, s in zip(begin, size, strict=True))
            )
        case Concat(axis=axis):
            return jnp.concatenate(x, axis)
        case _:
            assert_never(op)


def _where_positive(function: Callable[[Array], Array], x: Array, at_zero: float) -> Array:
    """The function with derivative 0 at 0, where its own is infinite: a quantized sum of squares
    does get there, and an infinity times a clipped gradient of 0 is NaN for all parameters."""
    positive = x > 0
    return jnp.where(positive, function(jnp.where(positive, x, 1)), jnp.asarray(at_zero, x.dtype))


HEADROOM = 10.0
"""How far below every valid score a masked one lies (real units): the int16 SOFTMAX treats 10 and
more alike; the int8 one, which gives 0 below exp(-6.2), counts a masked key with at most exp(-10).

Reference: LiteRT tflite/kernels/internal/reference/softmax.h, `SoftmaxInt16` (table of exp on [-10,
0])."""


@dataclass(frozen=True)
class Free:
    """Scale and zero point are chosen (calibrated or learned)."""


@dataclass(frozen=True)
class Same:
    """Scale and zero point of output and these inputs are one (movement ops copy codes)."""

    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Fixed:
    """The kernel fixes the output: scale and zero point for 8 and for 16 bits."""

    int8: tuple[float, int]
    int16: tuple[float, int]


WIDENING = 128
"""A widened code is so many times that of its source less its zero point: exact, 255 x 128 fits 16
bits. It fills the upper byte, because Hexagon's 16-bit BATCH_MATMUL rounds an operand to it."""


@dataclass(frozen=True)
class Narrowed:
    """Requantize: free where it narrows; scale / WIDENING of the input with zero point 0 where it
    widens (exact: code WIDENING (q - z)); the input's scale and zero point where the widths are
    equal (an identity, which `freeze` drops)."""


@dataclass(frozen=True)
class Masked:
    """scale = scale(scores) + HEADROOM / 32767 (127 at 8 bits): the code range covers every score
    and HEADROOM below."""


Constraint = Free | Same | Fixed | Narrowed | Masked


def constraint(op: Op) -> Constraint:
    """What ties the output's scale and zero point to its inputs'."""
    match op:
        case FullyConnected() | BatchMatmul() | Add() | Mul() | Sqrt() | Rsqrt():
            return Free()
        case Embedding():
            return Same((1,))
        case Reshape() | Transpose() | Slice() | Keep():
            return Same((0,))
        case Concat():
            return Same(())  # every input; the builder knows how many
        case AddMask():
            return Masked()
        case Requantize():
            return Narrowed()
        case Softmax() | Logistic():
            return Fixed(int8=(1 / 256, -128), int16=(1 / 32768, 0))
        case _:
            assert_never(op)


def tied_inputs(op: Op, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the inputs that share the output's scale and zero point."""
    match constraint(op):
        case Same(inputs=()):
            return inputs
        case Same(inputs=indices):
            return tuple(inputs[i] for i in indices)
        case _:
            return ()
