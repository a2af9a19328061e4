"""The closed set of operations, at the granularity of TFLite kernels.

An op has one definition in real numbers (`eval_op`, here), one meaning on integers
(`qnpu_sim.run_graph`), one spelling in a file (`qnpu_jax.tflite.operators`), and one rule for the
scale of its output (`constraint`). Each is a `match` over `Op` that ends in `assert_never`, so that
an op which lacks one fails type checking.
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
    """y = scores + mask, mask 0 or `decoder.MASK`. TFLite ADD.

    The output scale is so wide that a masked score, which saturates at the lowest code, lies at
    least `HEADROOM` below every valid one.
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
class Gelu:
    """y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). TFLite GELU, `approximate`."""


@dataclass(frozen=True)
class Sqrt:
    """y = sqrt(x), x >= 0."""


@dataclass(frozen=True)
class Rsqrt:
    """y = 1 / sqrt(x), x > 0."""


@dataclass(frozen=True)
class Reshape:
    """y = x in another shape, elements in the same order."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Transpose:
    """y = x with permuted axes."""

    perm: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """y = x[begin : begin + size] on every axis."""

    begin: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Concat:
    """y = the inputs joined along one axis."""

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
    | Gelu
    | Sqrt
    | Rsqrt
    | Reshape
    | Transpose
    | Slice
    | Concat
)


def eval_op(op: Op, *x: Array) -> Array:
    """Evaluates an op in real numbers: the definition that every other reading is held against.

    Args:
      x: inputs, in the order that the op's docstring names them.
    """
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
        case Gelu():
            return jax.nn.gelu(x[0], approximate=True)
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
    """Applies the function where x > 0, and gives `at_zero` with derivative 0 elsewhere.

    Its own derivative at 0 is infinite. A quantized sum of squares does reach 0, and infinity times
    a clipped gradient of 0 would make every parameter NaN.
    """
    positive = x > 0
    return jnp.where(positive, function(jnp.where(positive, x, 1)), jnp.asarray(at_zero, x.dtype))


HEADROOM = 10.0
"""Distance of a masked score below every valid one, real units.

The int16 SOFTMAX treats distances of 10 and more alike. The int8 one gives 0 below exp(-6.2), and
counts a masked key with at most exp(-10).

Reference: LiteRT tflite/kernels/internal/reference/softmax.h, `SoftmaxInt16`: a table of exp on
[-10, 0].
"""


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
"""Factor of widening: wide code = 128 (code - zero_point), exact in 16 bits (255 x 128 < 2^15).

It fills the upper byte, because Hexagon's 16-bit BATCH_MATMUL rounds an operand to that byte.
"""


@dataclass(frozen=True)
class Narrowed:
    """The scale of a requantize depends on the widths.

    Where it narrows, scale and zero point are free. Where it widens, the scale is the input's
    divided by WIDENING, with zero point 0: code WIDENING (q - z), exact. Between equal widths it is
    an identity with the input's scale and zero point, which file and simulator drop.
    """


@dataclass(frozen=True)
class Masked:
    """scale = scale(scores) + HEADROOM / 32767 (127 at 8 bits): the code range covers every score,
    and HEADROOM below it."""


Constraint = Free | Same | Fixed | Narrowed | Masked


def constraint(op: Op) -> Constraint:
    """Rule by which an op's output gets its scale and zero point."""
    match op:
        case FullyConnected() | BatchMatmul() | Add() | Mul() | Gelu() | Sqrt() | Rsqrt():
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
