"""Accumulators narrower than a sum may need: what happens past their ends.

A kernel's constants hold one of these only where the sum is not proved to fit: everywhere else the
exact sum is what any accumulator holds.
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
    """Keeps the low `bits` of a sum; so the order of its terms does not matter."""

    bits: int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("x_zero_point", "start"),
    meta_fields=("bits",),
)
@dataclass(frozen=True)
class Saturate:
    """Clips after every product, in the order of the inner index.

    Attributes:
      x_zero_point: of the first operand.
      start: (N,) what the accumulator holds before the first product (the bias), or 0.
    """

    x_zero_point: Any
    start: Any
    bits: int


Limit = Wrap | Saturate | None


def wrap(acc: Array, bits: int) -> Array:
    """acc modulo 2^bits, in [-2^(bits - 1), 2^(bits - 1)); int32 or int64 as it came."""
    unused = np.asarray(acc.dtype.itemsize * 8 - bits, acc.dtype)
    return (acc << unused) >> unused if unused > 0 else acc


def saturating_sum(x: Array, y: Array, limit: Saturate) -> Array:
    """((start + x_0 y_0) clipped + x_1 y_1) clipped ...

    Args:
      x: (B, M, K) codes less their zero point.
      y: (B, K, N) likewise.

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
