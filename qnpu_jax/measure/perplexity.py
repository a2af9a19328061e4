"""Perplexity of a reading of a model, and the divergence between two readings.

A reading is any way to compute the model's logits: in float, fake-quantized, by the integer
simulator, or by LiteRT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.fakequant import forward, token_nll
from qnpu_jax.graph import Params, decoder
from qnpu_jax.integer import IntegerModel, activation_scales, dequantize

Logits = Callable[[np.ndarray], Any]
"""A reading: maps token ids (T,) or (B, T) to logits (.., T, V), real values."""


def perplexity(
    logits: Logits, windows: np.ndarray, batch: int | None = None, track: Any = None
) -> float:
    """Computes exp(mean -log p(next token)) over windows of token ids.

    The first token of each window is not scored, as nothing stands before it.

    >>> always_sure = lambda ids: 100.0 * jax.nn.one_hot(jnp.roll(ids, -1), 8)
    >>> perplexity(always_sure, np.array([[1, 2, 3], [4, 5, 6]]))
    1.0

    Args:
      logits: the reading.
      windows: token ids (N, T).
      batch: windows per call; None passes single windows (T,).
      track: wraps the iteration, for a progress bar: (items, length).

    Returns:
      The perplexity, 1 or more.
    """
    total = 0.0
    for ids in _batches(windows, batch, track):
        total += float(jnp.sum(_sum_nll(jnp.asarray(logits(ids)), jnp.asarray(ids, jnp.int32))))
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1))))


@jax.jit
def _sum_nll(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Sums of the windows, (B,)."""
    flat = logits.reshape(-1, *logits.shape[-2:])
    return jnp.sum(jax.vmap(token_nll)(flat, ids.reshape(-1, ids.shape[-1])), axis=1)


@dataclass(frozen=True)
class Divergence:
    """Distance between the predictions of two readings, as means over positions.

    Attributes:
      kl: KL(reference || other) in nats, 0 or more.
      top1: fraction of positions where both find the same token most likely, 0 to 1.
    """

    kl: float
    top1: float


def divergence(
    reference: Logits,
    other: Logits,
    windows: np.ndarray,
    batch: int | None = None,
    track: Any = None,
) -> Divergence:
    """Computes KL(p || q) = sum_v p_v log(p_v / q_v) and how often argmax agrees, over positions.

    Of equal largest logits, which integers often have, the first counts, as in a greedy decoder.

    Args:
      reference: the reading that gives p.
      other: the reading that gives q.
      windows: token ids (N, T). The last position of each counts too: no next token is needed.
      batch: windows per call; None passes single windows (T,).
      track: wraps the iteration, for a progress bar: (items, length).
    """
    kl, same = 0.0, 0
    for ids in _batches(windows, batch, track):
        kl_sum, same_sum = _compare(jnp.asarray(reference(ids)), jnp.asarray(other(ids)))
        kl += float(kl_sum)
        same += int(same_sum)
    return Divergence(kl / windows.size, same / windows.size)


@dataclass(frozen=True)
class Comparison:
    """What `compare` reads.

    Attributes:
      reference, other: perplexities of the two.
      divergence: of the other from the reference.
      stderr: standard error of log(other / reference), of the mean over windows; 0 of one window.
    """

    reference: float
    other: float
    divergence: Divergence
    stderr: float


