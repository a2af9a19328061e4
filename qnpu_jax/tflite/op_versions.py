"""Versions of operator codes, as the converter writes them.

A kernel set registers a range of versions for each operator and refuses files outside it. The
reference set takes only low versions. So each operator gets the lowest version that covers its
types.

Reference: google-ai-edge/LiteRT, tflite/tools/versioning/op_version.cc,
  `GetBuiltinOperatorVersion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ai_edge_litert.schema_py_generated import BuiltinOperator as Code

DType = Literal["int4", "int8", "int16", "int32", "int64", "bool", "float32"]


@dataclass(frozen=True)
class Quantization:
    """Affine quantization of a tensor: real = scale[c] (code - zero_point[c]), c along `axis`.

    Attributes:
      scale: float32 vector, one entry per tensor or per channel of `axis`.
      zero_point: int64 vector of the same length.
      axis: channel axis; 0 where there is one entry.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int


@dataclass(frozen=True)
class TensorInfo:
    """Tensor of a subgraph under construction.

    Attributes:
      buffer: index of the buffer with its contents; 0 for an activation.
      quantization: None for a tensor without.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    buffer: int
    quantization: Quantization | None


_BY_INPUT_TYPE: dict[int, dict[str, int]] = {
    Code.ADD: {"int8": 2, "int16": 3, "int64": 4},
    Code.SUB: {"int8": 2, "int16": 5, "int64": 4},
    Code.BATCH_MATMUL: {"int8": 2, "int16": 3},
    Code.SOFTMAX: {"int8": 2, "int16": 3},
    Code.MEAN: {"int8": 2, "int16": 3},
    Code.RSQRT: {"int8": 2, "int16": 3},
    Code.LOGISTIC: {"int8": 2, "int16": 3},
    Code.GELU: {"int8": 2},
    Code.TANH: {"int8": 2, "int16": 3},
    Code.GATHER: {"int8": 2, "bool": 3, "int16": 4, "int4": 7},
    Code.CONCATENATION: {"int8": 2, "int16": 3},
    Code.SLICE: {"int8": 2, "int16": 4},
    Code.TRANSPOSE: {"int8": 2, "bool": 3, "int16": 5, "int4": 7},
    Code.PAD: {"int8": 2, "int16": 3, "bool": 5},
    Code.DEQUANTIZE: {"int8": 2, "int16": 3},
}
"""Version by the type of the first input. Other types, and operators that are not listed, have
version 1."""

_BY_RANK: dict[int, tuple[tuple[int, int], ...]] = {
    Code.SLICE: ((4, 5),),
    Code.TRANSPOSE: ((4, 4), (5, 6)),
    Code.PAD: ((4, 4),),
}
"""Pairs (rank, version): an input of more dimensions than `rank` needs at least `version`."""


def op_version(
    code: int, inputs: Sequence[TensorInfo | None], output: TensorInfo, options: Any
) -> int:
    """Returns the lowest version of an operator that covers its tensors.

    Args:
      code: a member of `schema.BuiltinOperator`.
      inputs: None stands for an optional input that is absent.
      options: options object of the operator, which FULLY_CONNECTED's version depends on.
    """
    first = inputs[0]
    assert first is not None, "the first input of an operator is never optional"
    match code:
        case Code.FULLY_CONNECTED:
            return _fully_connected(inputs, options)
        case Code.QUANTIZE:
            return _quantize(first, output)
        case Code.MUL:
            return _mul(first, inputs[1], output)
        case _:
            version = _BY_INPUT_TYPE.get(code, {}).get(first.dtype, 1)
            ranks = [v for rank, v in _BY_RANK.get(code, ()) if len(first.shape) > rank]
            return max(version, *ranks) if ranks else version


def _fully_connected(inputs: Sequence[TensorInfo | None], options: Any) -> int:
    x, w, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    assert x, "FULLY_CONNECTED has an input"
    assert w, "FULLY_CONNECTED has weights"
    match x.dtype, w.dtype:
        case "int16", "int4":
            return 13
        case "int8", "int4":
            return 10
        case "int16", "int8" if options.quantizedBiasType:
            return 11
        case "int16", "int16":
            return 7
    if bias is None:
        return 6
    if options.keepNumDims:
        return 5
    return 4 if x.dtype == "int8" else 1


def _quantize(x: TensorInfo, output: TensorInfo) -> int:
    if "int4" in (x.dtype, output.dtype):
        return 4
    if any(t.quantization is not None and t.quantization.scale.size > 1 for t in (x, output)):
        return 3
    return 2 if output.dtype == "int16" else 1


def _mul(x: TensorInfo, z: TensorInfo | None, output: TensorInfo) -> int:
    if x.dtype in ("int64", "int16"):
        return {"int64": 5, "int16": 4 if x.quantization else 7}[x.dtype]
    if x.quantization and z and z.quantization and output.quantization:
        sx, sz, sy = (t.quantization.scale[0] for t in (x, z, output) if t.quantization)
        if sx * sz / sy >= 1.0:
            return 3
    return 2 if x.dtype == "int8" else 1
