"""Exact sums of products of bytes, by the instructions that are fastest where they are exact.

An int8 dot with int32 results is exact for up to 131,071 terms. A bfloat16 dot with float32 results
is exact, in any order of its sum, where no partial sum passes 2^24: bfloat16 holds every byte, and
float32 every integer up to there. Weights prove that, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class Dot:
    """Products of two int8 arrays, summed in int32, or in float32 from bfloat16."""

    bfloat16: bool


INT8, BFLOAT16 = Dot(False), Dot(True)


def dot(x: Array, y: Array, dims: tuple, how: Dot = INT8) -> Array:
    """`jax.lax.dot_general` of int8 arrays, as int32."""
    if how == INT8:
        return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.int32)
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32).astype(jnp.int32)


def fastest(weights: np.ndarray) -> Dot:
    """What multiplies any bytes with these weights, (N, K) int8, exactly and fastest.

    bfloat16 where it is faster and max_n sum_k 128 |w_nk| < 2^24 proves it exact.
    """
    reach = 128 * int(np.abs(weights.astype(np.int32)).sum(axis=1).max())
    return BFLOAT16 if reach < 2**24 and _bfloat16_is_faster() else INT8


@cache
def _bfloat16_is_faster() -> bool:
    """On a CPU with instructions for it and without tiles of bytes (AMX), which are three times as
    fast again."""
    if jax.default_backend() != "cpu":
        return False
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    return "avx512_bf16" in flags and "amx_int8" not in flags
