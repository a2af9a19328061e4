"""What a run really used of its accumulators, to be held against what was proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qnpu_jax.graph import BatchMatmul, FullyConnected, Graph, Node
from qnpu_jax.integer import IntegerModel, QTensor
from qnpu_sim.program import Program, steps


class Range(NamedTuple):
    """Smallest and largest accumulator of each channel, (N,) int64: one per output channel of a
    FULLY_CONNECTED, one for all of a BATCH_MATMUL."""

    low: np.ndarray
    high: np.ndarray

    def joined(self, other: Range) -> Range:
        """That of both runs."""
        return Range(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


def observed_ranges(model: IntegerModel, program: Program, ids: np.ndarray) -> dict[str, Range]:
    """What every FULLY_CONNECTED and BATCH_MATMUL reached on a text, by global name.

    Holds one layer's tensors at a time.

    Args:
      program: of the model and of T tokens.
      ids: (B, T) token ids, one sequence after the other.
    """
    found: dict[str, Range] = {}
    for sequence in ids:
        for graph, layer, env in steps(program, sequence, lambda _: True):
            tensors = jax.tree.map(np.asarray, env)
            for name, seen in _layer_ranges(model, graph, layer, tensors).items():
                found[name] = found[name].joined(seen) if name in found else seen
    return found


def observed_accumulators(
    model: IntegerModel, dec: Any, tensors: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Largest |accumulator| of every FULLY_CONNECTED and BATCH_MATMUL, by global name.

    Args:
      dec: the graphs that ran.
      tensors: codes of every tensor of one sequence (`qnpu_sim.program.run` with everything kept).
    """
    found: dict[str, int] = {}
    for graph in dec.graphs:
        for layer in range(graph.layers):
            names = {t.name: graph.global_name(layer, t.name) for t in graph.tensors}
            local = {n: tensors[g] for n, g in names.items() if g in tensors}
            for name, seen in _layer_ranges(model, graph, layer, local).items():
                found[name] = int(max(-seen.low.min(), seen.high.max()))
    return found


def _layer_ranges(
    model: IntegerModel, graph: Graph, layer: int, tensors: Mapping[str, np.ndarray]
) -> dict[str, Range]:
    """By global name, from activations by local name.

    Sums are made anew from the codes in float64, where they are exact: |x - z| < 2^17, |w| < 2^7
    and fewer than 2^20 terms stay below 2^53 (16 x 16 bits: fewer than 2^21 terms of 2^32).
    """
    return {
        graph.global_name(layer, node.output): _range(model, graph, layer, node, tensors)
        for node in graph.nodes
        if isinstance(node.op, FullyConnected | BatchMatmul)
    }


def _range(
    model: IntegerModel, graph: Graph, layer: int, node: Node, tensors: Mapping[str, np.ndarray]
) -> Range:
    def at(name: str) -> QTensor:
        return graph.at(model.tensors[graph.prefix + name], layer)

    def centred(name: str) -> np.ndarray:
        return tensors[name].astype(np.float64) - float(at(name).zero_point)

    x = centred(node.inputs[0])
    if isinstance(node.op, FullyConnected):
        w, b = (at(n).codes for n in node.inputs[1:])
        acc = x @ w.T.astype(np.float64)
        low, high = (end.astype(np.int64) + b for end in (acc.min(0), acc.max(0)))
    else:
        assert isinstance(node.op, BatchMatmul)
        y = centred(node.inputs[1])
        acc = x @ (y.swapaxes(1, 2) if node.op.adj_y else y)
        low, high = (np.asarray([end], np.int64) for end in (acc.min(), acc.max()))
    return Range(low, high)
