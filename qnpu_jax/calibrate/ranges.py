"""Ranges: of activations from statistics of a text, by tensor class; of weights from their rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qnpu_jax.calibrate.statistics import BINS, Statistics, Stats, free_activations
from qnpu_jax.graph import (
    Decoder,
    Params,
    Scales,
    from_range,
    is_constant,
    is_free,
    tensor_class,
)

WHOLE = ("cache", "logits")
"""Classes that `class` never clips. KL of w8a8 as calibrated, code, without clipping and with this
one tensor clipped: keys .175 and .274, logits .175 and .964 (SmolLM2-135M); logits .208 and .632
(Qwen2.5-Coder-0.5B)."""


def calibrate_activations(
    dec: Decoder, stats: Statistics, method: str, tame: bool
) -> tuple[Scales, list[dict[str, object]]]:
    """Sets the range of every free activation from its statistics.

    Tensors of 16 bits take min-max, attention probabilities [0, 1], all others `method`. `class`
    takes the range of least squared error where the tensor is rotated or massive tokens are out of
    the graph, and min-max elsewhere: clipping an attention sink destroys the model (SmolLM2-135M:
    perplexity 19,752). It never clips keys and logits, of which the few largest decide, be their
    squared error as it may (WHOLE).

    Args:
      stats: of `collect_statistics`.
      method: as `recipes.Recipe.activation_init`.
      tame: a prefix keeps massive tokens out of the graph.

    Returns:
      QParams by global name, and one row per tensor and layer: its class, the method that was taken
      and the observed bounds.
    """
    scales: Scales = {}
    report: list[dict[str, object]] = []
    for graph in dec.graphs:
        for root in free_activations(graph):
            name = graph.prefix + root
            quant = graph[root].quant
            room = _room(root)
            ranges = []
            for bits, s in zip(quant.bits, stats[name], strict=True):
                kind = tensor_class(name, bits)
                chosen = _method(kind, method, tame)
                low, high = _range(s, chosen, bits, quant.symmetric)
                ranges.append((low * room, high * room))
                report.append(
                    {"tensor": name, "class": kind, "method": chosen, "low": s.low, "high": s.high}
                )
            lo, hi = (np.asarray(v) for v in zip(*ranges, strict=True))
            q = from_range(lo, hi, np.asarray(quant.bits), quant.symmetric)
            scales[name] = q if graph.layered else jax.tree.map(lambda a: a[0], q)
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
    if kind in WHOLE:
        return "minmax"
    return "mse" if tame or kind == "rotated" else "minmax"


AGAIN = {"rows": 4.0, "squares": 8.0, "sum": 8.0, "inv": 4.0}
"""Range of what the first of two norms decides (`norms.rms_norm`), in units of that seen in float:
there it leaves rows of one length, and here is room for integers 2.8 times as long."""


def _room(name: str) -> float:
    """Range of a tensor, in units of what was observed."""
    scope, _, last = name.rpartition(".")
    return AGAIN.get(last, 1.0) if scope.endswith("norm.again") else 1.0


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
    """Returns the bounds of least mean squared quantization error on the histogram.

    Both bounds are shrunk together first, then each alone, twice, in 2% steps of the observed
    range. Symmetric ranges have one bound, which is shrunk alone.

    Args:
      s: statistics with a histogram.

    Returns:
      (low, high), real values; low <= 0 <= high.
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


ROOM = 2.0
"""Range of a constant, in units of its largest value: learning may move it, and of 16 bits one is
to spare."""


def weight_scales(dec: Decoder, params: Params, method: str) -> Scales:
    """Sets symmetric scales of every weight: per output channel for linears, per tensor for the
    embedding table and for constants, which have ROOM.

    Args:
      params: folded float parameters.
      method: as `recipes.Recipe.weight_init`.

    Returns:
      QParams by global name, zero points 0.
    """
    scales: Scales = {}
    for graph in dec.graphs:
        for spec in graph.named("param"):
            if not is_free(graph, spec.name):
                continue
            w = np.asarray(params[graph.prefix + spec.name])
            per_tensor = spec.quant.axis is None
            rows = []
            for i, bits in enumerate(spec.quant.bits):
                layer = graph.at(w, i)
                layer = layer.reshape(1, -1) if per_tensor else layer
                bound = _weight_bound(layer, bits, "minmax" if is_constant(spec) else method)
                bound = bound * ROOM if is_constant(spec) and bits > 8 else bound
                q = from_range(-bound, bound, np.asarray(bits), symmetric=True, narrow=True)
                rows.append(jax.tree.map(lambda a: a[0], q) if per_tensor else q)
            scales[graph.prefix + spec.name] = graph.stack(rows)
    return scales


def _weight_bound(
    w: Float[np.ndarray, "rows k"], bits: int, method: str
) -> Float[np.ndarray, " rows"]:
    """Largest |w| that the code range covers, per row."""
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
    """peak * shrink of least sum (w_q - w)^2 per row, shrink from 0.30 to 1.00 in steps of 0.01."""

    def error(shrink: jax.Array) -> jax.Array:
        scale = jnp.maximum(peak * shrink, 1e-30)[:, None] / qmax
        q = jnp.clip(jnp.round(w / scale), -qmax, qmax) * scale
        return jnp.sum((q - w) ** 2, axis=1)

    steps = jnp.linspace(0.3, 1.0, 71)
    return peak * steps[jnp.argmin(jax.lax.map(error, steps), axis=0)]
