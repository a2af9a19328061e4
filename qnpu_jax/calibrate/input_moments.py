"""Moments of what a linear reads, which GPTQ rounds its weights by.

Letters: K inputs, B windows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64

from qnpu_jax.calibrate.gptq_columns import Square
from qnpu_jax.graph import Tensors


class Moments(NamedTuple):
    """Moments of a linear's input over all tokens: x in the float model, x_q in the quantized one.

    Expectations weigh token t by min(1, `loudest` median |x_q|^2 / |x_q,t|^2).

    Attributes:
      mean, mean_q: E[x], E[x_q].
      cross, gram: E[x x_q^T], E[x_q x_q^T].
    """

    mean: Float64[Array, " k"]
    cross: Square
    mean_q: Float64[Array, " k"]
    gram: Square


def input_moments(
    name: str, got: Iterable[Tensors], wanted: list[Tensors], loudest: float
) -> Moments:
    """Adds up the moments of a tensor, batches (B, T, K), in float64.

    Args:
      name: of the tensor that linears read.
      got: the quantized model's tensors, batch by batch.
      wanted: the float model's; where there are none, x is x_q.
      loudest: as in `gptq.GptqSettings`.
    """
    read = [tensors[name] for tensors in got]
    weights = _token_weights([np.asarray(_squares(x_q)) for x_q in read], loudest)
    total: list[jax.Array] = []
    for i, (x_q, w) in enumerate(zip(read, weights, strict=True)):
        pairs = [(wanted[i][name], x_q), (x_q, x_q)] if wanted else [(x_q, x_q)]
        sums = [s for pair in pairs for s in _sums(*pair, jnp.asarray(w))]
        with jax.enable_x64(True):  # here alone: the passes themselves are float32
            total = _added(total or [jnp.zeros_like(s, jnp.float64) for s in sums], sums)
    count = sum(w.sum(dtype=np.float64) for w in weights)
    with jax.enable_x64(True):
        means = [s / np.float64(count) for s in total]
    return Moments(*(means if wanted else means * 2))


def _token_weights(
    squares: list[Float32[np.ndarray, "_ t"]], loudest: float
) -> list[Float32[np.ndarray, "_ t"]]:
    """min(1, loudest median |x|^2 / |x_t|^2) of every token; 1 of a token of zeros.

    >>> _token_weights([np.float32([[1, 1, 64, 0]])], 4.0)[0].tolist()
    [[1.0, 1.0, 0.0625, 1.0]]
    """
    limit = loudest * np.median(np.concatenate([x.ravel() for x in squares]))
    return [limit / np.maximum(x, limit) if limit else np.ones_like(x) for x in squares]


@jax.jit
def _squares(x: Float32[Array, "b t k"]) -> Float32[Array, "b t"]:
    """|x|^2 of every token."""
    return jnp.sum(jnp.square(x), axis=-1)


@jax.jit
def _sums(
    x: Float32[Array, "b t k"], y: Float32[Array, "b t k"], weights: Float32[Array, "b t"]
) -> tuple[Float32[Array, " k"], Float32[Array, "k k"]]:
    """sum w x and sum w x y^T over all tokens."""
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x * weights[..., None], y))
    return x.sum(0), jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _added(total: list[jax.Array], sums: list[jax.Array]) -> list[jax.Array]:
    """float64 totals plus float32 sums."""
    return [a + b.astype(jnp.float64) for a, b in zip(total, sums, strict=True)]
