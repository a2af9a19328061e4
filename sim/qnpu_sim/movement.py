"""Kernels of the ops that only move codes: no arithmetic, so no constants."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def gather(ids: Array, table: Array) -> Array:
    """Looks up rows of an embedding: table[ids], TFLite's GATHER on axis 0.

    Args:
      ids: (...,) int32 in [0, rows).
      table: (rows, N) codes.

    Returns:
      (..., N) codes.
    """
    return table.at[ids].get(mode="promise_in_bounds")


def reshape(x: Array, *, shape: tuple[int, ...]) -> Array:
    """Reshapes codes, in row-major order."""
    assert math.prod(shape) == x.size, f"{x.shape} does not reshape to {shape}"
    return jnp.reshape(x, shape)


def transpose(x: Array, *, perm: tuple[int, ...]) -> Array:
    """Permutes axes: axis i of the result is axis perm[i] of x."""
    return jnp.transpose(x, perm)


def slice_(x: Array, *, begin: tuple[int, ...], size: tuple[int, ...]) -> Array:
    """Takes x[begin : begin + size] on every axis."""
    return jax.lax.slice(x, begin, tuple(b + s for b, s in zip(begin, size, strict=True)))


def concatenation(*x: Array, axis: int) -> Array:
    """Joins codes of one scale and zero point along an axis."""
    return jnp.concatenate(x, axis)
