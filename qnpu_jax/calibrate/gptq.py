"""Weights rounded with the data in view, because round-to-nearest minimises the wrong error.

At 4 bits most of the loss is in the weights (method.md, section 2). What counts is the error of a
linear's output on the inputs that the quantized model gives it, ||W x_q - W_q x_q||^2: errors of
codes that are not the nearest ones make up for each other, and the bias, which every
FULLY_CONNECTED has, takes the mean. Scales stay static and per output channel.
Letters: N output channels, K inputs, B windows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Int

from qnpu_jax.calibrate.gptq_columns import Channels, Rows, Square, round_columns
from qnpu_jax.fakequant import graph_tensors, shared_inputs
from qnpu_jax.graph import (
    Decoder,
    FullyConnected,
    Graph,
    Params,
    Scales,
    Tensors,
    code_range,
    local,
    ranges_of,
)

FACTORS = (1.0, 0.8, 0.9, 1.1)
"""What `gptq` multiplies scales with, to choose per output channel."""
INSIDE = 0.499
"""Compensated weights stay within so many codes of the chosen code, so that both round alike."""

Chooser = Callable[[str], bool]
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]


def in_layers(name: str) -> bool:
    """Chooses the linears of the decoder layers: the head's 8 bits lose little."""
    return name.startswith("layers.")


class Fitted(NamedTuple):
    """Parameters, and QParams of the weights among them that were rounded, by global name: to be
    put over those of the same name, free or resolved."""

    params: Params
    scales: Scales


def gptq(
    dec: Decoder,
    params: Params,
    scales: Scales,
    windows: Int[np.ndarray, "n t"],
    *,
    factors: tuple[float, ...] = FACTORS,
    damping: float = 0.05,
    asymmetric: float = 0.0,
    biases: bool = True,
    exact: bool = True,
    batch: int = 8,
    only: Chooser = in_layers,
    track: Track = lambda items, _, __: items,
) -> Fitted:
    """Weights whose nearest codes minimise E||W x_q - W_q x_q||^2, linear after linear.

    x_q is what the quantized model gives a linear, with all weights before it rounded already and
    activations quantized where `scales` has an entry. With H = E[x_q x_q^T] + lambda I, the columns
    are rounded in order of falling H_jj, and those after column j make up for its error,
    w_k <- w_k - (w_j - code_j s) U_jk / U_jj, where H^-1 = U^T U and U is upper triangular.

    Args:
      dec: staged for windows of T tokens.
      params: folded float parameters, with prefix K/V if dec has a prefix.
      scales: resolved QParams by global name (`resolve`), those of the weights included.
      windows: (N, T) token ids.
      factors: each output channel takes the scale, of its own times one of these, that leaves the
        least error; (1.0,) keeps the scales.
      damping: lambda as a fraction of the mean of H's diagonal.
      asymmetric: how far the target moves from W x_q (0) to the float model's W x (1), by `_target`
        and in the bias; it lost where it was measured (SmolLM2-135M, 8,192 tokens).
      biases: let the bias take the mean error that is left, b + (W - W_q) E[x_q].
      exact: return weights on the grid, code times scale; otherwise the compensated weights as they
        were when they were rounded, less than half a code away, for learning that starts there.
      batch: windows per pass.
      only: chooses linears by the global name of their weight.
      track: wraps the iteration, for a progress bar: (items, length, what).

    Reference: GPTQ, arXiv 2210.17323, algorithm 1; asymmetric: GPTAQ, arXiv 2504.02692.
    """
    fit = partial(
        _fit,
        factors=factors,
        damping=damping,
        asymmetric=asymmetric,
        biases=biases,
        exact=exact,
    )
    fitted = _Pass.over(dec, params, scales, windows, batch)
    return _sweep(fitted, params, fit, only, track, measure=asymmetric != 0)


def correct_biases(
    dec: Decoder,
    params: Params,
    scales: Scales,
    windows: Int[np.ndarray, "n t"],
    *,
    reference: Params | None = None,
    batch: int = 8,
    only: Chooser = in_layers,
    track: Track = lambda items, _, __: items,
) -> Params:
    """b <- b + (W - W_q) E[x_q], linear after linear: outputs without a mean error of rounding.

    Args:
      params: parameters whose weights are rounded to their nearest codes.
      reference: the float model's W and b, where those of `params` are not (weights on the grid).
      dec, scales, windows, batch, only, track: as in `gptq`.

    Reference: arXiv 1906.04721, section 4.2, with means measured on text.
    """

    def fit(site: Site, m: Moments) -> tuple[Rows, Channels, Channels]:
        scale, qmax = (a[:, None].astype(np.float64) for a in (site.scale, site.qmax))
        rounded = np.clip(np.rint(site.start / scale), -qmax, qmax) * scale
        return site.start, site.bias + (site.weight - rounded) @ m.mean_q, scale[:, 0]

    float_params = params if reference is None else reference
    fitted = _Pass.over(dec, params, scales, windows, batch)
    return _sweep(fitted, float_params, fit, only, track, measure=False).params


