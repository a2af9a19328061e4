"""One interpreter for float, fake-quantized and calibration passes: they differ only in the edge.

An edge sees every tensor as it is produced (inputs and parameters included) and may replace it.
`evaluate` returns every tensor by name; XLA drops those that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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
    """The edge of the float reference."""
    return x


def evaluate(graph: Graph, values: Tensors, edge: Edge = identity) -> Tensors:
    """Every tensor of the graph by local name, from its inputs and parameters."""
    ids = graph.ids.name if graph.ids else None
    env = {name: x if name == ids else edge(graph[name], x) for name, x in values.items()}
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