def compare(
    reference: Logits, other: Logits, windows: np.ndarray, batch: int | None = None
) -> Comparison:
    """Computes both perplexities and the divergence in one pass over the text.

    Args: as of `divergence`; windows of at least two tokens.
    """
    nll: tuple[list[float], list[float]] = [], []  # sums of each window

    def counted(logits: Logits, index: int) -> Logits:
        def read(ids: np.ndarray) -> jax.Array:
            found = jnp.asarray(logits(ids))
            nll[index].extend(np.ravel(_sum_nll(found, jnp.asarray(ids, jnp.int32))).tolist())
            return found

        return read

    found = divergence(counted(reference, 0), counted(other, 1), windows, batch)
    by_window = np.asarray(nll) / (windows.shape[1] - 1)
    p, q = np.exp(by_window.mean(axis=1))
    difference, n = by_window[1] - by_window[0], len(windows)
    stderr = float(np.std(difference, ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return Comparison(float(p), float(q), found, stderr)


@jax.jit
def _compare(p_logits: jax.Array, q_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums KL in nats and equal argmax over positions."""
    same = jnp.argmax(p_logits, axis=-1) == jnp.argmax(q_logits, axis=-1)
    return jnp.sum(kl_terms(p_logits, q_logits)), jnp.sum(same)


def kl_terms(p_logits: Float[Array, "*b v"], q_logits: Float[Array, "*b v"]) -> jax.Array:
    """Computes terms (.., V) that sum to KL(p || q) in nats at every position.

    As sum p = sum q = 1, KL = sum p (e^-d - 1 + d) with d = log p - log q. None of these terms is
    negative, and errors of the normalisers cancel to first order. The usual sum of p d would lose a
    small KL in the rounding of terms that are larger and of both signs.

    Args:
      p_logits, q_logits: logits of p and q, real values.
    """
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (p_logits, q_logits))
    p, q, d = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
    # Where q is far larger than p, e^-d overflows, but p e^-d = q does not. At p = 0 the term is q.
    near = p * (jnp.expm1(-jnp.maximum(d, -1.0)) + d)
    return jnp.where(p == 0, q, jnp.where(d < -1.0, q - p + p * d, near))


def mean_kl(p_logits: Float[Array, "t v"], q_logits: Float[Array, "t v"]) -> Float[Array, ""]:
    """Computes the mean of KL(p || q) over positions, nats per position."""
    return jnp.sum(kl_terms(p_logits, q_logits)) / len(q_logits)


def _batches(windows: np.ndarray, batch: int | None, track: Any) -> Iterator[np.ndarray]:
    starts: Iterable[int] = range(0, len(windows), batch or 1)
    for start in track(starts, len(range(0, len(windows), batch or 1))) if track else starts:
        yield windows[start : start + batch] if batch else windows[start]


def float_logits(config: ModelConfig, plan: BitPlan, params: Params) -> Logits:
    """Reads a model in float.

    Args:
      plan: any bits; the graph needs some, and float evaluation ignores them.
      params: folded parameters (`fold_norms`). Prefix keys and values, if there are any, stand
        before every input.
    """
    prefix = params.get("layers.attn.prefix_k")
    length = 0 if prefix is None else prefix.shape[2]

    def logits(ids: np.ndarray) -> jax.Array:
        dec = decoder(config, plan, ids.shape[-1], length)
        return _forward(dec, dict(params), jnp.asarray(ids, jnp.int32), None)

    return logits


def fake_quant_logits(model: IntegerModel) -> Logits:
    """Reads a frozen model in float arithmetic with every tensor rounded to its integer grid."""
    real = dequantize(model)  # each array leaves it once it is on the device
    params = {n: jax.device_put(real.pop(n)).block_until_ready() for n in list(real)}
    scales = jax.tree.map(jnp.asarray, activation_scales(model))

    def logits(ids: np.ndarray) -> jax.Array:
        dec = model.decoder(ids.shape[-1])
        return _forward(dec, params, jnp.asarray(ids, jnp.int32), scales)

    return logits


@partial(jax.jit, static_argnums=0)
def _forward(dec: Any, params: Params, ids: jax.Array, scales: Any) -> jax.Array:
    def one(ids: jax.Array) -> jax.Array:
        return forward(dec, params, ids, scales)

    return jax.vmap(one)(ids) if ids.ndim == 2 else one(ids)


def integer_logits(model: IntegerModel, run: Callable[[np.ndarray], Any]) -> Logits:
    """Reads a frozen model in integers: logit = scale (code - zero_point).

    Args:
      run: maps token ids to codes of the logits: the simulator, or LiteRT.
    """
    head = model.tensors["head.logits"]
    scale, zero_point = np.float32(head.scale), np.int32(head.zero_point)

    def logits(ids: np.ndarray) -> jax.Array:
        codes = jnp.asarray(run(ids))
        return (codes.astype(jnp.int32) - zero_point).astype(jnp.float32) * scale

    return logits