@dataclass(frozen=True)
class Moments:
    """What linears read in the float model (x) and in the quantized one (x_q), over all tokens.

    Attributes:
      mean, mean_q: E[x], E[x_q].
      cross, gram: E[x x_q^T], E[x_q x_q^T].
    """

    mean: Float64[np.ndarray, " k"]
    cross: Square
    mean_q: Float64[np.ndarray, " k"]
    gram: Square


@dataclass(frozen=True)
class Site:
    """Linears of one layer that read the same tensor, their output channels stacked: weight and
    bias of the float model, weight before the fit, scale, and the largest code."""

    weight: Rows
    bias: Channels
    start: Rows
    scale: Float32[np.ndarray, " n"]
    qmax: Float32[np.ndarray, " n"]


Fit = Callable[[Site, Moments], tuple[Rows, Channels, Channels]]
"""New weight, bias and scale of linears, stacked as the site's."""


def _fit(
    site: Site,
    m: Moments,
    *,
    factors: tuple[float, ...],
    damping: float,
    asymmetric: float,
    biases: bool,
    exact: bool,
) -> tuple[Rows, Channels, Channels]:
    """A `Fit`; the rest as in `gptq`."""
    damp = damping * max(np.mean(np.diag(m.gram)), np.finfo(np.float32).tiny)
    h = m.gram + damp * np.eye(len(m.gram))
    target = site.weight if asymmetric == 0 else _target(site.weight, m, h, asymmetric)
    codes, real, scale = round_columns(target, site.scale, site.qmax, h, factors)
    rounded = codes * scale[:, None]
    mean = m.mean_q + asymmetric * (m.mean - m.mean_q)
    bias = site.bias + site.weight @ mean - rounded @ m.mean_q if biases else site.bias
    inside = np.clip(real, codes - INSIDE, codes + INSIDE) * scale[:, None]
    return rounded if exact else inside, bias, scale


def _target(w: Rows, m: Moments, h: Square, strength: float) -> Rows:
    """The real W' of least E||W x' - W' x_q||^2 + lambda ||W - W'||^2, x' between x_q and x.

    W' H = W (E[x' x_q^T] + lambda I); what rounding W' adds to that is (W_q - W') H (W_q - W')^T.
    """
    return np.linalg.solve(h, (w @ (h + strength * (m.cross - m.gram))).T).T


class Linears(NamedTuple):
    """FULLY_CONNECTED nodes that read the same tensor, by local names."""

    input: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]


@lru_cache(maxsize=64)
def linears(graph: Graph, only: Chooser) -> tuple[Linears, ...]:
    """The chosen FULLY_CONNECTED nodes of a graph by the tensor they read, in execution order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for node in graph.nodes:
        if isinstance(node.op, FullyConnected) and only(graph.prefix + node.inputs[1]):
            found.setdefault(node.inputs[0], []).append((node.inputs[1], node.inputs[2]))
    return tuple(Linears(x, *zip(*pairs, strict=True)) for x, pairs in found.items())


class At(NamedTuple):
    """A graph, and the layer it is evaluated for."""

    graph: Graph
    layer: int

    def of(self, x: Any) -> Any:
        """The layer's part of an entry."""
        return self.graph.at(x, self.layer)

    def rows(self, values: Params, names: tuple[str, ...]) -> Float64[np.ndarray, "n *k"]:
        """Entries by local name, stacked along their output channels."""
        parts = [self.of(values[self.graph.prefix + name]) for name in names]
        return np.concatenate([np.asarray(x, np.float64) for x in parts])

    def put(self, values: dict[str, Any], names: tuple[str, ...], rows: np.ndarray) -> None:
        """Overwrites, in place, what `rows` would give."""
        ends = np.cumsum([self.graph[name].shape[0] for name in names])
        for name, part in zip(names, np.split(rows, ends[:-1]), strict=True):
            self.of(values[self.graph.prefix + name])[...] = part


