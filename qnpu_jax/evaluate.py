"""One interpreter for float, fake-quantized and calibration passes: they differ only in the edge.

An edge sees every tensor as it is produced (inputs and parameters included) and may replace it.
`evaluate` returns every tensor by name; XLA drops those that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
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


def fake_quant_edge(scales: Mapping[str, QParams], ranges: Mapping[str, Bounds]) -> Edge:
    """Fake-quantizes every tensor that has an entry in `scales` (local names, one layer); leaves
    the others."""

    def edge(spec: TensorSpec, x: jax.Array) -> jax.Array:
        if spec.name not in scales:
            return x
        q = scales[spec.name]
        scale, zero_point = expand(q.scale, spec), expand(q.zero_point, spec)
        qmin, qmax = ranges[spec.name]
        return fake_quant(x, scale, zero_point, qmin, qmax)

    return edge


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


def forward(
    dec: Decoder, params: Params, ids: Int[Array, " t"], scales: Scales | None = None
) -> Float[Array, "rows v"]:
    """Logits (T, V), of a `last` decoder (1, V): float without `scales`, fake-quantized with
    (`resolve`d ones).

    The layer graph runs under `lax.scan` over stacked parameters and scales, rematerialised under
    autodiff.

    Args:
      dec: staged for T tokens, no cache.
      params: folded parameters by global name (`rotate.fold_norms`), prefix K/V included if dec has
        a prefix.
      ids: (T,) int32.
      scales: QParams by global name; tensors without an entry stay in float.
    """
    scales = scales or {}
    tables = shared_inputs(dec)

    def run(graph: Graph, values: Tensors, q: Mapping[str, QParams], r) -> Tensors:
        return evaluate(graph, values, fake_quant_edge(q, r))

    def whole(graph: Graph, values: Tensors) -> Tensors:
        q = local(scales, graph.prefix)
        return run(graph, {**values, **local(params, graph.prefix)}, q, ranges_of(graph, q))

    @jax.checkpoint
    def step(x: jax.Array, layer) -> tuple[jax.Array, None]:
        p, q, r = layer
        env = run(dec.layer, {"input.residual": x, **tables, **p}, q, r)
        return env["mlp.residual"], None

    x = whole(dec.embed, {"ids": ids})["residual"]
    q = local(scales, "layers.")
    x, _ = jax.lax.scan(step, x, (local(params, "layers."), q, ranges_of(dec.layer, q)))
    return whole(dec.head, {"input.residual": x, "norm.eps": tables["norm.eps"]})["logits"]


Keep = Callable[[Graph], tuple[str, ...]]
"""Chooses tensors of a graph by local name."""


@partial(jax.jit, static_argnums=(0, 1))
def graph_tensors(graph: Graph, keep: tuple[str, ...], values: Tensors, params: Tensors) -> Tensors:
    """The kept tensors of one graph in float, for a batch.

    Args:
      values: inputs with a leading batch axis.
      params: parameters and shared inputs, without one.
    """

    def one(values: Tensors) -> Tensors:
        env = evaluate(graph, {**values, **params})
        return {name: env[name] for name in keep}

    return jax.vmap(one)(values)


def passes(
    dec: Decoder, params: Params, ids: jax.Array, keep: Keep
) -> Iterator[tuple[Graph, int, Tensors]]:
    """The kept tensors of a batch (B, T) of sequences in float, graph by graph and layer by
    layer."""
    tables = shared_inputs(dec)
    values: Tensors = {"ids": ids}
    for graph in dec.graphs:
        own = local(params, graph.prefix)
        inputs = {t.name for t in graph.named("input")}
        shared = {k: v for k, v in tables.items() if k in inputs}
        out = graph.outputs[0]
        names = tuple(dict.fromkeys((out, *keep(graph))))
        for i in range(graph.layers):
            here = {k: v[i] for k, v in own.items()} if graph.prefix == "layers." else own
            env = graph_tensors(graph, names, values, here | shared)
            yield graph, i, env
            values = {"input.residual": env[out]}


def token_nll(logits: Float[Array, "t v"], ids: Int[Array, " t"]) -> Float[Array, " t-1"]:
    """-log softmax(logits[t])[ids[t+1]]: (T, V) and (T,) to (T-1,)."""
    log_p = jax.nn.log_softmax(logits[:-1], axis=-1)
    return -jnp.take_along_axis(log_p, ids[1:, None], axis=-1)[:, 0]
