"""Coverage: which windows of a pool show every activation its largest values.

A static range is set by the largest values that calibration sees. A few windows that were chosen
show each tensor as much as many that were drawn: statistics of a small set cost little.

Reference: COVERCAL (arXiv 2604.24008), calibration sets by greedy coverage of activations; Minoux
1978, lazy evaluation of the gains; Nemhauser, Wolsey and Fisher 1978, the bound of the greedy set.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int

from qnpu_jax.calibrate.statistics import free_activations
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import passes, windows_at_once
from qnpu_jax.graph import Decoder, Graph, Params, Tensors
from qnpu_jax.progress import Track, untracked

Peaks = dict[str, Float32[np.ndarray, "n l"]]
"""Largest |x|, real values, of N windows by layer (one outside the layer graph), by global name of
a free tensor."""
SERVED = 3
"""Tensors that are named for each chosen window."""


class Served(NamedTuple):
    """A tensor of one layer, and the gain in F that a chosen window brought by it."""

    tensor: str
    layer: int
    gain: float


@dataclass(frozen=True)
class Coverage:
    """Windows in the order in which they were chosen.

    Attributes:
      windows: indices in the pool.
      curve: F, 0 to 1, after each of them.
      serves: of each, the tensors with the largest gains, SERVED at most; none where nothing was
        left to gain.
    """

    windows: tuple[int, ...]
    curve: tuple[float, ...]
    serves: tuple[tuple[Served, ...], ...]


def window_peaks(
    dec: Decoder,
    params: Params,
    windows: Int[np.ndarray, "n t"],
    batch: int | None = None,
    track: Track = untracked,
) -> Peaks:
    """Measures m_ts = max |x| of every free activation t, layer by layer, on each window s.

    Tied tensors share a range, and so one peak. The KV caches hold the prefix's keys and values in
    every window, whose peaks therefore are no less than theirs.

    Args:
      dec, params, windows, batch, track: as of `statistics.collect_statistics`.
    """
    batch = batch or windows_at_once(dec.config, dec.tokens, len(windows))
    starts = range(0, len(windows), batch)
    found: list[dict[str, list[np.ndarray]]] = []
    for start in track(starts, len(starts), "peaks"):
        ids = jnp.asarray(windows[start : start + batch], jnp.int32)
        rows: dict[str, list[jax.Array]] = {}
        for graph, _, env in passes(dec, params, ids, _members):
            values = {name: env[name] for name in _members(graph)}
            for root, peak in _peaks(graph, values).items():
                rows.setdefault(graph.prefix + root, []).append(peak)
        found.append(jax.device_get(rows))  # once a batch: fetching waits for the device
    peaks = {
        name: np.concatenate([np.stack(part[name], axis=1) for part in found]) for name in found[0]
    }
    for spec in dec.layer.named("param"):
        name = "layers." + dec.layer.ties[spec.name]
        if name in peaks:  # prefix K/V, by layer
            held = np.abs(np.asarray(params["layers." + spec.name]))
            peaks[name] = np.maximum(peaks[name], held.reshape(len(held), -1).max(axis=1))
    return peaks


def _members(graph: Graph) -> tuple[str, ...]:
    return tuple(name for members in free_activations(graph).values() for name in members)


@partial(jax.jit, static_argnums=0)
def _peaks(graph: Graph, tensors: Tensors) -> Tensors:
    """Largest |x| of each window, by root: over all axes but the batch, and over tied tensors."""

    def peak(name: str) -> jax.Array:
        x = tensors[name]
        return jnp.abs(x).reshape(len(x), -1).max(axis=1)

    groups = free_activations(graph).items()
    return {root: jnp.stack([*map(peak, some)]).max(axis=0) for root, some in groups}


def cover(
    peaks: Mapping[str, Float32[np.ndarray, "n l"]],
    count: int,
    weights: Mapping[str, float] | None = None,
    quantile: float = 1.0,
) -> Coverage:
    """Chooses windows by greedy maximisation of

    F(S) = sum_t w_t min(1, max_(s in S) m_ts / q_t),

    with q_t the given quantile of m_ts over the pool: what the range of t must reach. F is monotone
    and submodular, so the greedy set has at least 1 - 1/e of the most that as many windows reach
    (Nemhauser, Wolsey and Fisher 1978). Gains only fall as the set grows: an outdated one is an
    upper bound, and is computed anew only where it leads (Minoux 1978).

    Of equal gains the earlier window is taken; so where all is covered, the first of the pool
    follow. A tensor that is 0 on the whole pool is covered by any window.

    >>> peaks = {"a": np.array([[1], [4], [3]], "f"), "b": np.array([[4], [0], [4]], "f")}
    >>> found = cover(peaks, 2)
    >>> found.windows, found.curve
    ((2, 1), (0.875, 1.0))

    Args:
      peaks: m_ts, as `window_peaks` gives them.
      count: windows to choose; all of the pool where it has fewer.
      weights: w_t by tensor name, 0 or more, the same in each of its layers; 1 for those that are
        not named. They are normalised to sum to 1 over tensors and layers.
      quantile: 0 to 1. The default is the pool's maximum: what a range of min-max over the whole
        pool would reach.

    Raises:
      UserError: no peaks or pools of different sizes, peaks that are not finite, a count below 1, a
        quantile outside 0 to 1, weights of tensors that have no peaks, negative ones, or none
        above 0.
    """
    return _greedy(*_table(peaks, count, weights or {}, quantile), count)


def coverage_of(
    peaks: Mapping[str, Float32[np.ndarray, "n l"]],
    windows: Sequence[int],
    weights: Mapping[str, float] | None = None,
    quantile: float = 1.0,
) -> float:
    """Evaluates F, 0 to 1, on any set of windows.

    >>> coverage_of({"a": np.array([[1], [4], [3]], "f")}, [0, 2])
    0.75

    Args: as of `cover`; the windows by their indices, one at least.
    """
    _, shares, weight = _table(peaks, len(windows), weights or {}, quantile)
    return float((weight * shares[list(windows)].max(axis=0)).sum())


def _greedy(
    labels: list[tuple[str, int]],
    shares: Float64[np.ndarray, "n t"],
    weight: Float64[np.ndarray, " t"],
    count: int,
) -> Coverage:
    """Takes the window of the largest gain until there are enough, or no more."""
    covered = np.zeros(len(labels))

    def gains(window: int) -> Float64[np.ndarray, " t"]:
        return weight * np.maximum(shares[window] - covered, 0.0)

    # Rounded sums in one fixed order are monotone in each term: an outdated sum bounds the new one
    # in float64 too, and the order is that of the plain greedy algorithm to the last bit.
    heap = [(-float(gains(i).sum()), i, 0) for i in range(len(shares))]
    heapq.heapify(heap)
    windows: list[int] = []
    curve: list[float] = []
    serves: list[tuple[Served, ...]] = []
    while heap and len(windows) < count:
        _, window, counted = heapq.heappop(heap)
        own = gains(window)
        if counted < len(windows):
            heapq.heappush(heap, (-float(own.sum()), window, len(windows)))
            continue
        covered = np.maximum(covered, shares[window])
        windows.append(window)
        curve.append(float((weight * covered).sum()))
        top = np.argsort(-own, kind="stable")[:SERVED]
        named = ((*labels[t], float(own[t])) for t in top if own[t] > 0)
        serves.append(tuple(Served(name, layer, gain) for name, layer, gain in named))
    return Coverage(tuple(windows), tuple(curve), tuple(serves))


def _table(
    peaks: Mapping[str, np.ndarray], count: int, weights: Mapping[str, float], quantile: float
) -> tuple[list[tuple[str, int]], Float64[np.ndarray, "n t"], Float64[np.ndarray, " t"]]:
    """Tensors of layers as (name, layer); min(1, m_ts / q_t); weights that sum to 1."""
    _check(peaks, count, weights, quantile)
    labels = [(name, layer) for name, rows in peaks.items() for layer in range(rows.shape[1])]
    table = np.concatenate([np.asarray(rows, np.float64) for rows in peaks.values()], axis=1)
    reach = np.quantile(table, quantile, axis=0)
    shares = np.ones_like(table)
    np.divide(table, reach, out=shares, where=reach > 0)
    weight = np.asarray([weights.get(name, 1.0) for name, _ in labels], np.float64)
    return labels, np.minimum(shares, 1.0), weight / weight.sum()


def _check(
    peaks: Mapping[str, np.ndarray], count: int, weights: Mapping[str, float], quantile: float
) -> None:
    sizes = {len(rows) for rows in peaks.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise UserError(
            f"peaks: tensors with {sorted(sizes)} windows; expected one number, 1 or more, for all;"
            " take them from one call of `window_peaks`"
        )
    for name, rows in peaks.items():
        if not np.isfinite(rows).all():
            raise UserError(
                f"{name}: its peaks are not finite; expected finite values; leave out the windows"
                " on which the float model overflows"
            )
    if count < 1:
        raise UserError(f"count: expected at least 1 window; got {count}; choose more")
    if not 0 <= quantile <= 1:
        raise UserError(f"quantile: expected 0 to 1; got {quantile}; change it")
    if unknown := sorted(weights.keys() - peaks.keys()):
        raise UserError(
            f"weights: {unknown[0]} has no peaks; expected some of {', '.join(sorted(peaks))};"
            " remove or correct it"
        )
    kept = [weights.get(name, 1.0) for name in peaks]
    if not all(0 <= w < np.inf for w in kept) or not any(kept):
        raise UserError(
            f"weights: {dict(weights)}; expected finite ones of 0 or more, one of them above 0;"
            " change them"
        )
