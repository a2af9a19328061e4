"""Sums of squares, the first step of a norm, as products that GEMM kernels are good at.

In the graph each row x (1, D) is multiplied with itself: x x^T. A GEMM kernel packs the second
operand of every product in tiles, and one row fills one column of a tile: of 64 in XNNPACK's int8
kernels for AMX. On such a CPU this took longer than all linears of an int8 prefill
(benchmarks/README.md).

So a block X (block, D) of rows is multiplied at once, and the sums are the diagonal of X X^T. Each
is the same sum, rounded the same way.
"""

from __future__ import annotations

import numpy as np

from qnpu_jax.graph import BatchMatmul, Embedding, Graph, Node, Reshape
from qnpu_jax.tflite.flatbuffer import SubgraphWriter
from qnpu_jax.tflite.operators import add_op
from qnpu_jax.tflite.packing import TensorType

BLOCK = 64
"""Largest number of rows in a block: the columns of the widest tile."""


def are_squares(graph: Graph, node: Node) -> bool:
    """Whether a node multiplies rows (T, 1, D) with themselves."""
    if not (isinstance(node.op, BatchMatmul) and node.op.adj_y):
        return False
    return len({*node.inputs}) == 1 and graph[node.inputs[0]].shape[1] == 1


def block_size(rows: int) -> int:
    """Returns the largest divisor of the number of rows that is at most BLOCK.

    A prime number of rows above BLOCK gives 1: row by row, as slow as without blocks.

    Example:
      >>> block_size(128), block_size(70), block_size(67)
      (64, 35, 1)
    """
    return max(n for n in range(1, min(rows, BLOCK) + 1) if rows % n == 0)


def places(rows: int, block: int) -> np.ndarray:
    """Returns where the diagonals lie in the flattened products (rows / block, block, block).

    Returns:
      (rows,) int32.

    Example:
      >>> places(4, 2).tolist()
      [0, 3, 4, 7]
    """
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
    """Adds ops that make `y` (T, 1, 1), the sums of squares of the rows `x` (T, 1, D).

    Args:
      x, y: tensor indices.
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
