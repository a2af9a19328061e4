"""Ranges of activations from calibration text, chosen by tensor class; ranges of weights by row.

Statistics are streamed: one batch of windows at a time through the float layers, and per tensor
only minimum, maximum, moments and a histogram are kept, so memory does not grow with the amount of
text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qnpu_jax.decoder import Decoder
from qnpu_jax.evaluate import Params, Tensors, passes
from qnpu_jax.graph import Graph
from qnpu_jax.ops import tied_inputs
from qnpu_jax.quant import Scales, from_range
from qnpu_jax.resolve import is_free

BINS = 1 << 14
"""Bins of a histogram: enough for 8 bins per code when the chosen range is an eighth of the
observed one."""


@dataclass
class Stats:
    """What is kept of one tensor: bounds, moments, and counts of bins of width `width` centred on
    0."""

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    width: float = 0.0
    bins: np.ndarray | None = None

    def add(self, x: np.ndarray, histogram: bool) -> None:
        """Takes values in; the histogram's width is a power of two that doubles when a value falls
        outside."""
        x = np.asarray(x, np.float32).ravel()
        low, high, total, squares = x.min(), x.max(), x.sum(dtype=np.float64), np.dot(x, x)
        self.merge(x.size, [low, high, total, squares])
        if histogram:
            bins = self.widen(float(max(-low, high)))
            index = np.floor(x * np.float32(1 / self.width)).astype(np.int32) + BINS // 2
            bins += np.bincount(index, minlength=BINS)

    def merge(self, count: int, moments: Any) -> None:
        """Takes in smallest, largest, sum and sum of squares of `count` values."""
        low, high, total, squares = (float(m) for m in moments)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += count
        self.total += total
        self.squares += squares

    def widen(self, bound: float) -> np.ndarray:
        """The histogram, with room for values up to `bound` on either side."""
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
"""Per free tensor (global name) one `Stats` per layer, a list of one outside the layer graph."""


def collect(
    dec: Decoder,
    params: Params,
    windows: Int[np.ndarray, "n t"],
    batch: int = 8,
    track: Callable[[Iterable[int], int, str], Iterable[int]] = lambda items, _, __: items,
    scales: Scales | None = None,
) -> Statistics:
    """Statistics of every free activation over the windows, prefix K/V included in those of the
    caches.

    Args:
      dec: staged for windows of T tokens.
      params: folded float parameters, with prefix K/V if dec has a prefix.
      windows: (N, T) token ids.
      batch: windows per pass.
      track: wraps the iteration, for a progress bar: (items, length, what).
      scales: what is quantized meanwhile (resolved), nothing by default.
    """
    stats: Statistics = {}
    starts = range(0, len(windows), batch)
    for start in track(starts, len(starts), "calibrate"):
        ids = jnp.asarray(windows[start : start + batch], jnp.int32)
        for graph, layer, env in passes(dec, params, ids, _produced, scales):
            _record(stats, graph, layer, env)
    for spec in dec.layer.named("param"):
        name = "layers." + dec.layer.ties[spec.name]
        if name in stats:  # prefix K/V share the scale of the cache
            for layer, x in enumerate(params["layers." + spec.name]):
                stats[name][layer].add(np.asarray(x), stats[name][layer].bins is not None)
    return stats


@lru_cache(maxsize=64)
def _members(graph: Graph) -> dict[str, list[str]]:
    """Free activations and the tensors whose values their range must cover.

    Movement ops only copy, so the members that count are those that another op produces (the heads
    of `mixed`).
    """
    copies = {n.output for n in graph.nodes if tied_inputs(n.op, n.inputs)}
    out: dict[str, list[str]] = {}
    for spec in graph.named("activation"):
        root = graph.ties[spec.name]
        if is_free(graph, root) and spec.name not in copies:
            out.setdefault(root, []).append(spec.name)
    return out


def _produced(graph: Graph) -> tuple[str, ...]:
    return tuple(name for members in _members(graph).values() for name in members)


def _record(stats: Statistics, graph: Graph, layer: int, env: Tensors) -> None:
    """Takes a layer's tensors in. They are summed and counted where they are: to fetch them would
    take most of the time."""
    rows: dict[str, Stats] = {}  # by member
    narrow: dict[str, jax.Array] = {}
    moments = jax.device_get(_moments({name: env[name] for name in _produced(graph)}))
    for root, members in _members(graph).items():
        kept = stats.setdefault(graph.prefix + root, [])
        if len(kept) == layer:
            kept.append(Stats())
        quant = graph[root].quant
        assert quant is not None
        for name in members:
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
    """Smallest, largest, sum and sum of squares of each."""
    return jax.tree.map(
        lambda x: jnp.stack([x.min(), x.max(), x.sum(), jnp.square(x).sum()]), tensors
    )


@jax.jit
def _counts(tensors: Tensors, widths: Tensors) -> Tensors:
    """Values of each tensor in each of BINS bins of its width, centred on 0."""

    def count(x: Array, width: Array) -> Array:
        index = jnp.floor(x.ravel() * (1 / width)).astype(jnp.int32) + BINS // 2
        return jnp.zeros(BINS, jnp.int32).at[index].add(1)

    return jax.tree.map(count, tensors, widths)


_ROTATED = {
    "layers.attn.input",
    "layers.attn.v",
    "layers.attn.kv0.mixed",
    "layers.attn.o",
    "layers.mlp.input",
    "layers.mlp.down",
    "head.input",
}


def tensor_class(name: str, bits: int) -> str:
    """`wide` (16 bits), `probs`, `cache`, `rotated` (near Gaussian after R1/R2) or `unrotated`
    (heavy tails)."""
    if bits > 8:
        return "wide"
    if name.endswith(".probs"):
        return "probs"
    if name in ("layers.attn.k_cache", "layers.attn.v_cache"):
        return "cache"
    return "rotated" if is_rotated(name) else "unrotated"


def is_rotated(name: str) -> bool:
    """True for free activations in a rotated basis: inputs of the linears but down's, outputs of
    v, o and down (Quant.npu's rotated tensors)."""
    return name in _ROTATED


def initialize(
    dec: Decoder, stats: Statistics, method: str, tame: bool
) -> tuple[Scales, list[dict[str, object]]]:
    """Scales of every free activation from its statistics, and one report row per tensor and layer.

    16 bits: min-max. Attention probabilities: [0, 1]. Others by `method`; `class` means the MSE
    grid where massive tokens are out of the graph or the tensor is rotated, and min-max otherwise:
    clipping an attention sink destroys the model (SmolLM2-135M: perplexity 19,752).

    Args:
      method: as `recipes.Recipe.activation_init`.
      tame: a prefix keeps massive tokens out of the graph.
    """
    scales: Scales = {}
    report: list[dict[str, object]] = []
    for graph in dec.graphs:
        for root in _members(graph):
            name = graph.prefix + root
            quant = graph[root].quant
            assert quant is not None
            ranges = []
            for bits, s in zip(quant.bits, stats[name], strict=True):
                kind = tensor_class(name, bits)
                chosen = _method(kind, method, tame)
                ranges.append(_range(s, chosen, bits, quant.symmetric))
                report.append(
                    {"tensor": name, "class": kind, "method": chosen, "low": s.low, "high": s.high}
                )
            lo, hi = (np.asarray(v) for v in zip(*ranges, strict=True))
            q = from_range(lo, hi, np.asarray(quant.bits), quant.symmetric)
            layered = graph.prefix == "layers."
            scales[name] = q if layered else jax.tree.map(lambda a: a[0], q)
    return scales, report


def _method(kind: str, asked: str, tame: bool) -> str:
    if kind == "wide":
        return "minmax"
    if kind == "probs":
        return "unit"
    if asked == "sigma-rotated":
        return "sigma" if kind == "rotated" else "minmax"
    if asked != "class":
        return asked
    return "mse" if tame or kind == "rotated" else "minmax"


def _range(s: Stats, method: str, bits: int, symmetric: bool) -> tuple[float, float]:
    match method:
        case "minmax":
            return s.low, s.high
        case "unit":
            return 0.0, 1.0
        case "sigma":
            lo, hi = s.mean - 3 * s.std, s.mean + 3 * s.std
            return max(lo, s.low), min(hi, s.high)
        case "mse":
            return mse_range(s, bits, symmetric)
    raise AssertionError(method)


def mse_range(s: Stats, bits: int, symmetric: bool) -> tuple[float, float]:
    """The bounds of least mean squared quantization error on the histogram.

    Both bounds are shrunk together first, then each alone, in 2% steps of the observed range.
    """
    assert s.bins is not None
    used = np.nonzero(s.bins)[0]
    x = (used - BINS // 2 + 0.5) * s.width
    weight = s.bins[used].astype(np.float64)
    steps = np.linspace(0.02, 1.0, 50)
    if symmetric:
        bound = max(-s.low, s.high)
        best = _least(x, weight, -bound * steps, bound * steps, bits, True)
        return -bound * steps[best], bound * steps[best]
    low, high = min(s.low, 0.0), max(s.high, 0.0)
    best = steps[_least(x, weight, low * steps, high * steps, bits, False)]
    lo, hi = low * best, high * best
    for _ in range(2):
        lows = low * steps
        lo = lows[_least(x, weight, lows, np.full_like(lows, hi), bits, False)]
        highs = high * steps
        hi = highs[_least(x, weight, np.full_like(highs, lo), highs, bits, False)]
    return float(lo), float(hi)


def _least(x, weight, lo, hi, bits: int, symmetric: bool) -> int:
    """Index of the candidate range with the least weighted squared error."""
    q = from_range(lo, hi, bits, symmetric)
    scale, zero = q.scale[:, None].astype(np.float64), q.zero_point[:, None]
    qmax = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(x[None, :] / scale) + zero, -qmax - 1, qmax)
    return int(np.argmin((((codes - zero) * scale - x[None, :]) ** 2) @ weight))


def weight_scales(dec: Decoder, params: Params, method: str) -> Scales:
    """Symmetric scales of every weight: per output channel for linears, per tensor for the
    embedding table."""
    scales: Scales = {}
    for graph in dec.graphs:
        for spec in graph.named("param"):
            if not is_free(graph, spec.name):
                continue
            assert spec.quant is not None
            w = np.asarray(params[graph.prefix + spec.name])
            stack = w if graph.prefix == "layers." else w[None]
            per_tensor = spec.quant.axis is None
            rows = [
                _weight_bound(layer.reshape(1, -1) if per_tensor else layer, bits, method)
                for layer, bits in zip(stack, spec.quant.bits, strict=True)
            ]
            bound = np.stack(rows)
            bits = np.asarray(spec.quant.bits)[:, None]
            q = from_range(-bound, bound, bits, symmetric=True, narrow=True)
            if per_tensor:
                q = jax.tree.map(lambda a: a[:, 0], q)
            scales[graph.prefix + spec.name] = (
                q if graph.prefix == "layers." else jax.tree.map(lambda a: a[0], q)
            )
    return scales


def _weight_bound(
    w: Float[np.ndarray, "rows k"], bits: int, method: str
) -> Float[np.ndarray, " rows"]:
    """max |w| that the code range shall cover, per row of w (rows, K)."""
    peak = np.abs(w).max(axis=1)
    match method:
        case "minmax":
            return peak
        case "sigma":
            mean, std = w.mean(axis=1), w.std(axis=1)
            return np.minimum(np.abs(mean) + 3 * std, peak)
        case "mse":
            return np.asarray(
                _mse_bound(jnp.asarray(w), jnp.asarray(peak), jnp.float32(2 ** (bits - 1) - 1))
            )
    raise AssertionError(method)


@jax.jit
def _mse_bound(
    w: Float[Array, "rows k"], peak: Float[Array, " rows"], qmax: Float[Array, ""]
) -> Float[Array, " rows"]:
    """The shrink of `peak` in 1% steps from 30% that minimises sum (w_q - w)^2 of each row."""

    def error(shrink: jax.Array) -> jax.Array:
        scale = jnp.maximum(peak * shrink, 1e-30)[:, None] / qmax
        q = jnp.clip(jnp.round(w / scale), -qmax, qmax) * scale
        return jnp.sum((q - w) ** 2, axis=1)

    steps = jnp.linspace(0.3, 1.0, 71)
    return peak * steps[jnp.argmin(jax.lax.map(error, steps), axis=0)]
