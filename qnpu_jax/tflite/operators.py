"""Operators of LiteRT, one for each op of a graph.

Reference: google-ai-edge/LiteRT, tflite/converter/schema/schema.fbs.
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
    Gelu,
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

Code = schema.BuiltinOperator


def add_op(subgraph: SubgraphWriter, op: Op, inputs: Sequence[int], output: int) -> None:
    """Adds the operator of an op to a subgraph.

    Args:
      inputs: tensor indices, in the order of `graph.Node.inputs`.
      output: index of the tensor that the op makes. Constant operands of the operator (a shape, a
        permutation) are named after it.
    """
    bias = subgraph.tensors[inputs[2]].dtype if isinstance(op, FullyConnected) else None
    name = subgraph.tensors[output].name
    constants = [
        subgraph.add_tensor(f"{name}/{i}", c.shape, "int32", data=c)
        for i, c in enumerate(_operands(op))
    ]
    # GATHER takes the table first.
    ordered = reversed(inputs) if isinstance(op, Embedding) else inputs
    subgraph.add_op(_CODES[type(op)], _options(op, bias), [*ordered, *constants], [output])


_CODES: dict[type, int] = {
    Embedding: Code.GATHER,
    FullyConnected: Code.FULLY_CONNECTED,
    BatchMatmul: Code.BATCH_MATMUL,
    Add: Code.ADD,
    AddMask: Code.ADD,
    Mul: Code.MUL,
    Keep: Code.MUL,
    Requantize: Code.QUANTIZE,
    Softmax: Code.SOFTMAX,
    Logistic: Code.LOGISTIC,
    Gelu: Code.GELU,
    Sqrt: Code.SQRT,
    Rsqrt: Code.RSQRT,
    Reshape: Code.RESHAPE,
    Transpose: Code.TRANSPOSE,
    Slice: Code.SLICE,
    Concat: Code.CONCATENATION,
}
"""LiteRT's operator of each op of a graph."""


def _options(op: Op, bias: str | None) -> Any:
    """Returns the options object of an op's operator, None where it has none.

    Args:
      bias: dtype of a linear's bias, None for other ops.
    """
    match op:
        case Embedding():
            return _filled(schema.GatherOptionsT(), axis=0)
        case FullyConnected():
            # Read by int16 kernels only; left unset, the reference kernel takes an int32 bias for
            # int64.
            kind = schema.TensorType.INT64 if bias == "int64" else schema.TensorType.INT32
            return _filled(
                schema.FullyConnectedOptionsT(), keepNumDims=True, quantizedBiasType=kind
            )
        case BatchMatmul(adj_y=adj_y):
            return _filled(schema.BatchMatMulOptionsT(), adjY=adj_y)
        case Add() | AddMask():
            # The schema's default would round scales to powers of 2.
            return _filled(schema.AddOptionsT(), potScaleInt16=False)
        case Mul() | Keep():
            return schema.MulOptionsT()
        case Requantize():
            return schema.QuantizeOptionsT()
        case Softmax():
            return _filled(schema.SoftmaxOptionsT(), beta=1.0)
        case Gelu():
            return _filled(schema.GeluOptionsT(), approximate=True)
        case Logistic() | Sqrt() | Rsqrt():
            return None
        case Reshape(shape=shape):
            return _filled(schema.ReshapeOptionsT(), newShape=list(shape))
        case Transpose():
            return schema.TransposeOptionsT()
        case Slice():
            return schema.SliceOptionsT()
        case Concat(axis=axis):
            return _filled(schema.ConcatenationOptionsT(), axis=axis)
        case _:
            assert_never(op)


def _filled(options: Any, **fields: Any) -> Any:
    """Sets fields of an options object and returns it."""
    for name, value in fields.items():
        setattr(options, name, value)
    return options


def _operands(op: Op) -> list[np.ndarray]:
    """Returns the int32 constants that an op's operator takes after its inputs."""
    match op:
        case Reshape(shape=shape):
            return [np.asarray(shape, np.int32)]
        case Transpose(perm=perm):
            return [np.asarray(perm, np.int32)]
        case Slice(begin=begin, size=size):
            return [np.asarray(begin, np.int32), np.asarray(size, np.int32)]
        case _:
            return []
