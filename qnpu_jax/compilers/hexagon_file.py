"""Reader of compiled .tflite files. Each signature has one op, DISPATCH_OP, that runs a graph of a
binary appended to the file.

Reference: LiteRT, litert/core/dispatch_op_schema.cc (keys of the op's options).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from qnpu_jax.errors import UserError

DISPATCH = b"DISPATCH_OP"
_DTYPES = {
    schema.TensorType.INT8: np.dtype(np.int8),
    schema.TensorType.INT16: np.dtype(np.int16),
    schema.TensorType.INT32: np.dtype(np.int32),
}


@dataclass(frozen=True)
class Port:
    """Input or output of a signature.

    Attributes:
      name: in the signature.
      tensor: name of its tensor.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Dispatched:
    """Signature whose one op runs a compiled graph.

    Attributes:
      key: name of the signature.
      graph: name of the graph in the binary.
      offset, size: place of the binary in the file, in bytes.
      inputs, outputs: in the order of the op.
    """

    key: str
    graph: str
    offset: int
    size: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def signatures(path: Path) -> tuple[str, ...]:
    """Returns the names of the signatures of any .tflite, in the order of their subgraphs.

    Subgraphs without a signature, those of composites, are passed over.
    """
    model, _ = _read(path)
    ordered = sorted(model.signatureDefs, key=lambda s: s.subgraphIndex)
    return tuple(s.signatureKey.decode() for s in ordered)


def read(path: Path) -> dict[str, Dispatched]:
    """Reads the signatures of a compiled file, by name.

    Raises:
      UserError: the file is missing, no .tflite, cut off, or has ops that are not compiled.
    """
    model, length = _read(path)
    found = {}
    for signature in model.signatureDefs:
        key = signature.signatureKey.decode()
        graph = model.subgraphs[signature.subgraphIndex]
        codes = [model.operatorCodes[op.opcodeIndex].customCode for op in graph.operators]
        if codes != [DISPATCH]:
            raise UserError(
                f"{path}: {key} has {len(codes)} ops, {codes.count(DISPATCH)} of them compiled;"
                " expected one, which runs all of it; compile it with `qnpu compile`"
            )
        op = graph.operators[0]
        options: Any = flexbuffers.Loads(bytes(op.customOptions))
        offset, size = options["bytecode_offset"], options["bytecode_size"]
        if offset + size > length:
            raise UserError(
                f"{path}: {length} bytes, expected {offset + size}; it is cut off; compile it again"
            )
        ins = _ports(graph, signature.inputs, op.inputs)
        outs = _ports(graph, signature.outputs, op.outputs)
        found[key] = Dispatched(key, options["name"], offset, size, ins, outs)
    return found


def _ports(graph: Any, names: Any, order: Any) -> tuple[Port, ...]:
    known = {m.tensorIndex: m.name.decode() for m in names}
    tensors = [(known.get(i, ""), graph.tensors[i]) for i in order]
    return tuple(
        Port(name, t.name.decode(), tuple(int(n) for n in t.shape), _DTYPES[t.type])
        for name, t in tensors
    )


def _read(path: Path) -> tuple[Any, int]:
    """Reads the model of a .tflite, and the length of the file in bytes."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] != b"TFL3":
                raise UserError(f"{path}: not a .tflite; expected one")
            return schema.ModelT.InitFromObj(schema.Model.GetRootAs(bytes(data), 0)), len(data)
    except (OSError, ValueError, struct.error) as error:  # the last: an offset past the end
        raise UserError(
            f"{path}: cannot be read as a .tflite ({error}); check the file, or write it again"
        ) from None
