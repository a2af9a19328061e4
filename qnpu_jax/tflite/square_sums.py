"""Sums of squares, the first step of a norm, spelled for GEMM kernels.

In the graph they are a product of each row with itself. A kernel packs the second operand of every
product anew, and in tiles: of 64 columns in XNNPACK's int8 kernels for AMX, of which a single row
fills one. On such a CPU that took longer than all linears of an int8 prefill (benchmarks/README.md,
Latency). So rows are multiplied block by block, and the squares are the diagonals of the blocks:
the same sums, rounded the same.
"""

from __future__ import annotations

import numpy as np

from qnpu_jax.graph import BatchMatmul, Embedding, Graph, Node, Reshape
from qnpu_jax.tflite.flatbuffer import SubgraphWriter
from qnpu_jax.tflite.operators import add_op
from qnpu_jax.tflite.packing import TensorType

BLOCK = 64
"""Rows of a block, at most: the columns of the widest tile."""


def are_squares(graph: Graph, node: Node) -> bool:
    """Whether a node multiplies rows (T, 1, D) with themselves."""
    if not (isinstance(node.op, BatchMatmul) and node.op.adj_y):
        return False
    return len({*node.inputs}) == 1 and graph[node.inputs[0]].shape[1] == 1


def block_size(rows: int) -> int:
    """The largest divisor of the number of rows that is at most BLOCK: what divides badly (a prime)
    is spelled row by row, and as slow."""
    return max(n for n in range(1, min(rows, BLOCK) + 1) if rows % n == 0)


def places(rows: int, block: int) -> np.ndarray:
    """Where the diagonals lie in the flat products (rows / block, block, block), (rows,) int32."""
    row = np.arange(rows, dtype=np.int32)
    return row * block + row % block


def add_diagonals(
    subgraph: SubgraphWriter,
    x: int,
    y: int,
    block: int,
    type_x: TensorType,
    type_y: TensorType,
) -> None:
    """Adds ops that make `y` (T, 1, 1), the squares of the rows `x` (T, 1, D).

    Args:
      block: rows of a product, a divisor of T.
      type_x, type_y: types and quantizations of `x` and `y`.
    """
    rows, _, width = subgraph.tensors[x].shape
    name, count = subgraph.tensors[y].name, rows // block
    flat = subgraph.add_tensor(f"{name}/rows", (count, block, width), type_x)
    products = subgraph.add_tensor(f"{name}/products", (count, block, block), type_y)
    line = subgraph.add_tensor(f"{name}/line", (rows * block,), type_y)
    at = places(rows, block).reshape(rows, 1, 1)
    index = subgraph.add_tensor(f"{name}/index", at.shape, "int32", data=at)
    add_op(subgraph, Reshape((count, block, width)), [x], flat)
    add_op(subgraph, BatchMatmul(adj_y=True), [flat, flat], products)
    add_op(subgraph, Reshape((rows * block,)), [products], line)
    add_op(subgraph, Embedding(), [index, line], y)
