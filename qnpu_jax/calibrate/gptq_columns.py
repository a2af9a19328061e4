"""Columns of weights rounded one after the other, those still to come making up for each error: the
inner loop of GPTQ (`weights` has the equations).

Letters: N output channels, K inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Int

BLOCK = 64
"""Columns fed back at once to those after them: (BLOCK, N) should fit a CPU's cache."""

Rows = Float64[np.ndarray, "n k"]
Channels = Float64[np.ndarray, " n"]
Square = Float64[np.ndarray, "k k"]


def inverse_factor(h: Square) -> Square:
    """Upper triangular U with U^T U = H^-1.

    H = R R^T, R upper triangular: Cholesky from the last row to the first; U = R^-1.
    """
    r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return np.triu(np.linalg.inv(r))


class Rounded(NamedTuple):
    """Codes, the compensated weights (in codes) that were rounded to them, and the scales."""

    codes: Rows
    real: Rows
    scale: Channels


def round_columns(
    w: Rows,
    scale: Float32[np.ndarray, " n"],
    qmax: Float32[np.ndarray, " n"],
    h: Square,
    factors: tuple[float, ...] = (1.0,),
) -> Rounded:
    """What GPTQ makes of w under the damped Hessian h, per row at the best of scale * factors."""
    order = np.argsort(-np.diag(h), kind="stable")  # last is what nothing makes up for
    u = inverse_factor(h[np.ix_(order, order)])
    real = [jnp.asarray(x, jnp.float32) for x in (w, scale, qmax, factors, u)]
    found = _round_columns(*real, jnp.asarray(order, jnp.int32))
    return Rounded(*(np.asarray(x, np.float64) for x in found))


@jax.jit
def _round_columns(
    w: Float32[Array, "n k"],
    scale: Float32[Array, " n"],
    qmax: Float32[Array, " n"],
    factors: Float32[Array, " f"],
    u: Float32[Array, "k k"],
    order: Int[Array, " k"],
) -> tuple[Float32[Array, "n k"], Float32[Array, "n k"], Float32[Array, " n"]]:
    """`Rounded`. Rows do not touch each other: those of all factors are rounded side by side."""
    n, k = w.shape
    scales = factors[:, None] * scale[None]
    columns = (w[None, :, order] / scales[:, :, None]).reshape(-1, k).T
    codes, real, loss = _feed_back(columns, jnp.tile(qmax, len(factors)), u)
    best = jnp.argmin(loss.reshape(-1, n) * jnp.square(scales), axis=0)
    chosen = best * n + jnp.arange(n)
    back = jnp.argsort(order)
    return codes.T[chosen][:, back], real.T[chosen][:, back], scales.reshape(-1)[chosen]


def _feed_back(
    w: Float32[Array, "k n"], qmax: Float32[Array, " n"], u: Float32[Array, "k k"]
) -> tuple[Float32[Array, "k n"], Float32[Array, "k n"], Float32[Array, " n"]]:
    """Codes, weights when they were rounded, and (w_q - w) H (w_q - w)^T, all in codes.

    Columns of W lie in rows here, where they are contiguous. A block of them is fed back within,
    then to all that follow.
    """
    k = w.shape[0]
    pad = -k % BLOCK
    w = jnp.pad(w, ((0, pad), (0, 0)))
    ends = jnp.where(jnp.arange(k + pad) < k, jnp.float32(0), jnp.float32(1))
    u = jnp.pad(u, ((0, pad), (0, pad))) + jnp.diag(ends)

    def column(j: jax.Array, state: Any) -> Any:
        rows, codes, errors, corner = state
        code = jnp.clip(jnp.round(rows[j]), -qmax, qmax)
        error = (rows[j] - code) / corner[j, j]
        later = jnp.where(jnp.arange(BLOCK) > j, corner[j], jnp.float32(0))
        rows = rows - later[:, None] * error[None, :]
        return rows, codes.at[j].set(code), errors.at[j].set(error), corner

    def block(i: jax.Array, state: Any) -> Any:
        w, codes, real, loss = state
        start = i * BLOCK
        rows = jax.lax.dynamic_slice_in_dim(w, start, BLOCK)
        wide = jax.lax.dynamic_slice_in_dim(u, start, BLOCK)
        corner = jax.lax.dynamic_slice_in_dim(wide, start, BLOCK, axis=1)
        none = jnp.zeros_like(rows)
        rows, code, errors, _ = jax.lax.fori_loop(0, BLOCK, column, (rows, none, none, corner))
        # What this does to the block itself and to those before it is never read.
        w = w - jnp.matmul(wide.T, errors, precision=jax.lax.Precision.HIGHEST)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return w, put(codes, code), put(real, rows), loss + jnp.sum(jnp.square(errors), axis=0)

    state = (w, jnp.zeros_like(w), jnp.zeros_like(w), jnp.zeros_like(qmax))
    _, codes, real, loss = jax.lax.fori_loop(0, (k + pad) // BLOCK, block, state)
    return codes[:k], real[:k], loss
