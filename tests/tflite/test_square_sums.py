"""Sums of squares as diagonals: the bits of the op they stand for, in every kernel set."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st
from single_op import interpret

from qnpu_jax.tflite.flatbuffer import ModelWriter
from qnpu_jax.tflite.forms import FileForm, Reals
from qnpu_jax.tflite.interpreter import RESOLVERS
from qnpu_jax.tflite.packing import TensorType
from qnpu_jax.tflite.square_sums import BLOCK, add_diagonals, are_squares, block_size, places
from qnpu_jax.tflite.writer import build_prefill

Code = schema.BuiltinOperator
WIDTH = 80


@given(st.integers(1, 40), st.integers(1, 40))
def test_places_are_those_of_the_diagonals(blocks, block):
    rows = blocks * block
    flat = np.arange(rows * block).reshape(blocks, block, block)
    expected = np.diagonal(flat, axis1=1, axis2=2).reshape(-1)
    np.testing.assert_array_equal(places(rows, block), expected)


@given(st.integers(1, 3000))
def test_blocks_are_whole_and_as_large_as_may_be(rows):
    block = block_size(rows)
    assert rows % block == 0 and block <= BLOCK
    assert not any(rows % n == 0 for n in range(block + 1, BLOCK + 1))


@pytest.mark.parametrize("kernels", RESOLVERS)
@pytest.mark.parametrize("rows", [2, 64, 70, 128])
@pytest.mark.parametrize("zero_point", [0, -3])
def test_the_diagonals_are_the_products_of_single_rows(rows, kernels, zero_point):
    """Some sums pass the highest code, which clips them, on the diagonals and beside them. XNNPACK
    takes products of zero point 0 alone."""
    rng = np.random.default_rng(rows)
    x = rng.integers(-127, 128, (rows, 1, WIDTH)) * rng.random((rows, 1, 1))
    x = np.rint(x).astype(np.int8)
    x[0] = 127  # whose square clips, with every kernel
    type_x = TensorType("int8", np.float32(0.037), zero_point)
    type_y = TensorType("int8", np.float32(2.1), -128)
    found = []
    for block in (1, block_size(rows)):
        writer = ModelWriter()
        graph = writer.add_subgraph("main")
        a = graph.add_tensor("x", x.shape, type_x)
        y = graph.add_tensor("y", (rows, 1, 1), type_y)
        if block > 1:
            add_diagonals(graph, a, y, block, type_x, type_y)
        else:
            options = schema.BatchMatMulOptionsT()
            options.adjY = True
            graph.add_op(Code.BATCH_MATMUL, options, [a, a], [y])
        graph.add_signature("op", {"x": a}, {"y": y})
        found.append(interpret(writer.to_bytes(), {"x": x}, kernels))
    assert (found[0] == 127).any() and len(np.unique(found[0])) > 1
    np.testing.assert_array_equal(found[1], found[0])


def operators(model, form: FileForm | None, tokens: int) -> Counter:
    """Shapes of the second operands of a file's BATCH_MATMUL of one tensor with itself."""
    writer = build_prefill(model, tokens, form=form)
    root = schema.Model.GetRootAs(writer.to_bytes(), 0)
    file: Any = schema.ModelT.InitFromObj(root)  # the object API says Optional of everything
    (graph,) = file.subgraphs
    return Counter(
        tuple(graph.tensors[op.inputs[1]].shape)
        for op in graph.operators
        if file.operatorCodes[op.opcodeIndex].builtinCode == Code.BATCH_MATMUL
        and op.inputs[0] == op.inputs[1]
    )


@pytest.mark.parametrize(
    ("plan", "real", "tokens", "shape"),
    [
        ("w8a8i8", False, 24, (1, 24, 48)),
        ("w8a8i8", False, 126, (2, 63, 48)),
        ("w8a8i8", False, 1, (1, 1, 48)),
        ("w8a8", False, 24, (24, 1, 48)),
        ("w8a8", True, 24, (1, 24, 48)),
    ],
)
def test_a_file_has_them_where_they_are_faster(plan, real, tokens, shape):
    """In 8 bits and in floats: LiteRT's kernel for 16 bits packs nothing."""
    model = tiny.quantized("gqa_llama3", plan)
    norms = sum(are_squares(g, n) for g in model.decoder(tokens).graphs for n in g.nodes * g.layers)
    assert operators(model, Reals.of(model) if real else None, tokens) == {shape: norms}