@dataclass
class _Pass:
    """A forward pass that has come to some graph and layer: `values` are its inputs there, batch by
    batch, so that one residual stream is all that is kept of the text."""

    dec: Decoder
    params: dict[str, Any]
    scales: Scales
    values: list[Tensors]

    @staticmethod
    def over(
        dec: Decoder, params: Params, scales: Scales, windows: Int[np.ndarray, "n t"], batch: int
    ) -> _Pass:
        starts = range(0, len(windows), batch)
        ids = [jnp.asarray(windows[i : i + batch], jnp.int32) for i in starts]
        return _Pass(dec, dict(params), dict(scales), [{"ids": x} for x in ids])

    def run(self, at: At, names: tuple[str, ...]) -> Iterator[Tensors]:
        """The named tensors, batch by batch."""
        graph = at.graph
        q = local(self.scales, graph.prefix)
        here: Any = (local(self.params, graph.prefix), (q, ranges_of(graph, q)))
        # Copies: a computation still under way must not see what is written in place meanwhile.
        here = jax.tree.map(lambda a: jnp.array(at.of(a)), here)
        inputs = {t.name for t in graph.named("input")}
        shared = {k: v for k, v in shared_inputs(self.dec).items() if k in inputs}
        for values in self.values:
            yield graph_tensors(graph, names, values, here[0] | shared, here[1])


def _sweep(
    fitted: _Pass, float_params: Params, fit: Fit, only: Chooser, track: Track, measure: bool
) -> Fitted:
    """The chosen linears fitted in execution order, each to the inputs that those before it, fitted
    already, give it; with `measure`, and to the inputs in the float model."""
    dec, params = fitted.dec, fitted.params
    exact = _Pass(dec, dict(float_params), {}, fitted.values)
    chosen = {graph: linears(graph, only) for graph in dec.graphs}
    own = [(graph.prefix, group) for graph, groups in chosen.items() for group in groups]
    names = [prefix + n for prefix, group in own for n in (*group.weights, *group.biases)]
    params.update({name: np.array(params[name]) for name in names})
    scales = {n: jax.tree.map(np.array, fitted.scales[n]) for n in names if n in fitted.scales}
    fitted.scales.update(scales)
    scale = {name: q.scale for name, q in scales.items()}
    graphs = [g for g in dec.graphs if g is not dec.head or chosen[g]]
    steps = [At(g, i) for g in graphs for i in range(g.layers)]
    for at in track(steps, len(steps), "weights"):
        # Logits are larger than all else, and nobody reads them.
        out = at.graph.outputs[:1] if at.graph is not dec.head else ()
        inputs = tuple(group.input for group in chosen[at.graph])
        wanted = list(exact.run(at, (*inputs, *out))) if measure else []
        for group in chosen[at.graph]:
            m = _moments(group.input, fitted.run(at, (group.input,)), wanted)
            weight, bias, s = fit(_site(at, group, float_params, params, scale), m)
            at.put(params, group.weights, weight)
            at.put(params, group.biases, bias)
            at.put(scale, group.weights, s)
        for name in out:
            exact.values = [{"input.residual": x[name]} for x in wanted]
            fitted.values = [{"input.residual": x[name]} for x in fitted.run(at, out)]
    new = {name: jnp.array(params[name]) for name in names}
    return Fitted(params | new, jax.tree.map(jnp.array, scales))


def _site(at: At, group: Linears, exact: Params, params: Params, scale: Params) -> Site:
    specs = [at.graph[name] for name in group.weights]
    qmax = [np.full(s.shape[0], code_range(s)[1][at.layer]) for s in specs]
    return Site(
        weight=at.rows(exact, group.weights),
        bias=at.rows(exact, group.biases),
        start=at.rows(params, group.weights),
        scale=at.rows(scale, group.weights).astype(np.float32),
        qmax=np.concatenate(qmax),
    )


def _moments(name: str, got: Iterable[Tensors], wanted: list[Tensors]) -> Moments:
    """Of a tensor's batches (B, T, K), which are added up in float64; x is x_q without `wanted`."""
    total: list[np.ndarray] = []
    count = 0
    for i, x_q in enumerate(tensors[name] for tensors in got):
        pairs = [(wanted[i][name], x_q), (x_q, x_q)] if wanted else [(x_q, x_q)]
        sums = [np.asarray(s, np.float64) for pair in pairs for s in _sums(*pair)]
        total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        count += x_q.shape[0] * x_q.shape[1]
    means = [s / count for s in total]
    return Moments(*(means if wanted else means * 2))


@jax.jit
def _sums(
    x: Float32[Array, "b t k"], y: Float32[Array, "b t k"]
) -> tuple[Float32[Array, " k"], Float32[Array, "k k"]]:
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    return x.sum(0), jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST)
