"""Proof that no accumulator overflows: the interval each can reach, from the actual integer
weights.

FULLY_CONNECTED: y_j = sum_k w_jk (x_k - z) + b_j with x_k - z in [lo, hi] lies in
[P_j lo + N_j hi + b_j, P_j hi + N_j lo + b_j], P and N the sums of the positive and negative
weights of row j. Both ends are reached by an input, so the bound is tight. BATCH_MATMUL: K max|x -
z_x| max|y - z_y|.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from qnpu_jax.config import UserError
from qnpu_jax.decoder import Decoder
from qnpu_jax.graph import Graph, Node, TensorSpec
from qnpu_jax.ops import BatchMatmul, FullyConnected, Requantize


@dataclass(frozen=True)
class Bound:
    """The proved interval of one op's accumulator (codes), and the bits that hold it and that it
    has."""

    tensor: str
    low: int
    high: int
    available: int

    @property
    def needed(self) -> int:
        """Bits of the smallest two's-complement integer that holds the interval."""
        return max(self.high.bit_length(), (-self.low - 1).bit_length() if self.low < 0 else 0) + 1


def proved_bounds(
    dec: Decoder, codes: Mapping[str, np.ndarray], zero_point: Mapping[str, np.ndarray]
) -> list[Bound]:
    """One bound per FULLY_CONNECTED and BATCH_MATMUL and layer, by global name.

    Args:
      codes: integer weights and biases by global name, as in `IntegerModel`.
      zero_point: by global name.
    """
    return [
        bound
        for graph in dec.graphs
        for layer in range(graph.layers)
        for bound in _graph_bounds(graph, layer, codes, zero_point)
    ]


def _graph_bounds(
    graph: Graph, layer: int, codes: Mapping[str, np.ndarray], zero_point: Mapping[str, np.ndarray]
) -> Iterator[Bound]:
    layered = graph.prefix == "layers."
    producer = {n.output: n for n in graph.nodes}

    def at(values: Mapping[str, np.ndarray], name: str) -> Any:
        array = values[graph.prefix + name]
        return array[layer] if layered else array

    def interval(name: str) -> tuple[int, int]:
        """Reachable values of code - zero point; a widened tensor keeps those of its source."""
        node: Node | None = producer.get(name)
        if node is not None and isinstance(node.op, Requantize):
            source = node.inputs[0]
            if _bits(graph[source], layer) < _bits(graph[name], layer):
                return interval(source)
        low, high = _limits(graph[name], layer)
        zero = int(at(zero_point, name))
        return low - zero, high - zero

    for node in graph.nodes:
        name = f"layers.{layer}.{node.output}" if layered else graph.prefix + node.output
        match node.op:
            case FullyConnected():
                x, w, b = node.inputs
                bias, available = at(codes, b), _bits(graph[b], layer)
                low, high = _linear(at(codes, w), bias, *interval(x))
                yield Bound(name, low, high, available)
            case BatchMatmul():
                x, y = node.inputs
                largest = [max(abs(v) for v in interval(n)) for n in (x, y)]
                reach = largest[0] * largest[1] * graph[x].shape[2]
                yield Bound(name, -reach, reach, 32 if _bits(graph[x], layer) <= 8 else 64)
            case _:
                pass


def _linear(
    w: Int[np.ndarray, "n k"], b: Int[np.ndarray, " n"], low: int, high: int
) -> tuple[int, int]:
    """Smallest and largest accumulator over all rows."""
    positive = np.where(w > 0, w, 0).sum(axis=1, dtype=np.int64)
    negative = w.sum(axis=1, dtype=np.int64) - positive
    ends = (positive * low + negative * high + b, positive * high + negative * low + b)
    return int(ends[0].min()), int(ends[1].max())


def _bits(spec: TensorSpec, layer: int) -> int:
    assert spec.quant is not None
    return spec.quant.bits[layer]


def _limits(spec: TensorSpec, layer: int) -> tuple[int, int]:
    bits = _bits(spec, layer)
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def check(bounds: list[Bound]) -> None:
    """Raises UserError for the first op whose accumulator can overflow."""
    for bound in bounds:
        if bound.needed > bound.available:
            reach = max(-bound.low, bound.high)
            raise UserError(
                f"{bound.tensor}: its accumulator can reach {reach}, which needs {bound.needed}"
                " bits;"
                f" expected at most {bound.available}; give {bound.tensor}.bias 64 bits in the"
                " bit plan"
                " or its input fewer"
            )
