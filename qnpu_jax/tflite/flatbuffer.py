"""The .tflite container: tensors, buffers, operators and signatures, bit for bit as given.

Scales and zero points may be learned, so the file must hold exactly these, which no converter does.
This module writes the flatbuffer through the object API of its schema. It knows nothing of graphs:
`qnpu_jax.tflite.emitter` translates them.

Reference: google-ai-edge/LiteRT, tflite/converter/schema/schema.fbs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.tflite.op_versions import DType, TensorInfo, op_version
from qnpu_jax.tflite.packing import TensorType, checked_quantization, packed

_ALIGNMENT = 16
"""Every buffer starts at a multiple of this (schema.fbs: `data:[ubyte] (force_align: 16)`)."""

DEFAULT_EMBED_LIMIT = 2**31 - 2**20
"""Largest total of buffer bytes that goes inside the flatbuffer, whose 32-bit offsets end at
2 GiB."""


@runtime_checkable
class ByteSink(Protocol):
    """Binary file, or anything else that takes bytes in order."""

    def write(self, data: Any, /) -> Any:
        """Appends bytes (any object with the buffer protocol)."""


class SubgraphWriter:
    """Subgraph under construction: tensors and operators, numbered in the order of their adding."""

    def __init__(self, model: ModelWriter, name: str) -> None:
        self.name = name
        self.tensors: list[TensorInfo] = []
        self._model = model
        self._operators: list[schema.OperatorT] = []
        self._inputs: list[int] = []
        self._outputs: list[int] = []

    def add_tensor(
        self,
        name: str,
        shape: Sequence[int],
        kind: TensorType | DType,
        data: np.ndarray | None = None,
    ) -> int:
        """Adds a tensor and returns its index in this subgraph.

        Args:
          name: should be unique in the subgraph, which is not checked.
          shape: static dimensions.
          kind: type and quantization; a bare dtype for a tensor without quantization.
          data: constant contents in C order; None for an activation.

        Raises:
          UserError: scale is not float32 or does not match the axis; data does not match shape or
            dtype, or int4 codes leave [-8, 7].
        """
        shape = tuple(int(d) for d in shape)
        kind = TensorType(kind) if isinstance(kind, str) else kind
        quantization = checked_quantization(name, shape, kind)
        content = None if data is None else packed(name, shape, kind.dtype, data)
        buffer = 0 if content is None else self._model.add_buffer(content)
        self.tensors.append(TensorInfo(name, shape, kind.dtype, buffer, quantization))
        return len(self.tensors) - 1

    def add_op(
        self,
        code: int,
        options: Any,
        inputs: Sequence[int],
        outputs: Sequence[int],
        version: int | None = None,
    ) -> None:
        """Adds an operator.

        Args:
          code: a member of `schema.BuiltinOperator`.
          options: its options object (`schema.AddOptionsT()`...), or None.
          inputs, outputs: tensor indices; -1 stands for an optional input that is absent.
          version: of the operator; None takes the lowest that will do (`op_version`).
        """
        if version is None:
            version = op_version(
                code, [self._type(i) for i in inputs], self.tensors[outputs[0]], options
            )
        op = schema.OperatorT()
        op.opcodeIndex = self._model.add_operator_code(code, version)
        op.inputs = list(inputs)
        op.outputs = list(outputs)
        if options is not None:
            _set_options(op, options)
        self._operators.append(op)

    def add_signature(
        self, key: str, inputs: Mapping[str, int], outputs: Mapping[str, int]
    ) -> None:
        """Names the subgraph's inputs and outputs, in the order of the mappings."""
        self.finish(list(inputs.values()), list(outputs.values()))
        self._model.add_signature(self, key, inputs, outputs)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Sets the subgraph's inputs and outputs, as tensor indices."""
        self._inputs, self._outputs = list(inputs), list(outputs)

    @property
    def index(self) -> int:
        """Number of the subgraph in its model."""
        return self._model.index(self)

    def sibling(self, name: str) -> SubgraphWriter:
        """Adds another, empty subgraph to the same model."""
        return self._model.add_subgraph(name)

    def _type(self, index: int) -> TensorInfo | None:
        return None if index < 0 else self.tensors[index]

    def _pack(self) -> schema.SubGraphT:
        graph = schema.SubGraphT()
        graph.name = self.name
        graph.tensors = [_tensor(t) for t in self.tensors]
        graph.inputs = self._inputs
        graph.outputs = self._outputs
        graph.operators = self._operators
        return graph


