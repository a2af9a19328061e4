"""GPTQ: weights rounded with the data in view, because round-to-nearest minimises the wrong error.

At 4 bits most of the loss is in the weights. What counts is the error of a linear's output on the
inputs that the quantized model gives it, ||W x_q - W_q x_q||^2: codes that are not the nearest ones
compensate each other's errors, and the bias, which every FULLY_CONNECTED has, takes the mean error.
Scales stay static and per output channel.

Letters: N output channels, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from qnpu_jax.calibrate.gptq_columns import Channels, Rows, Square, round_columns
from qnpu_jax.calibrate.input_moments import Moments, input_moments
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import graph_tensors, jit_brief, shared_inputs
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
    segments,
    select_shared,
)
from qnpu_jax.progress import Track, untracked

INSIDE = 0.499
"""Compensated weights stay within this many codes of the chosen code, so that both round alike."""

Chooser = Callable[[str], bool]
"""Tells whether a linear is rounded, by the global name of its weight."""


def in_layers(name: str) -> bool:
    """Chooses the linears of the decoder layers: the head's 8 bits lose little."""
    return name.startswith("layers.")


@dataclass(frozen=True)
class GptqSettings:
    """Settings of `gptq`.

    Attributes:
      factors: each output channel takes the scale, of its own times one of these, that leaves the
        least error; (1.0,) keeps the scales.
      damping: lambda as a fraction of the mean of H's diagonal.
      asymmetric: how far the target moves from W x_q (0) to the float model's W x (1), in weights
        and bias; `Stage.gptaq`.
      loudest: a token counts for this many usual ones at most, by |x_q|^2 and its median. The norms
        after a block measure an error by the token that it falls on; without a limit, the first
        token of a model without a prefix, a hundred times as long as the others, is all that is
        fitted.
      exact: return weights on the grid, code times scale; otherwise the compensated weights as they
        were when they were rounded, less than half a code away, for learning that starts there.
      batch: windows per pass.
      only: chooses the linears.
    """

    factors: tuple[float, ...] = (1.0, 0.8, 0.9, 1.1)
    damping: float = 0.05
    asymmetric: float = 0.0
    loudest: float = 4.0
    exact: bool = True
    batch: int = 8
    only: Chooser = in_layers


class Fitted(NamedTuple):
    """Parameters with rounded weights and corrected biases, and the QParams of those weights.

    Attributes:
      params: all parameters, by global name.
      scales: of the rounded weights alone; they replace those of the same name, free or resolved.
    """

    params: Params
    scales: Scales


def gptq(
    dec: Decoder,
    params: Params,
    scales: Scales,
    windows: Int[np.ndarray, "n t"],
    settings: GptqSettings = GptqSettings(),
    track: Track = untracked,
) -> Fitted:
    """Rounds weights to codes that minimise E||W x_q - W_q x_q||^2, linear after linear.

    x_q is the input that the quantized model gives a linear: all weights before it rounded already,
    and activations quantized where `scales` has an entry. With H = E[x_q x_q^T] + lambda I, columns
    are rounded in order of falling H_jj, and the columns k after j compensate the error of j:

        w_k <- w_k - (w_j - code_j s) U_jk / U_jj,    H^-1 = U^T U, U upper triangular

    The bias takes the mean error that is left: b <- b + (W - W_q) E[x_q]. E weighs tokens by
    `GptqSettings.loudest`.

    Args:
      dec: staged for windows of T tokens.
      params: folded float parameters, with prefix K/V if dec has a prefix; left as they are.
      scales: resolved QParams by global name (`resolve`), those of the weights included.
      windows: (N, T) token ids.
      track: wraps the iteration, for a progress bar.

    Reference: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1; Li et al., GPTAQ (arXiv
      2504.02692) for `asymmetric`; Nagel et al., Data-free quantization (arXiv 1906.04721), section
      4.2, for the bias, with means measured on text.
    """
    starts = range(0, len(windows), settings.batch)
    ids = [jnp.asarray(windows[i : i + settings.batch], jnp.int32) for i in starts]
    quantized = _ForwardPass(dec, dict(params), dict(scales), [{"ids": x} for x in ids])
    return _fit_layers(quantized, params, settings, track)


class LinearArrays(NamedTuple):
    """Linears of one layer that read the same tensor, their output channels stacked.

    Attributes:
      weight, bias: of the float model.
      scale: real units per code.
      qmax: largest code.
    """

    weight: Rows
    bias: Channels
    scale: Float32[Array, " n"]
    qmax: Float32[Array, " n"]


