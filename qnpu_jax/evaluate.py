"""One interpreter for float, fake-quantized and calibration passes: they differ only in the edge.

An edge sees every tensor as it is produced (inputs and parameters included) and may replace it.
`evaluate` returns every tensor by name; XLA drops those that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qnpu_jax.decoder import Decoder, layer_inputs
from qnpu_jax.graph import Graph, TensorSpec
from qnpu_jax.ops import eval_op
from qnpu_jax.quant import QParams, Scales, code_range, expand, fake_quant

T = TypeVar("T")
Tensors = dict[str, Any]
Params = Mapping[str, jax.Array | np.ndarray]
Bounds = tuple[Any, Any]
"""qmin and qmax: float32 scalars, or (L,) arrays."""
Edge = Callable[[TensorSpec, jax.Array], jax.Array]


def identity(_: TensorSpec, x: jax.Array) -> jax.Array:
    """The edge of the float reference."""
    return x


def evaluate(graph: Graph, values: Tensors, edge: Edge = identity) -> Tensors:
    """Every tensor of the graph by local name, from its inputs and parameters."""
    env = {name: edge(graph[name], x) for name, x in values.items()}
    for node in graph.nodes:
        y = eval_op(node.op, *(env[name] for name in node.inputs))
        env[node.output] = edge(graph[node.output], y)
    return env


def fake_quant_edge(
    scales: Mapping[str, QParams], ranges: Mapping[str, Bounds], masked: bool = True
) -> Edge:
    """Fake-quantizes every tensor that has an entry in `scales` (local names, one layer); leaves
    the others.

    Args:
      masked: no gradient to clipped values, as in `quant.fake_quant`.
    """

    def edge(spec: TensorSpec, x: jax.Array) -> jax.Array:
        if spec.name not in scales:
            return x
        q = scales[spec.name]
        scale, zero_point = expand(q.scale, spec), expand(q.zero_point, spec)
        qmin, qmax = ranges[spec.name]
        return fake_quant(x, scale, zero_point, qmin, qmax, masked=masked)

    return edge


PRODUCED = "produced"
"""Name, for autodiff, of tensors before an edge replaces them."""


def produced(edge: Edge) -> Edge:
    """`edge`, whose inputs are named PRODUCED."""
    return lambda spec, x: edge(spec, checkpoint_name(x, PRODUCED))


def measured(edge: Edge, errors: list[jax.Array]) -> Edge:
    """`edge`, which also appends each tensor's relative squared error, sum (xhat - x)^2 / sum x^2.

    Relative, because the sums of squares of two tensors differ by up to 10^6. Its gradient reaches
    scales, not what made x.
    """

    def record(spec: TensorSpec, x: jax.Array) -> jax.Array:
        y = edge(spec, x)
        if y is not x and jnp.issubdtype(x.dtype, jnp.floating):
            source = jax.lax.stop_gradient(x)
            error = jnp.sum(jnp.square(edge(spec, source) - source))
            errors.append(error / (jnp.sum(jnp.square(source)) + jnp.float32(1e-12)))
        return y

    return record


def local(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries under `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def ranges_of(graph: Graph, names: Mapping[str, object]) -> dict[str, Bounds]:
    """Code ranges of the named tensors, with the layer axis in the layer graph only."""
    out = {}
    for name in names:
        qmin, qmax = code_range(graph[name])
        out[name] = (qmin, qmax) if graph.prefix == "layers." else (qmin[0], qmax[0])
    return out


def shared_inputs(dec: Decoder, filled: int = 0) -> Tensors:
    """`layer_inputs` as device arrays."""
    return {k: jnp.asarray(v) for k, v in layer_inputs(dec, filled).items()}


Prepare = Callable[[Graph, Tensors], Tensors]
"""From what `params` holds of a graph (local names, one layer) to the graph's parameters."""


def stored(_: Graph, values: Tensors) -> Tensors:
    """Parameters as they are stored."""
    return values


@dataclass(frozen=True)
class Reading:
    """How a forward pass reads a model. Holds tracers under jit, so it is made inside.

    Attributes:
      params: by global name; entries of `layers.*` have a leading layer axis.
      scales: QParams by global name; tensors without an entry stay in float.
      ranges: code ranges of the tensors in `scales` by global name; None takes the decoder's, as
        constants of the compiled program.
      prepare: what makes parameters of them (learning merges rotations here).
      masked: as in `quant.fake_quant`.
      measure: sum up the local errors too (`measured`).
    """

    params: Mapping[str, Any]
    scales: Scales
    ranges: Mapping[str, Bounds] | None = None
    prepare: Prepare = stored
    masked: bool = True
    measure: bool = False

    def whole(self, graph: Graph) -> tuple[Tensors, Edge]:
        """Parameters and edge of a graph without layers."""
        edge = fake_quant_edge(*self.quant(graph), self.masked)
        return self.prepare(graph, local(self.params, graph.prefix)), edge

    def quant(self, graph: Graph) -> tuple[dict[str, QParams], dict[str, Bounds]]:
        """Scales and code ranges by local name."""
        q = local(self.scales, graph.prefix)
        if self.ranges is None:
            return q, ranges_of(graph, q)
        known = local(self.ranges, graph.prefix)
        return q, {name: known[name] for name in q}


