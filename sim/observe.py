"""What a run really used of its accumulators, to be held against what was proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qnpu_jax.freeze import IntegerModel
from qnpu_jax.graph import Graph, Node
from qnpu_jax.ops import BatchMatmul, FullyConnected
from sim.run import global_name


def observed_accumulators(
    model: IntegerModel, dec: Any, tensors: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Largest |accumulator| of every FULLY_CONNECTED and BATCH_MATMUL, by global name.

    Sums are made anew from the codes in float64, where they are exact: |x - z| < 2^17, |w| < 2^7
    and fewer than 2^20 terms stay below 2^53 (16 x 16 bits: fewer than 2^21 terms of 2^32).

    Args:
      dec: the graphs that ran.
      tensors: codes of every tensor of one sequence (`sim.run.run` with everything kept).
    """
    found: dict[str, int] = {}
    for graph in dec.graphs:
        for layer in range(graph.layers):
            for node in graph.nodes:
                if isinstance(node.op, FullyConnected | BatchMatmul):
                    name = global_name(graph, layer, node.output)
                    found[name] = _largest(model, graph, layer, node, tensors)
    return found


def _largest(
    model: IntegerModel, graph: Graph, layer: int, node: Node, tensors: Mapping[str, np.ndarray]
) -> int:
    def at(values: dict[str, np.ndarray], name: str) -> Any:
        array = values[graph.prefix + name]
        return array[layer] if graph.prefix == "layers." else array

    def centred(name: str) -> np.ndarray:
        codes = tensors[global_name(graph, layer, name)]
        return codes.astype(np.float64) - float(at(model.zero_point, name))

    x = centred(node.inputs[0])
    if isinstance(node.op, FullyConnected):
        w, b = (at(model.codes, n).astype(np.float64) for n in node.inputs[1:])
        return int(np.abs(x @ w.T + b).max())
    y = centred(node.inputs[1])
    adjoint = isinstance(node.op, BatchMatmul) and node.op.adj_y
    return int(np.abs(x @ (y.swapaxes(1, 2) if adjoint else y)).max())
