"""An `IntegerModel` written as a .tflite: every op of the graphs spelled as a LiteRT operator,
layers unrolled.

Tensors keep their names (`layers.3.attn.q`), scales and zero points exactly as frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.flatbuffer import ModelWriter, SubgraphWriter
from qnpu_jax.freeze import IntegerModel
from qnpu_jax.graph import Graph, Node, TensorSpec, is_identity
from qnpu_jax.ops import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    Embedding,
    FullyConnected,
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

DTYPES: dict[int, Literal["int4", "int8", "int16", "int32", "int64"]] = {
    4: "int4",
    8: "int8",
    16: "int16",
    32: "int32",
    64: "int64",
}


def write(
    model: IntegerModel,
    path: Path,
    tokens: int,
    logits: Literal["all", "last"] = "all",
) -> None:
    """Writes the signature `prefill_<tokens>`: ids int32 (tokens,) to logits (tokens or 1, V).

    Args:
      tokens: static length of the prefill.
      logits: of every position, or only the last.

    Raises:
      UserError: more positions than the model has.
    """
    build(model, tokens, logits).write(path)


def build(model: IntegerModel, tokens: int, logits: Literal["all", "last"] = "all") -> ModelWriter:
    """The model of `write`, in memory."""
    dec = model.decoder(tokens, logits=logits)
    writer = ModelWriter()
    subgraph = writer.add_subgraph("main")
    ids = subgraph.add_tensor("ids", (tokens,), "int32")
    shared = {
        name: _shared(subgraph, dec.layer[name], codes) for name, codes in model.inputs(dec).items()
    }
    values, out = {"ids": ids}, ids
    for graph in dec.graphs:
        for layer in range(graph.layers):
            env = _Emitter(model, subgraph, graph, layer).emit(values | shared)
            out = env[graph.outputs[0]]
            values = {"input.residual": out}
    subgraph.add_signature(f"prefill_{tokens}", {"ids": ids}, {"logits": out})
    return writer


def _shared(subgraph: SubgraphWriter, spec: TensorSpec, codes: np.ndarray) -> int:
    assert spec.fixed is not None
    scale, zero_point = spec.fixed
    return subgraph.add_tensor(
        spec.name, spec.shape, "int16", np.float32(scale), zero_point, data=codes
    )


class _Emitter:
    """Emits one graph, for one layer, into a subgraph."""

    def __init__(
        self, model: IntegerModel, subgraph: SubgraphWriter, graph: Graph, layer: int
    ) -> None:
        self.model, self.subgraph, self.graph, self.layer = model, subgraph, graph, layer

    def emit(self, env: dict[str, int]) -> dict[str, int]:
        """Tensor indices by local name; `env` holds those of the inputs."""
        env = dict(env)
        for name, codes in self.model.constants(self.graph, self.layer).items():
            env[name] = self._tensor(self.graph[name], codes)
        for node in self.graph.nodes:
            if is_identity(self.graph, node, self.layer):
                env[node.output] = env[node.inputs[0]]
                continue
            env[node.output] = self._tensor(self.graph[node.output], None)
            code, options, extra = spell(node.op, self.graph, node, self.layer)
            constants = [
                self.subgraph.add_tensor(
                    f"{self._global(node.output)}/{i}", c.shape, "int32", data=c
                )
                for i, c in enumerate(extra)
            ]
            inputs = [env[n] for n in node.inputs]
            if isinstance(node.op, Embedding):
                inputs.reverse()  # GATHER takes the table first
            self.subgraph.add_op(code, options, [*inputs, *constants], [env[node.output]])
        return env

    def _global(self, name: str) -> str:
        if self.graph.prefix == "layers.":
            return f"layers.{self.layer}.{name}"
        return self.graph.prefix + name

    def _at(self, values: dict[str, np.ndarray], name: str) -> Any:
        array = values[self.graph.prefix + name]
        return array[self.layer] if self.graph.prefix == "layers." else array[()]

    def _tensor(self, spec: TensorSpec, data: np.ndarray | None) -> int:
        assert spec.quant is not None
        return self.subgraph.add_tensor(
            self._global(spec.name),
            spec.shape,
            DTYPES[spec.quant.bits[self.layer]],
            np.asarray(self._at(self.model.scale, spec.name), np.float32)[()],
            int(self._at(self.model.zero_point, spec.name)),
            axis=spec.quant.axis or 0,
            data=data,
        )


def spell(op: Op, graph: Graph, node: Node, layer: int) -> tuple[int, Any, list[np.ndarray]]:
    """Operator code, options, and int32 constant operands of an op.

    Reference: google-ai-edge/LiteRT, tflite/converter/schema/schema.fbs; litert.md, section 1.
    """
    code = schema.BuiltinOperator
    match op:
        case Embedding():
            options = schema.GatherOptionsT()
            options.axis = 0
            return code.GATHER, options, []
        case FullyConnected():
            return code.FULLY_CONNECTED, _fully_connected(graph, node, layer), []
        case BatchMatmul(adj_y=adj_y):
            options = schema.BatchMatMulOptionsT()
            options.adjY = adj_y
            return code.BATCH_MATMUL, options, []
        case Add() | AddMask():
            options = schema.AddOptionsT()
            options.potScaleInt16 = False  # the schema's default would round scales to powers of 2
            return code.ADD, options, []
        case Mul():
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


def _fully_connected(graph: Graph, node: Node, layer: int) -> Any:
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    bias = graph[node.inputs[2]].quant
    assert bias is not None
    # Read by int16 kernels only; left unset, the reference kernel takes an int32 bias for int64.
    options.quantizedBiasType = (
        schema.TensorType.INT64 if bias.bits[layer] == 64 else schema.TensorType.INT32
    )
    return options