class Hidden(NamedTuple):
    """What the layers make of a sequence: the residual stream after each, (L, T, D), and after the
    last, (T, D), by itself, so that who reads only that does not keep the others; the sum of local
    errors, () (0 unless measured)."""

    residuals: Float[Array, "l t d"]
    last: Float[Array, "t d"]
    error: Float[Array, ""]


def hidden(dec: Decoder, reading: Reading, ids: Int[Array, " t"]) -> Hidden:
    """Embedding and layers: the layer graph runs under `lax.scan` over stacked parameters and
    scales, rematerialised under autodiff."""
    tables = shared_inputs(dec)

    # Between layers autodiff keeps the residual stream; within the layer that is computed again,
    # what each op produced, and not what quantization made of it too.
    @jax.checkpoint
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(PRODUCED))
    def step(x: jax.Array, layer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        p, q, r = layer
        edge = produced(fake_quant_edge(q, r, reading.masked))
        errors: list[jax.Array] = [jnp.float32(0)]
        edge = measured(edge, errors) if reading.measure else edge
        values = {"input.residual": x, **tables, **reading.prepare(dec.layer, p)}
        x = evaluate(dec.layer, values, edge)["mlp.residual"]
        return x, (x, sum(errors[1:], errors[0]))

    # Of the table only the rows that are read: rotated and quantized whole, it would be there three
    # times under autodiff.
    rows = {"embed.weight": jnp.asarray(reading.params["embed.weight"])[ids]}
    values, edge = replace(reading, params=rows).whole(dec.embed)
    x = evaluate(dec.embed, {"ids": jnp.arange(len(ids)), **values}, edge)["residual"]
    layers = (local(reading.params, "layers."), *reading.quant(dec.layer))
    last, (residuals, errors) = jax.lax.scan(step, x, layers)
    return Hidden(residuals, last, jnp.sum(errors))


def head(dec: Decoder, values: Tensors, edge: Edge, x: Float[Array, "t d"]) -> Float[Array, "r v"]:
    """Logits of the last layer's residual stream, with what `Reading.whole(dec.head)` gives."""
    eps = shared_inputs(dec)["norm.eps"]
    return evaluate(dec.head, {"input.residual": x, "norm.eps": eps, **values}, edge)["logits"]


def forward(
    dec: Decoder, params: Params, ids: Int[Array, " t"], scales: Scales | None = None
) -> Float[Array, "rows v"]:
    """Logits (T, V), of a `last` decoder (1, V): float without `scales`, fake-quantized with
    (`resolve`d ones).

    Args:
      dec: staged for T tokens, no cache.
      params: folded parameters by global name (`rotate.fold_norms`), prefix K/V included if dec has
        a prefix.
      ids: (T,) int32.
      scales: QParams by global name; tensors without an entry stay in float.
    """
    reading = Reading(params, scales or {})
    return head(dec, *reading.whole(dec.head), hidden(dec, reading, ids).last)


Keep = Callable[[Graph], tuple[str, ...]]
"""Chooses tensors of a graph by local name."""


@partial(jax.jit, static_argnums=(0, 1))
def graph_tensors(
    graph: Graph, keep: tuple[str, ...], values: Tensors, params: Tensors, quant: Any = ({}, {})
) -> Tensors:
    """The kept tensors of one graph for a batch.

    Args:
      values: inputs with a leading batch axis.
      params: parameters and shared inputs, without one.
      quant: QParams and code ranges of the tensors to fake-quantize, one layer's.
    """

    def one(values: Tensors) -> Tensors:
        env = evaluate(graph, {**values, **params}, fake_quant_edge(*quant))
        return {name: env[name] for name in keep}

    return jax.vmap(one)(values)


def passes(
    dec: Decoder,
    params: Params,
    ids: jax.Array,
    keep: Keep,
    scales: Scales | None = None,
    tables: Tensors | None = None,
) -> Iterator[tuple[Graph, int, Tensors]]:
    """The kept tensors of a batch (B, T) of sequences, graph by graph and layer by layer.

    Args:
      scales: as in `forward`: float without, and for every tensor that has none.
      tables: in place of `shared_inputs(dec)`.
    """
    tables = shared_inputs(dec) if tables is None else tables
    values: Tensors = {"ids": ids}
    for graph in dec.graphs:
        own, q = local(params, graph.prefix), local(scales or {}, graph.prefix)
        quant = (q, ranges_of(graph, q))
        inputs = {t.name for t in graph.named("input")}
        shared = {k: v for k, v in tables.items() if k in inputs}
        out = graph.outputs[0]
        names = tuple(dict.fromkeys((out, *keep(graph))))
        for i in range(graph.layers):
            here = (own, quant)
            if graph.prefix == "layers.":
                here = jax.tree.map(lambda a, i=i: a[i], here)
            env = graph_tensors(graph, names, values, here[0] | shared, here[1])
            yield graph, i, env
            values = {"input.residual": env[out]}


def token_nll(logits: Float[Array, "t v"], ids: Int[Array, " t"]) -> Float[Array, " t-1"]:
    """-log softmax(logits[t])[ids[t+1]]: (T, V) and (T,) to (T-1,)."""
    log_p = jax.nn.log_softmax(logits[:-1], axis=-1)
    return -jnp.take_along_axis(log_p, ids[1:, None], axis=-1)[:, 0]