@dataclass
class _Constants:
    """Contents of the buffers, equal ones kept once. Buffer 0 is empty: a tensor without
    contents."""

    contents: list[memoryview] = field(default_factory=lambda: [memoryview(b"")])
    index: dict[bytes, int] = field(default_factory=dict)

    def add(self, content: memoryview) -> int:
        key = hashlib.blake2b(content, digest_size=32).digest()
        if key not in self.index:
            self.index[key] = len(self.contents)
            self.contents.append(content)
        return self.index[key]


class ModelWriter:
    """A .tflite model under construction. Equal calls in equal order give equal bytes.

    Example:
      writer = ModelWriter()
      graph = writer.add_subgraph("decode")
      x = graph.add_tensor("x", (1, 4), TensorType("int8", np.float32(0.5)))
      y = graph.add_tensor("y", (1, 4), TensorType("int8", np.float32(1 / 256), -128))
      graph.add_op(schema.BuiltinOperator.LOGISTIC, None, [x], [y])
      graph.add_signature("decode", {"x": x}, {"y": y})
      writer.write(path)
    """

    def __init__(self, description: str = "qnpu-jax") -> None:
        self._description = description
        self._subgraphs: list[SubgraphWriter] = []
        self._signatures: list[schema.SignatureDefT] = []
        self._codes: dict[tuple[int, int], int] = {}
        self._constants = _Constants()

    def add_subgraph(self, name: str) -> SubgraphWriter:
        """Adds an empty subgraph; the first is the model's main one."""
        self._subgraphs.append(SubgraphWriter(self, name))
        return self._subgraphs[-1]

    def index(self, subgraph: SubgraphWriter) -> int:
        """Returns the number of a subgraph."""
        return self._subgraphs.index(subgraph)

    def add_buffer(self, content: np.ndarray | bytes) -> int:
        """Returns the index of the buffer with these bytes, and adds it where there is none.

        The array is not copied: it must not change before the model is written.
        """
        array = (
            np.ascontiguousarray(content)
            if isinstance(content, np.ndarray)
            else np.frombuffer(content, np.uint8)
        )
        return self._constants.add(array.reshape(-1).view(np.uint8).data)

    def add_operator_code(self, code: int, version: int) -> int:
        """Returns the index of an operator code of this version, and adds it if there is none."""
        return self._codes.setdefault((code, version), len(self._codes))

    def add_signature(
        self,
        subgraph: SubgraphWriter,
        key: str,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
    ) -> None:
        """Adds a signature of a subgraph: names of its inputs and outputs, with tensor indices.

        Call `SubgraphWriter.add_signature`, which also sets the subgraph's inputs and outputs.
        """
        signature = schema.SignatureDefT()
        signature.signatureKey = key
        signature.subgraphIndex = self.index(subgraph)
        signature.inputs = [_tensor_map(n, i) for n, i in inputs.items()]
        signature.outputs = [_tensor_map(n, i) for n, i in outputs.items()]
        self._signatures.append(signature)

    def to_bytes(self, embed_limit: int = DEFAULT_EMBED_LIMIT) -> bytes:
        """Returns the bytes that `write` writes."""
        file = io.BytesIO()
        self._write(file, embed_limit)
        return file.getvalue()

    def write(
        self, path: str | PathLike[str] | ByteSink, embed_limit: int = DEFAULT_EMBED_LIMIT
    ) -> None:
        """Writes the model to a path or to an empty binary file.

        Buffers whose bytes total at most `embed_limit` lie inside the flatbuffer. Larger ones
        follow it, each at a multiple of 16 bytes, and `Buffer.offset` and `size` point at them. So
        files over 2 GB work, and contents go to disk one by one, without a second copy in memory.

        Args:
          path: file to write or replace, or an open binary file at its start.
          embed_limit: bytes.
        """
        if isinstance(path, (str, PathLike)):
            with open(path, "wb") as file:
                self._write(file, embed_limit)
        else:
            self._write(path, embed_limit)

    def _write(self, file: ByteSink, embed_limit: int) -> None:
        contents = self._constants.contents
        total = sum(len(c) for c in contents)
        # Offsets have full width whatever their value, so a first pass gives the final length.
        length = len(self._flatbuffer([_external_buffer(c, 1) for c in contents], 2**16))
        if total <= embed_limit:
            # Room for everything at once, because a builder copies all it holds when it grows.
            capacity = length + total + 2 * _ALIGNMENT * len(contents)
            file.write(self._flatbuffer([_EmbeddedBuffer(c) for c in contents], capacity))
            return
        offsets = _offsets([len(c) for c in contents], length)
        buffers = [_external_buffer(c, o) for c, o in zip(contents, offsets, strict=True)]
        header = self._flatbuffer(buffers, length)
        assert len(header) == length, "the flatbuffer's length depends on the value of an offset"
        file.write(header)
        position = length
        for content, offset in zip(contents, offsets, strict=True):
            if len(content):
                file.write(bytes(offset - position))
                file.write(content)
                position = offset + len(content)

    def _flatbuffer(self, buffers: list[schema.BufferT], capacity: int) -> memoryview:
        model = schema.ModelT()
        model.version = 3
        model.description = self._description
        model.operatorCodes = [_operator_code(code, version) for code, version in self._codes]
        model.subgraphs = [g._pack() for g in self._subgraphs]
        model.buffers = buffers
        model.signatureDefs = self._signatures
        builder = flatbuffers.Builder(capacity)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return memoryview(builder.Bytes)[builder.Head() :]