@jit_brief(static_argnames="settings")
def _fit_linears(
    linear: LinearArrays, m: Moments, settings: GptqSettings
) -> tuple[Rows, Channels, Channels]:
    """New weight, bias and scale of linears that read the same tensor; in float64."""
    strength = settings.asymmetric
    diagonal = jnp.diagonal(m.gram)
    damp = settings.damping * jnp.maximum(jnp.mean(diagonal), float(np.finfo(np.float32).tiny))
    h = m.gram + damp * jnp.eye(len(diagonal), dtype=jnp.float64)
    weight, bias = (x.astype(jnp.float64) for x in (linear.weight, linear.bias))
    target = weight if strength == 0 else _mixed_target(weight, m, h, strength)
    codes, real, scale = round_columns(target, linear.scale, linear.qmax, h, settings.factors)
    rounded = codes * scale[:, None]
    mean = m.mean_q + strength * (m.mean - m.mean_q)
    bias = bias + weight @ mean - rounded @ m.mean_q
    inside = jnp.clip(real, codes - INSIDE, codes + INSIDE) * scale[:, None]
    return rounded if settings.exact else inside, bias, scale


def _fitted(
    linear: LinearArrays, m: Moments, settings: GptqSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_fit_linears` on the device, which has it done while a host would still be starting."""
    with jax.enable_x64(True):
        found = jax.device_get(_fit_linears(linear, m, settings))
    if not np.isfinite(found[0]).all():  # which XLA's Cholesky does not refuse
        raise UserError(
            "GPTQ: the moments of a linear's inputs are not positive definite; expected finite"
            " activations, and some damping; check the text and the ranges, raise the stage's"
            " damping, or calibrate with more tokens"
        )
    return found


def _mixed_target(w: Rows, m: Moments, h: Square, strength: float) -> Rows:
    """Least-squares target W' that mixes float and quantized inputs.

    W' minimises E||W x' - W' x_q||^2 + lambda ||W - W'||^2 with x' = x_q + strength (x - x_q):

        W' H = W (E[x' x_q^T] + lambda I) = W (H + strength (E[x x_q^T] - E[x_q x_q^T]))

    Rounding W' adds (W_q - W') H (W_q - W')^T to that minimum, which is what GPTQ minimises.
    """
    return jnp.linalg.solve(h, (w @ (h + strength * (m.cross - m.gram))).T).T


class Linears(NamedTuple):
    """FULLY_CONNECTED nodes that read the same tensor, by local names."""

    input: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]


@lru_cache(maxsize=64)
def linears_by_input(graph: Graph, only: Chooser) -> tuple[Linears, ...]:
    """Groups the chosen FULLY_CONNECTED nodes of a graph by the tensor they read, in execution
    order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for node in graph.nodes:
        if isinstance(node.op, FullyConnected) and only(graph.prefix + node.inputs[1]):
            found.setdefault(node.inputs[0], []).append((node.inputs[1], node.inputs[2]))
    return tuple(Linears(x, *zip(*pairs, strict=True)) for x, pairs in found.items())


class GraphLayer(NamedTuple):
    """A graph, and the layer that it is evaluated for (0 where it has none)."""

    graph: Graph
    layer: int

    def get(self, values: Params, names: tuple[str, ...]) -> Float32[np.ndarray, "n *k"]:
        """Returns the layer's entries of some local names, stacked along their output channels."""
        parts = [self.graph.at(values[self.graph.prefix + name], self.layer) for name in names]
        return np.concatenate([np.asarray(x, np.float32) for x in parts])

    def put(self, values: dict[str, Any], names: tuple[str, ...], rows: np.ndarray) -> None:
        """Overwrites, in place, what `get` would return."""
        ends = np.cumsum([self.graph[name].shape[0] for name in names])
        for name, part in zip(names, np.split(rows, ends[:-1]), strict=True):
            self.graph.at(values[self.graph.prefix + name], self.layer)[...] = part


_Arrays = tuple[dict[str, Any], tuple[Any, Any]]
"""One layer's parameters, and the QParams and code ranges of its tensors, on the device."""


@dataclass
class _ForwardPass:
    """A forward pass that has come to some graph and layer.

    Attributes:
      values: what the next part of that graph reads, batch by batch: between graphs one residual
        stream is all that is kept of the text.
    """

    dec: Decoder
    params: dict[str, Any]
    scales: Scales
    values: list[Tensors]

    def arrays(self, here: GraphLayer) -> _Arrays:
        """Copies what `run` takes to the device: once a layer, as each array takes a GPU half a
        millisecond."""
        graph = here.graph
        q = local(self.scales, graph.prefix)
        found: Any = (local(self.params, graph.prefix), (q, ranges_of(graph, q)))
        return jax.tree.map(_on_device, graph.at(found, here.layer))

    def refreshed(self, here: GraphLayer, arrays: _Arrays, names: tuple[str, ...]) -> _Arrays:
        """The arrays after some parameters, or their scales, were written in place."""
        graph, (params, (q, ranges)) = here.graph, arrays
        old: Any = (
            {n: x[graph.prefix + n] for n in names if graph.prefix + n in x}
            for x in (self.params, self.scales)
        )
        new = [jax.tree.map(_on_device, graph.at(x, here.layer)) for x in old]
        return params | new[0], (q | new[1], ranges)

    def run(
        self, here: GraphLayer, part: Graph, arrays: _Arrays, names: tuple[str, ...]
    ) -> Iterator[Tensors]:
        """Yields the named tensors of a part of the graph, batch by batch."""
        params, quant = arrays
        shared = select_shared(self.dec, here.graph, shared_inputs(self.dec), here.layer)
        own = {t.name for t in part.tensors}
        given = {name: x for name, x in (params | shared).items() if name in own}
        for values in self.values:
            read = {name: x for name, x in values.items() if name in own or name == "ids"}
            yield graph_tensors(part, names, read, given, quant)


def _on_device(x: Any) -> jax.Array:
    """A copy of what lies on the host: a computation still under way must not see what is written
    there in place meanwhile."""
    return x if isinstance(x, jax.Array) else jnp.array(x)


def _fit_layers(
    quantized: _ForwardPass, float_params: Params, settings: GptqSettings, track: Track
) -> Fitted:
    """Fits the chosen linears in execution order, each to the inputs that those before it, fitted
    already, give it; where `asymmetric` is not 0, also to its inputs in the float model."""
    dec, params = quantized.dec, quantized.params
    exact = _ForwardPass(dec, dict(float_params), {}, quantized.values)
    chosen = {graph: linears_by_input(graph, settings.only) for graph in dec.graphs}
    own = [(graph.prefix, group) for graph, groups in chosen.items() for group in groups]
    names = [prefix + n for prefix, group in own for n in (*group.weights, *group.biases)]
    params.update({name: np.array(params[name]) for name in names})
    scales = {
        n: jax.tree.map(np.array, quantized.scales[n]) for n in names if n in quantized.scales
    }
    quantized.scales.update(scales)
    scale = {name: q.scale for name, q in scales.items()}
    graphs = [g for g in dec.graphs if g is not dec.head or chosen[g]]
    steps = [GraphLayer(g, i) for g in graphs for i in range(g.layers)]
    for here in track(steps, len(steps), "weights"):
        # Logits are larger than all else, and nobody reads them.
        out = here.graph.outputs[:1] if here.graph is not dec.head else ()
        inputs = tuple(group.input for group in chosen[here.graph])
        wanted: list[Tensors] = []
        if settings.asymmetric:
            wanted = list(exact.run(here, here.graph, exact.arrays(here), (*inputs, *out)))
        arrays = quantized.arrays(here)
        *parts, last = segments(here.graph, inputs, out)
        for group, part in zip(chosen[here.graph], parts, strict=True):
            quantized.values = list(quantized.run(here, part, arrays, part.outputs))
            m = input_moments(group.input, quantized.values, wanted, settings.loudest)
            fitted = _fitted(_arrays(here, group, params, scale), m, settings)
            here.put(params, group.weights, fitted[0])
            here.put(params, group.biases, fitted[1])
            here.put(scale, group.weights, fitted[2])
            arrays = quantized.refreshed(here, arrays, (*group.weights, *group.biases))
        for name in out:
            exact.values = [{"input.residual": x[name]} for x in wanted]
            rows = quantized.run(here, last, arrays, out)
            quantized.values = [{"input.residual": x[name]} for x in rows]
    new = {name: jnp.array(params[name]) for name in names}
    return Fitted(params | new, jax.tree.map(jnp.array, scales))


def _arrays(here: GraphLayer, group: Linears, params: Params, scale: Params) -> LinearArrays:
    """The linears as they are before they are rounded: each is rounded once."""
    specs = [here.graph[name] for name in group.weights]
    qmax = [np.full(s.shape[0], code_range(s)[1][here.layer]) for s in specs]
    return LinearArrays(
        weight=jnp.asarray(here.get(params, group.weights)),
        bias=jnp.asarray(here.get(params, group.biases)),
        scale=jnp.asarray(here.get(scale, group.weights)),
        qmax=jnp.asarray(np.concatenate(qmax)),
    )
