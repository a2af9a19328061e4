"""The inner loop of GPTQ: columns of weights rounded one after the other.

After column j is rounded, those still to come compensate its error (`gptq` has the equations).
Letters: N output channels, K inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Float64, Int

BLOCK = 64
"""Columns whose errors later blocks compensate at once: (BLOCK, N) should fit a CPU's cache."""

Rows = Float64[Array, "n k"]
Channels = Float64[Array, " n"]
Square = Float64[Array, "k k"]


def inverse_factor(h: Square) -> Square:
    """Returns the upper triangular U with U^T U = H^-1; NaN where H is not positive definite.

    Cholesky from the last row to the first gives H = R R^T with R upper triangular; U = R^-1.

    Args:
      h: symmetric, positive definite.

    >>> with jax.enable_x64(True):
    ...     inverse_factor(jnp.asarray([[4.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(r, jnp.eye(len(h), dtype=h.dtype))


class Rounded(NamedTuple):
    """Weights after rounding; NaN where H was not positive definite.

    Attributes:
      codes: integers.
      real: the compensated weights that were rounded to them, in codes.
      scale: chosen scale of each row, real units per code.
    """

    codes: Rows
    real: Rows
    scale: Channels


def round_columns(
    w: Rows,
    scale: Float32[Array, " n"],
    qmax: Float32[Array, " n"],
    h: Square,
    factors: tuple[float, ...] = (1.0,),
) -> Rounded:
    """Rounds w by GPTQ under the Hessian h, each row with the best of scale * factors.

    A row's best scale leaves the least (w_q - w) H (w_q - w)^T. Columns go by falling H_jj
    (act-order): the largest H_jj first, because the last column's error is not compensated. H is
    factored in float64, which `jax.enable_x64` must allow; columns are rounded in float32.

    Args:
      w: real weights.
      scale: real units per code of each row.
      qmax: largest code of each row; the least is -qmax.
      h: damped E[x x^T], positive definite.
    """
    order = jnp.argsort(-jnp.diagonal(h), stable=True)
    u = inverse_factor(h[order][:, order])
    w32, scale32, qmax32, factors32, u32 = (
        jnp.asarray(x, jnp.float32) for x in (w, scale, qmax, factors, u)
    )
    codes, compensated, chosen = _round_columns(w32, scale32, qmax32, factors32, u32, order)
    # NaN is no code, and clipping would make one of it.
    codes = jnp.where(jnp.isfinite(u).all(), codes, jnp.float32(jnp.nan))
    return Rounded(*(x.astype(jnp.float64) for x in (codes, compensated, chosen)))


def _round_columns(
    w: Float32[Array, "n k"],
    scale: Float32[Array, " n"],
    qmax: Float32[Array, " n"],
    factors: Float32[Array, " f"],
    u: Float32[Array, "k k"],
    order: Int[Array, " k"],
) -> tuple[Float32[Array, "n k"], Float32[Array, "n k"], Float32[Array, " n"]]:
    """The fields of `Rounded`; rows are independent, so those of all factors run side by side.

    Args:
      u: `inverse_factor` of h in the order of `order`.
    """
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

    For j = 0 .. K-1:  e_j = (w_j - code_j) / U_jj,  w_k <- w_k - e_j U_jk for k > j;  the loss of a
    row is sum_j e_j^2. Inside a block this is done column by column, and for all columns after the
    block at once, w <- w - U_block^T e.

    Columns of W lie in rows here, where they are contiguous.
    """
    k = w.shape[0]
    # Zero weights, with a 1 on U's diagonal, fill the last block: they round to 0 without error.
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
        # This also changes the block itself and those before it, which nothing reads again.
        w = w - jnp.matmul(wide.T, errors, precision=jax.lax.Precision.HIGHEST)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return w, put(codes, code), put(real, rows), loss + jnp.sum(jnp.square(errors), axis=0)

    state = (w, jnp.zeros_like(w), jnp.zeros_like(w), jnp.zeros_like(qmax))
    _, codes, real, loss = jax.lax.fori_loop(0, (k + pad) // BLOCK, block, state)
    return codes[:k], real[:k], loss
