"""Exact dot products of int8 arrays, by the fastest instructions that are exact.

An int8 dot accumulated in int32 is exact for up to 131,071 terms. A bfloat16 dot accumulated in
float32 is exact, in any order of summation, as long as no partial sum passes 2^24: bfloat16 holds
every int8, and float32 every integer up to 2^24. The weights bound the sums, row by row.
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
    """Instructions of a dot: int8 into int32, or bfloat16 into float32.

    It is static, so a jitted function is compiled once per kind.
    """

    bfloat16: bool


INT8, BFLOAT16 = Dot(False), Dot(True)


def dot(x: Array, y: Array, dims: tuple, how: Dot = INT8) -> Array:
    """Computes `jax.lax.dot_general` of int8 arrays, as int32.

    Args:
      dims: dimension numbers of `dot_general`.
      how: `fastest` of the weights, or INT8, which is always exact.
    """
    if how == INT8:
        return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.int32)
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32).astype(jnp.int32)


def fastest(weights: np.ndarray) -> Dot:
    """Chooses the fastest exact dot of weights with any int8 codes.

    bfloat16 needs a device on which it is faster, and the proof max_n sum_k 128 |w_nk| < 2^24.

    Args:
      weights: (N, K) int8.
    """
    reach = 128 * int(np.abs(weights.astype(np.int32)).sum(axis=1).max())
    return BFLOAT16 if reach < 2**24 and _bfloat16_is_faster() else INT8


@cache
def _bfloat16_is_faster() -> bool:
    """True on a CPU with AVX512-BF16 and without AMX-INT8, whose int8 dots are three times as fast
    again."""
    if jax.default_backend() != "cpu":
        return False
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    return "avx512_bf16" in flags and "amx_int8" not in flags
