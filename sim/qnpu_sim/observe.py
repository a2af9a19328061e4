"""Accumulator values that a run reached, to be compared with the proved bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from qnpu_jax.graph import BatchMatmul, FullyConnected, Graph, Node
from qnpu_jax.integer import IntegerModel, QTensor, blocks
from qnpu_sim.program import Program, steps


class Range(NamedTuple):
    """Smallest and largest accumulator per channel, (N,) int64.

    A FULLY_CONNECTED has one channel per output; a BATCH_MATMUL counts as one channel.
    """

    low: np.ndarray
    high: np.ndarray

    def joined(self, other: Range) -> Range:
        """Returns the range of two runs together."""
        return Range(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


def observed_ranges(model: IntegerModel, program: Program, ids: np.ndarray) -> dict[str, Range]:
    """Measures the accumulators of every FULLY_CONNECTED and BATCH_MATMUL on a text.

    Sequences run one after the other. Memory holds one layer's tensors at a time.

    Args:
      program: `compile_model` of the model for T tokens.
      ids: (B, T) token ids.

    Returns:
      Range over all sequences, by global name of the op's output.
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
    """Finds the largest |accumulator| of every FULLY_CONNECTED and BATCH_MATMUL in one run.

    Args:
      dec: the graphs that ran.
      tensors: codes of every tensor of one sequence, by global name (`run` with `keep="*"`).

    Returns:
      By global name of the op's output.
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
    """Ranges of one layer's accumulators, by global name.

    The sums are recomputed from the codes in float64, which holds integers up to 2^53 exactly:
    FULLY_CONNECTED has fewer than 2^20 terms below 2^17 2^7, BATCH_MATMUL fewer than 2^21 terms
    below 2^32.

    Args:
      tensors: activations and inputs by local name.
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
        # A head in float64 whole would be twice as large as in float32, which nothing else needs.
        sums = [x @ w[block].T.astype(np.float64) for block in blocks(w)]
        ends = [(acc.min(0), acc.max(0)) for acc in sums]
        low, high = (np.concatenate(end).astype(np.int64) + b for end in zip(*ends, strict=True))
    else:
        assert isinstance(node.op, BatchMatmul)
        y = centred(node.inputs[1])
        acc = x @ (y.swapaxes(1, 2) if node.op.adj_y else y)
        low, high = (np.asarray([end], np.int64) for end in (acc.min(), acc.max()))
    return Range(low, high)
