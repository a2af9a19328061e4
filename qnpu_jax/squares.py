"""Sums of squares, the first step of a norm, spelled for GEMM kernels.

In the graph they are a product of each row with itself. A kernel packs the second operand of every
product anew, XNNPACK's in tiles of 64 columns, of which a single row fills one: in an int8 prefill
that took longer than all linears. So rows are multiplied block by block, and the squares are the
diagonals of the blocks: the same sums, rounded the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.flatbuffer import SubgraphWriter
from qnpu_jax.graph import Node
from qnpu_jax.ops import BatchMatmul

BLOCK = 64
"""Rows of a block, at most: the columns of a tile of XNNPACK's int8 GEMMs for AMX and AVX-512."""

Code = schema.BuiltinOperator


def are_squares(node: Node) -> bool:
    """Whether a node multiplies rows (T, 1, D) with themselves."""
    return isinstance(node.op, BatchMatmul) and node.op.adj_y and len({*node.inputs}) == 1


def block_size(rows: int, most: int = BLOCK) -> int:
    """The largest divisor of the number of rows that is at most `most`."""
    return max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)


def places(rows: int, block: int) -> np.ndarray:
    """Where the diagonals lie in the flat products (rows / block, block, block), (rows,) int32."""
    row = np.arange(rows, dtype=np.int32)
    return row * block + row % block


def add_diagonals(
    subgraph: SubgraphWriter, x: int, y: int, block: int, forms: tuple[Mapping[str, Any], ...]
) -> None:
    """Adds ops that make `y` (T, 1, 1), the squares of the rows `x` (T, 1, D).

    Args:
      block: rows of a product, a divisor of T.
      forms: of x and of y, as `SubgraphWriter.add_tensor` takes them.
    """
    rows, _, width = subgraph.tensors[x].shape
    name, count = subgraph.tensors[y].name, rows // block
    form_x, form_y = forms
    flat = subgraph.add_tensor(f"{name}/rows", (count, block, width), **form_x)
    products = subgraph.add_tensor(f"{name}/products", (count, block, block), **form_y)
    line = subgraph.add_tensor(f"{name}/line", (rows * block,), **form_y)
    at = places(rows, block).reshape(rows, 1, 1)
    index = subgraph.add_tensor(f"{name}/index", at.shape, "int32", data=at)
    _reshape(subgraph, x, flat)
    options = schema.BatchMatMulOptionsT()
    options.adjY = True
    subgraph.add_op(Code.BATCH_MATMUL, options, [flat, flat], [products])
    _reshape(subgraph, products, line)
    add_gather(subgraph, line, index, y)


def add_gather(subgraph: SubgraphWriter, table: int, index: int, y: int) -> None:
    """Adds y = table[index], along the table's first axis."""
    options = schema.GatherOptionsT()
    options.axis = 0
    subgraph.add_op(Code.GATHER, options, [table, index], [y])


def _reshape(subgraph: SubgraphWriter, x: int, y: int) -> None:
    shape = np.asarray(subgraph.tensors[y].shape, np.int32)
    options = schema.ReshapeOptionsT()
    options.newShape = shape.tolist()
    name = f"{subgraph.tensors[y].name}/shape"
    held = subgraph.add_tensor(name, shape.shape, "int32", data=shape)
    subgraph.add_op(Code.RESHAPE, options, [x, held], [y])
