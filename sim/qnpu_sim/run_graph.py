"""Interpreter of one graph on integer codes, traced by JAX."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias, assert_never

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from qnpu_jax.graph import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    Embedding,
    FullyConnected,
    Gelu,
    Graph,
    Keep,
    Logistic,
    Mul,
    Node,
    Requantize,
    Reshape,
    Rsqrt,
    Slice,
    Softmax,
    Sqrt,
    Transpose,
    is_identity,
)
from qnpu_sim import elementwise, gpu_attention, kernels, movement
from qnpu_sim.channel_blocks import by_channels
from qnpu_sim.graph_constants import dtype_of, matmul_operand

Codes: TypeAlias = dict[str, jax.Array]
"""Integer codes by tensor name."""


def run_graph(
    graph: Graph,
    layer: int,
    values: Codes,
    constants: Mapping[str, Any],
    wanted: Collection[str] | None = None,
) -> Codes:
    """Runs one layer of a graph on one sequence.

    Args:
      layer: decides the bits of every tensor.
      values: codes of inputs and parameters by local name.
      constants: of the ops by output name (`graph_constants.constants_of`).
      wanted: local names of the tensors that the caller reads; None for all. Others may be missing
        from the result: a GPU computes them inside a fused kernel (`qnpu_sim.gpu_attention`).

    Returns:
      Codes of every tensor by local name, `values` included.
    """
    env = dict(values)
    chains = {}
    if wanted is not None and jax.default_backend() == "gpu":
        chains = gpu_attention.chains(graph, layer, constants)
        chains = {n: c for n, c in chains.items() if not c.inside & set(wanted)}
    within = {name for chain in chains.values() for name in chain.inside}
    for node in graph.nodes:
        if node.output in within:
            continue
        if chain := chains.get(node.output):
            q, k, v, mask = (env[n][0] for n in chain.operands)
            own = chain.constants(constants)
            env[node.output] = gpu_attention.attention(q, k, v, mask, own)[None]
        elif is_identity(graph, node, layer):
            env[node.output] = env[node.inputs[0]]
        else:
            x = [env[n] for n in node.inputs]
            y = run_op(graph, node, layer, x, constants.get(node.output))
            env[node.output] = _settled(graph, node, y)
    return env


def sequence_input(graph: Graph) -> tuple[str, tuple[int, ...]]:
    """Name of a graph's sequence input, and its shape for one sequence: the token ids of the embed
    graph, the residual stream of the others."""
    if graph.ids is not None:
        return graph.ids.name, graph.ids.shape
    return "input.residual", graph["input.residual"].shape


def same_bits(graph: Graph, layer: int) -> int:
    """First layer whose tensors all have the bits that they have in this one: both run the same
    compiled program."""
    bits = [t.quant.bits for t in graph.tensors]
    return next(i for i in range(layer + 1) if all(b[i] == b[layer] for b in bits))


def _settled(graph: Graph, node: Node, y: jax.Array) -> jax.Array:
    """Adds a fusion barrier after an op (CPU), or asks for row-major layout (GPU); the bits stay.

    On a CPU, XLA would otherwise fuse an op into each of its readers, and compute it once for each.
    On a GPU it fuses well, but it keeps products and outputs of graphs column-major and transposes
    them before the next product.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.optimization_barrier(y)
    if isinstance(node.op, FullyConnected) or node.output in graph.outputs:
        return with_layout_constraint(y, Layout(tuple(range(y.ndim))))
    return y


def run_op(graph: Graph, node: Node, layer: int, x: list[jax.Array], constants: Any) -> jax.Array:
    """Runs one op on integer codes.

    Args:
      x: codes of its inputs.
      constants: of its kernel; None for ops that move codes.
    """
    match node.op:
        case Embedding():
            return movement.gather(x[0], x[1])
        case FullyConnected():
            return by_channels(kernels.fully_connected, x[0], x[1], constants)
        case BatchMatmul(adj_y=adj_y):
            tight = constants.limit is not None
            multiplied = [matmul_operand(graph, n, layer, tight) for n in node.inputs]
            facts = kernels.OperandFacts(
                *(m != n for m, n in zip(multiplied, node.inputs, strict=True)),
                y_is_symmetric=graph[multiplied[1]].quant.symmetric,
            )
            return kernels.batch_matmul(x[0], x[1], constants, adj_y=adj_y, facts=facts)
        case Add() | AddMask():
            return elementwise.add(x[0], x[1], constants)
        case Mul() | Keep():
            return elementwise.mul(x[0], x[1], constants)
        case Requantize():
            return elementwise.quantize(x[0], constants, dtype=dtype_of(graph[node.output], layer))
        case Softmax():
            softmax = kernels.softmax_int8 if x[0].dtype == jnp.int8 else kernels.softmax_int16
            return softmax(x[0], constants)
        case Logistic() | Gelu() | Sqrt() | Rsqrt():
            return kernels.unary(x[0], constants)
        case Reshape(shape=shape):
            return movement.reshape(x[0], shape=shape)
        case Transpose(perm=perm):
            return movement.transpose(x[0], perm=perm)
        case Slice(begin=begin, size=size):
            return movement.slice_(x[0], begin=begin, size=size)
        case Concat(axis=axis):
            return movement.concatenation(*x, axis=axis)
        case _:
            assert_never(node.op)