class _EmbeddedBuffer(schema.BufferT):
    """Buffer inside the flatbuffer, aligned to 16 bytes, which the generated `Pack` does not do."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self.content = content

    def Pack(self, builder: flatbuffers.Builder) -> int:
        data = None
        if len(self.content):
            builder.StartVector(1, len(self.content), _ALIGNMENT)
            builder.head -= len(self.content)
            builder.Bytes[builder.head : builder.head + len(self.content)] = self.content
            data = builder.EndVector()
        schema.BufferStart(builder)
        if data is not None:
            schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


def _set_options(op: schema.OperatorT, options: Any) -> None:
    """Puts an options object in the union that has its type: newer operators' are in the second."""
    name = type(options).__name__.removesuffix("T")
    if hasattr(schema.BuiltinOptions, name):
        op.builtinOptionsType = getattr(schema.BuiltinOptions, name)
        op.builtinOptions = options
    else:
        op.builtinOptions2Type = getattr(schema.BuiltinOptions2, name)
        op.builtinOptions2 = options


def _external_buffer(content: memoryview, offset: int) -> schema.BufferT:
    buffer = schema.BufferT()
    if len(content):
        buffer.offset, buffer.size = offset, len(content)
    return buffer


def _offsets(sizes: Sequence[int], start: int) -> list[int]:
    """Returns file offsets of contents of these sizes, each at the next multiple of the
    alignment."""
    offsets = []
    for size in sizes:
        start = -(-start // _ALIGNMENT) * _ALIGNMENT
        offsets.append(start)
        start += size
    return offsets


def _tensor(info: TensorInfo) -> schema.TensorT:
    tensor = schema.TensorT()
    tensor.name = info.name
    tensor.shape = list(info.shape)
    tensor.type = getattr(schema.TensorType, info.dtype.upper())
    tensor.buffer = info.buffer
    tensor.hasRank = True
    if info.quantization is not None:
        # `Pack` also takes arrays, beside the lists that its annotations name, and copies them.
        parameters: Any = schema.QuantizationParametersT()
        parameters.scale = info.quantization.scale
        parameters.zeroPoint = info.quantization.zero_point
        parameters.quantizedDimension = info.quantization.axis
        tensor.quantization = parameters
    return tensor


def _operator_code(code: int, version: int) -> schema.OperatorCodeT:
    entry = schema.OperatorCodeT()
    entry.builtinCode = code
    entry.deprecatedBuiltinCode = min(code, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    entry.version = version
    return entry


def _tensor_map(name: str, index: int) -> schema.TensorMapT:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry
