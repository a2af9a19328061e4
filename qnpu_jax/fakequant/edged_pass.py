"""The decoder in real numbers with an edge of one's own on every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qnpu_jax.fakequant.evaluate import Edge, evaluate
from qnpu_jax.fakequant.forward import scanned_inputs
from qnpu_jax.graph import LAYERS, Decoder, Rsqrt, Sqrt, Tensors, TensorSpec, local, select_shared


def decoder_logits(
    dec: Decoder, values: Tensors, extra: Tensors, edge: Callable[[Tensors], Edge]
) -> Float[Array, "t v"]:
    """Runs the decoder, with layers under `lax.scan` and rematerialised under autodiff.

    Args:
      values: parameters of each graph by its prefix, by local name, stacked over layers; those of
        the embedding with the token ids; and the inputs that layers share, as `tables`.
      extra: what edges read, by global name without the layer, stacked over layers.
      edge: makes the edge of one graph and layer from its part of `extra`, by local name.
    """
    return recorded_logits(dec, values, extra, lambda own, _: edge(own))[0]


def recorded_logits(
    dec: Decoder, values: Tensors, extra: Tensors, edge: Callable[[Tensors, Tensors], Edge]
) -> tuple[Float[Array, "t v"], Tensors]:
    """Runs the decoder as `decoder_logits`, and returns what edges recorded too.

    Args:
      edge: makes the edge of one graph and layer from its part of `extra` and from a dict, into
        which it may put arrays by local name.

    Returns:
      Logits, and the records by global name without the layer, stacked over layers.
    """
    kinds, tables = scanned_inputs(dec, values["tables"])

    @jax.checkpoint
    def step(x: jax.Array, layer: tuple[Tensors, Tensors, Any]) -> tuple[jax.Array, Tensors]:
        own, more, kind = layer
        inputs, kept = {"input.residual": x, **own, **tables(kind)}, {}
        found = evaluate(dec.layer, inputs, edge(more, kept))
        return found[dec.layer.outputs[0]], kept

    def whole(graph: Any, inputs: Tensors) -> tuple[jax.Array, Tensors]:
        shared, kept = select_shared(dec, graph, values["tables"]), {}
        inputs = {**inputs, **values[graph.prefix], **shared}
        found = evaluate(graph, inputs, edge(local(extra, graph.prefix), kept))
        return found[graph.outputs[0]], kept

    x, first = whole(dec.embed, {})
    x, inner = jax.lax.scan(step, x, (values[LAYERS], local(extra, LAYERS), kinds))
    logits, last = whole(dec.head, {"input.residual": x})
    parts = zip(dec.graphs, (first, inner, last), strict=True)
    return logits, {g.prefix + n: e for g, kept in parts for n, e in kept.items()}


def with_errors(dec: Decoder) -> Callable[[Tensors], Edge]:
    """Makes the edges of a decoder that compute x + t e, from (e, t) by local name.

    An error does not count where it would leave a square root nothing: of a row far shorter than
    the longest, the sum of squares has a code of 0, and its inverse no real value.
    """
    positive = under_roots(dec)

    def made(extra: Tensors) -> Edge:
        def edge(spec: TensorSpec, x: jax.Array) -> jax.Array:
            if spec.name not in extra:
                return x
            error, factor = extra[spec.name]
            y = x + factor * error
            return jnp.where((x > 0) & (y <= 0), x, y) if spec.name in positive else y

        return edge

    return made


def under_roots(dec: Decoder) -> frozenset[str]:
    """Finds the tensors that square roots are taken of, by local name."""
    nodes = (node for graph in dec.graphs for node in graph.nodes)
    return frozenset(node.inputs[0] for node in nodes if isinstance(node.op, Sqrt | Rsqrt))
