"""Accumulators that may be too narrow for a sum: they wrap or saturate.

A kernel's constants hold a `Limit` only where the sum is not proved to fit. Everywhere else an
accumulator of any width holds the exact sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qnpu_sim.fixedpoint import wide


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wrap:
    """Keeps the low `bits` of a sum. The order of its terms does not matter."""

    bits: int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("x_zero_point", "start"),
    meta_fields=("bits",),
)
@dataclass(frozen=True)
class Saturate:
    """Clips to `bits` after every product, in the order of the inner index k.

    Attributes:
      x_zero_point: of the first operand, int32.
      start: (N,) or (1,) value of the accumulator before the first product: the bias, or 0.
    """

    x_zero_point: Any
    start: Any
    bits: int


Limit = Wrap | Saturate | None
"""How an accumulator is limited; None: its sum is proved to fit."""


def wrap(acc: Array, bits: int) -> Array:
    """Takes an accumulator modulo 2^bits, into [-2^(bits - 1), 2^(bits - 1)).

    >>> int(wrap(jnp.asarray(130, jnp.int32), 8))
    -126

    Args:
      acc: int32 or int64; the result has its type.
    """
    unused = np.asarray(acc.dtype.itemsize * 8 - bits, acc.dtype)
    return (acc << unused) >> unused if unused > 0 else acc


def saturating_sum(x: Array, y: Array, limit: Saturate) -> Array:
    """Sums products, clipping after each: acc_k = clip(acc_(k-1) + x_k y_k), acc_(-1) = start.

    Args:
      x: (B, M, K) codes minus their zero point.
      y: (B, K, N) codes minus their zero point.

    Returns:
      (B, M, N) int64.
    """
    low, high = np.int64(-(2 ** (limit.bits - 1))), np.int64(2 ** (limit.bits - 1) - 1)
    shape = (x.shape[0], x.shape[1], y.shape[2])
    start = jnp.broadcast_to(wide(jnp.asarray(limit.start)), shape[2:])
    begin = jnp.broadcast_to(jnp.clip(start, low, high)[None, None, :], shape)

    def step(acc: Array, terms: tuple[Array, Array]) -> tuple[Array, None]:
        a, b = terms
        return jnp.clip(acc + wide(a)[:, :, None] * wide(b)[:, None, :], low, high), None

    acc, _ = jax.lax.scan(step, begin, (jnp.moveaxis(x, 2, 0), jnp.moveaxis(y, 1, 0)))
    return acc
