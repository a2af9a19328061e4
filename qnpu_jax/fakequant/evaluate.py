"""The interpreter of graphs in real numbers: float, fake-quantized and calibration passes.

They differ only in the edge: a function that sees every tensor as it is produced, inputs and
parameters included, and may replace it. `evaluate` returns every tensor by name; XLA drops those
that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qnpu_jax.fakequant.fake_quant import fake_quant
from qnpu_jax.graph import (
    Bounds,
    Graph,
    QParams,
    Tensors,
    TensorSpec,
    eval_op,
    expand,
)

Edge = Callable[[TensorSpec, jax.Array], jax.Array]


def identity(_: TensorSpec, x: jax.Array) -> jax.Array:
    """Leaves every tensor as it is: the edge of the float reference."""
    return x


def evaluate(graph: Graph, values: Tensors, edge: Edge = identity) -> Tensors:
    """Evaluates a graph: every tensor by local name.

    Args:
      values: inputs and parameters of one layer by local name; token ids int32, all others real.
      edge: applied to every tensor but the token ids.
    """
    ids = graph.ids.name if graph.ids else None
    env = {name: x if name == ids else edge(graph[name], x) for name, x in values.items()}
    for node in graph.nodes:
        y = eval_op(node.op, *(env[name] for name in node.inputs))
        env[node.output] = edge(graph[node.output], y)
    return env


def fake_quant_edge(
    scales: Mapping[str, QParams], ranges: Mapping[str, Bounds], masked: bool = True
) -> Edge:
    """Makes the edge that fake-quantizes every tensor with an entry in `scales`.

    Args:
      scales, ranges: QParams and code ranges of one layer by local name.
      masked: no gradient to clipped values, as in `fake_quant.fake_quant`.
    """

    def edge(spec: TensorSpec, x: jax.Array) -> jax.Array:
        if spec.name not in scales:
            return x
        q = scales[spec.name]
        scale, zero_point = expand(q.scale, spec), expand(q.zero_point, spec)
        qmin, qmax = ranges[spec.name]
        return fake_quant(x, scale, zero_point, qmin, qmax, masked=masked)

    return edge


def measured(edge: Edge, errors: list[jax.Array]) -> Edge:
    """Makes an edge that also records each tensor's relative error, sum (xhat - x)^2 / sum x^2.

    The error is relative, because sums of squares of two tensors differ by up to 10^6. Its gradient
    reaches the scales, not the ops before x.

    Args:
      errors: list that scalars are appended to, in the order of the tensors.
    """

    def record(spec: TensorSpec, x: jax.Array) -> jax.Array:
        y = edge(spec, x)
        if y is not x and jnp.issubdtype(x.dtype, jnp.floating):
            source = jax.lax.stop_gradient(x)
            error = jnp.sum(jnp.square(edge(spec, source) - source))
            errors.append(error / (jnp.sum(jnp.square(source)) + jnp.float32(1e-12)))
        return y

    return record
