"""Calibration windows that together drive every activation near the extremes it has in a text.

A static range holds for the values that it was set on. Of a pool of windows, those are chosen whose
peaks cover the pool's: m_st = max |x_t| in window s, q_t a high quantile of m_st over the pool, and

    F(S) = sum_t w_t min(1, max_{s in S} m_st / q_t)

F is monotone and submodular, so taking the window of greatest gain again and again reaches at least
1 - 1/e of the best choice of so many windows (Nemhauser et al., 1978).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qnpu_jax.calibrate.statistics import free_activations
from qnpu_jax.fakequant import passes, windows_at_once
from qnpu_jax.graph import Decoder, Graph, Params, Tensors
from qnpu_jax.progress import Track, untracked


class Peaks(NamedTuple):
    """Largest magnitude of every activation in every window.

    Attributes:
      names: of the tensors, with the layer's number; those that share a range are one.
      values: real values (windows, tensors), 0 or more.
    """

    names: tuple[str, ...]
    values: Float[np.ndarray, "n t"]


class Chosen(NamedTuple):
    """Windows in the order in which they were chosen.

    Attributes:
      windows: their indices in the pool.
      coverage: F after each, from 0 to 1.
      gains: of each window, what each tensor gained by it, before weighting.
    """

    windows: Int[np.ndarray, " k"]
    coverage: Float[np.ndarray, " k"]
    gains: Float[np.ndarray, "k t"]


def window_peaks(
    dec: Decoder, params: Params, windows: Int[np.ndarray, "n t"], track: Track = untracked
) -> Peaks:
    """Runs the float model on a pool of windows, and keeps max |x| of every free activation.

    Args:
      dec: staged for windows of T tokens.
      params: folded float parameters, with prefix K/V if dec has a prefix.
      windows: (N, T) token ids.
      track: wraps the iteration, for a progress bar.
    """
    size = windows_at_once(dec.config, dec.tokens, len(windows))
    starts = range(0, len(windows), size)
    rows: list[np.ndarray] = []
    names: list[str] = []
    for start in track(starts, len(starts), "peaks"):
        ids = jnp.asarray(windows[start : start + size], jnp.int32)
        columns, names = [], []
        for graph, layer, env in passes(dec, params, ids, _members):
            found = jax.device_get(_peaks({n: env[n] for n in _members(graph)}))
            for root, members in free_activations(graph).items():
                names.append(graph.global_name(layer, root))
                columns.append(np.max([found[name] for name in members], axis=0))
        rows.append(np.stack(columns, axis=1))
    return Peaks(tuple(names), np.concatenate(rows))


def _members(graph: Graph) -> tuple[str, ...]:
    return tuple(name for members in free_activations(graph).values() for name in members)


@jax.jit
def _peaks(tensors: Tensors) -> dict[str, Array]:
    """max |x| of each window, the first axis."""
    return {n: jnp.max(jnp.abs(x.reshape(len(x), -1)), axis=1) for n, x in tensors.items()}


def choose_windows(
    peaks: Float[np.ndarray, "n t"],
    count: int,
    weights: Float[np.ndarray, " t"] | None = None,
    quantile: float = 0.99,
) -> Chosen:
    """Chooses windows greedily by what they add to F; equal gains take the earlier window.

    >>> peaks = np.array([[1.0, 0.0], [0.9, 0.9], [0.0, 1.0]])
    >>> choose_windows(peaks, 2, quantile=1.0).windows.tolist()
    [1, 0]

    Args:
      peaks: `Peaks.values`.
      count: of windows, at most all.
      weights: of tensors, 0 or more; None takes all alike.
      quantile: that each tensor is covered up to.
    """
    pool, tensors = peaks.shape
    weights = np.ones(tensors) if weights is None else np.asarray(weights, np.float64)
    weights = weights / weights.sum()
    most = np.quantile(peaks, quantile, axis=0)
    shares = np.minimum(1.0, peaks / np.where(most > 0, most, np.inf))
    covered, left = np.where(most > 0, 0.0, 1.0), np.ones(pool, bool)
    chosen, coverage, gains = [], [], []
    for _ in range(min(count, pool)):
        gain = np.maximum(shares - covered, 0.0)
        total = np.where(left, gain @ weights, -1.0)
        best = int(np.argmax(total))
        left[best] = False
        covered = np.maximum(covered, shares[best])
        chosen.append(best)
        coverage.append(float(covered @ weights))
        gains.append(gain[best])
    return Chosen(np.array(chosen), np.array(coverage), np.array(gains))
