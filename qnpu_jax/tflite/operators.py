"""Every op of our graphs as an operator of LiteRT.

Reference: google-ai-edge/LiteRT, tflite/converter/schema/schema.fbs; litert.md, section 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.graph import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    Embedding,
    FullyConnected,
    Keep,
    Logistic,
    Mul,
    Op,
    Requantize,
    Reshape,
    Rsqrt,
    Slice,
    Softmax,
    Sqrt,
    Transpose,
)
from qnpu_jax.tflite.flatbuffer import SubgraphWriter


def add_op(subgraph: SubgraphWriter, op: Op, inputs: Sequence[int], output: int) -> None:
    """Adds an op that makes a tensor.

    Args:
      inputs: tensor indices, in the order of `graph.Node.inputs`.
      output: its index; the op's constant operands are named after it.
    """
    bias = subgraph.tensors[inputs[2]].dtype if isinstance(op, FullyConnected) else None
    code, options, operands = _spell(op, bias)
    name = subgraph.tensors[output].name
    constants = [
        subgraph.add_tensor(f"{name}/{i}", c.shape, "int32", data=c) for i, c in enumerate(operands)
    ]
    # GATHER takes the table first.
    ordered = reversed(inputs) if isinstance(op, Embedding) else inputs
    subgraph.add_op(code, options, [*ordered, *constants], [output])


def _spell(op: Op, bias: str | None) -> tuple[int, Any, list[np.ndarray]]:
    """Operator code, options, and int32 constant operands of an op; `bias`: type of a linear's."""
    code = schema.BuiltinOperator
    match op:
        case Embedding():
            options = schema.GatherOptionsT()
            options.axis = 0
            return code.GATHER, options, []
        case FullyConnected():
            options = schema.FullyConnectedOptionsT()
            options.keepNumDims = True
            # Read by int16 kernels only; left unset, the reference kernel takes an int32 bias for
            # int64.
            options.quantizedBiasType = (
                schema.TensorType.INT64 if bias == "int64" else schema.TensorType.INT32
            )
            return code.FULLY_CONNECTED, options, []
        case BatchMatmul(adj_y=adj_y):
            options = schema.BatchMatMulOptionsT()
            options.adjY = adj_y
            return code.BATCH_MATMUL, options, []
        case Add() | AddMask():
            options = schema.AddOptionsT()
            options.potScaleInt16 = False  # the schema's default would round scales to powers of 2
            return code.ADD, options, []
        case Mul() | Keep():
            return code.MUL, schema.MulOptionsT(), []
        case Requantize():
            return code.QUANTIZE, schema.QuantizeOptionsT(), []
        case Softmax():
            options = schema.SoftmaxOptionsT()
            options.beta = 1.0
            return code.SOFTMAX, options, []
        case Logistic():
            return code.LOGISTIC, None, []
        case Sqrt():
            return code.SQRT, None, []
        case Rsqrt():
            return code.RSQRT, None, []
        case Reshape(shape=shape):
            options = schema.ReshapeOptionsT()
            options.newShape = list(shape)
            return code.RESHAPE, options, [np.asarray(shape, np.int32)]
        case Transpose(perm=perm):
            return code.TRANSPOSE, schema.TransposeOptionsT(), [np.asarray(perm, np.int32)]
        case Slice(begin=begin, size=size):
            operands = [np.asarray(begin, np.int32), np.asarray(size, np.int32)]
            return code.SLICE, schema.SliceOptionsT(), operands
        case Concat(axis=axis):
            options = schema.ConcatenationOptionsT()
            options.axis = axis
            return code.CONCATENATION, options, []
        case _:
            assert_never(op)
