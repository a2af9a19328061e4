"""Streamed statistics of every activation: moments, extremes and histograms.

One batch of windows at a time goes through the layers, and per tensor only minimum, maximum,
moments and a histogram are kept, so that memory does not grow with the amount of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import passes, windows_at_once
from qnpu_jax.graph import Decoder, Graph, Params, Scales, Tensors, is_free, tied_inputs
from qnpu_jax.progress import Track, untracked

BINS = 1 << 14
"""Bins of a histogram: enough for 8 bins per code when the chosen range is an eighth of the
observed one."""
NOT_FINITE = (
    "holds NaN or Inf on the calibration text; expected finite activations; check the model file"
    " and the recipe's factors"
)


@dataclass
class Stats:
    """Statistics of one tensor.

    Attributes:
      low, high: smallest and largest value.
      count: number of values.
      total, squares: their sum, and the sum of their squares.
      width: width of a bin, a power of two.
      bins: counts of BINS bins centred on 0; None where no histogram is kept.

    Example:
      >>> s = Stats()
      >>> s.add(np.asarray([-1.0, 3.0]), histogram=False)
      >>> s.low, s.high, s.mean, s.std
      (-1.0, 3.0, 1.0, 2.0)
    """

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    width: float = 0.0
    bins: np.ndarray | None = None

    def add(self, x: np.ndarray, histogram: bool) -> None:
        """Adds values; the histogram's bins double in width when a value falls outside."""
        x = np.asarray(x, np.float32).ravel()
        low, high, total, squares = x.min(), x.max(), x.sum(dtype=np.float64), np.dot(x, x)
        self.merge(x.size, [low, high, total, squares])
        if histogram:
            bins = self.widen(float(max(-low, high)))
            index = np.floor(x * np.float32(1 / self.width)).astype(np.int32) + BINS // 2
            bins += np.bincount(index, minlength=BINS)

    def merge(self, count: int, moments: Any) -> None:
        """Adds `count` values by their smallest, largest, sum and sum of squares."""
        low, high, total, squares = (float(m) for m in moments)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += count
        self.total += total
        self.squares += squares

    def widen(self, bound: float) -> np.ndarray:
        """Makes room in the histogram for values up to `bound` on either side, and returns it.

        Raises:
          UserError: a bound that is not finite, for which no histogram is wide enough.
        """
        if not np.isfinite(bound):
            raise UserError(NOT_FINITE)
        if self.bins is None:
            self.bins = np.zeros(BINS, np.int64)
            self.width = 2.0 ** np.ceil(np.log2(max(bound, 1e-30) * 2.0 / BINS) + 1e-9)
        while bound >= self.width * (BINS // 2):
            folded = self.bins.reshape(-1, 2).sum(axis=1)
            self.bins = np.zeros(BINS, np.int64)
            self.bins[BINS // 4 : BINS // 4 + BINS // 2] = folded
            self.width *= 2
        return self.bins

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        return float(np.sqrt(max(self.squares / self.count - self.mean**2, 0.0)))


Statistics = dict[str, list[Stats]]
"""By global name of a free tensor: one `Stats` per layer, a list of one outside the layer graph."""


def collect_statistics(
    dec: Decoder,
    params: Params,
    windows: Int[np.ndarray, "n t"],
    batch: int | None = None,
    track: Track = untracked,
    scales: Scales | None = None,
    onto: Statistics | None = None,
) -> Statistics:
    """Collects statistics of every free activation over the windows.

    Those of the KV caches include the prefix's keys and values, once.

    Args:
      dec: staged for windows of T tokens.
      params: folded float parameters, with prefix K/V if dec has a prefix.
      windows: (N, T) token ids.
      batch: windows per pass; None for as many as there is memory for.
      track: wraps the iteration, for a progress bar.
      scales: resolved QParams of the tensors that are fake-quantized meanwhile; by default none.
      onto: statistics of other windows by the same decoder and parameters, to which these are
        added; by default none.
    """
    stats: Statistics = {} if onto is None else onto
    batch = batch or windows_at_once(dec.config, dec.tokens, len(windows))
    starts = range(0, len(windows), batch)
    for start in track(starts, len(starts), "calibrate"):
        ids = jnp.asarray(windows[start : start + batch], jnp.int32)
        for graph, layer, env in passes(dec, params, ids, _produced, scales):
            _record(stats, graph, layer, env)
    for spec in dec.layer.named("param") if onto is None else ():
        name = "layers." + dec.layer.ties[spec.name]
        if name in stats:  # prefix K/V share the scale of the cache
            for layer, x in enumerate(params["layers." + spec.name]):
                if not np.isfinite(x).all():
                    raise UserError(f"layers.{spec.name}, layer {layer}: {NOT_FINITE}")
                stats[name][layer].add(np.asarray(x), stats[name][layer].bins is not None)
    return stats


@lru_cache(maxsize=64)
def free_activations(graph: Graph) -> dict[str, list[str]]:
    """Maps each free activation to the tensors whose values its range must cover, by local names.

    Tied tensors share a range (the heads of `mixed`). Those that a movement op makes are left out:
    it only copies values of the others.
    """
    copies = {n.output for n in graph.nodes if tied_inputs(n.op, n.inputs)}
    out: dict[str, list[str]] = {}
    for spec in graph.named("activation"):
        root = graph.ties[spec.name]
        if is_free(graph, root) and spec.name not in copies:
            out.setdefault(root, []).append(spec.name)
    return out


def _produced(graph: Graph) -> tuple[str, ...]:
    return tuple(name for members in free_activations(graph).values() for name in members)


def _record(stats: Statistics, graph: Graph, layer: int, env: Tensors) -> None:
    """Adds a layer's tensors to the statistics.

    Sums and counts are made on the device: fetching the tensors would take most of the time.
    """
    rows: dict[str, Stats] = {}  # by member
    narrow: dict[str, jax.Array] = {}
    moments = jax.device_get(_moments({name: env[name] for name in _produced(graph)}))
    for root, members in free_activations(graph).items():
        kept = stats.setdefault(graph.prefix + root, [])
        if len(kept) == layer:
            kept.append(Stats())
        quant = graph[root].quant
        for name in members:
            if not np.isfinite(moments[name][:2]).all():
                raise UserError(f"{graph.prefix}{name}, layer {layer}: {NOT_FINITE}")
            rows[name] = kept[layer]
            kept[layer].merge(env[name].size, moments[name])
            if quant.bits[layer] <= 8:
                narrow[name] = env[name]
                kept[layer].widen(float(np.abs(moments[name][:2]).max()))
    widths = {name: np.float32(rows[name].width) for name in narrow}
    for name, counts in jax.device_get(_counts(narrow, widths)).items():
        rows[name].bins += counts


@jax.jit
def _moments(tensors: Tensors) -> Tensors:
    """Smallest, largest, sum and sum of squares of each tensor."""
    return jax.tree.map(
        lambda x: jnp.stack([x.min(), x.max(), x.sum(), jnp.square(x).sum()]), tensors
    )


@jax.jit
def _counts(tensors: Tensors, widths: Tensors) -> Tensors:
    """Histogram of each tensor: BINS bins of the given width, centred on 0."""

    def count(x: Array, width: Array) -> Array:
        index = jnp.floor(x.ravel() * (1 / width)).astype(jnp.int32) + BINS // 2
        return jnp.zeros(BINS, jnp.int32).at[index].add(1)

    return jax.tree.map(count, tensors, widths)
