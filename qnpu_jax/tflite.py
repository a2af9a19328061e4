"""An `IntegerModel` written as a .tflite: every op of the graphs spelled as a LiteRT operator,
layers unrolled.

Tensors keep their names (`layers.3.attn.q`), scales and zero points exactly as frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.config import UserError
from qnpu_jax.decoder import Decoder
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

Positions = Literal["all", "last"]
"""Of which positions a signature gives logits."""
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
    logits: Positions = "all",
) -> None:
    """Writes the signature `prefill_<tokens>`: ids int32 (tokens,) to logits (tokens or 1, V).

    Args:
      tokens: static length of the prefill.
      logits: of every position, or only the last.

    Raises:
      UserError: more positions than the model has.
    """
    build(model, tokens, logits).write(path)


def build(model: IntegerModel, tokens: int, logits: Positions = "all") -> ModelWriter:
    """The model of `write`, in memory."""
    dec = model.decoder(tokens, logits=logits)
    writer = ModelWriter()
    subgraph = writer.add_subgraph("main")
    ids = subgraph.add_tensor("ids", (tokens,), "int32")
    shared = {
        name: _shared(subgraph, dec.layer[name], codes) for name, codes in model.inputs(dec).items()
    }
    out, _ = _emit(model, subgraph, dec, ids, shared, [{}] * dec.layer.layers)
    subgraph.add_signature(f"prefill_{tokens}", {"ids": ids}, {"logits": out})
    return writer


def write_cached(
    model: IntegerModel,
    path: Path,
    prefill: int,
    context: int,
    logits: Positions = "last",
) -> None:
    """Writes the signatures `prefill_<prefill>` and `decode` (one token), which share all weights.

    Inputs of T tokens: `ids` (T,) int32; `positions` (T,) int32, 0 for the first token after the
    prefix; `mask` (T, 1, S) int16, 0 where a token may look, MASK_CODE elsewhere, S = prefix +
    context; for every layer i `kv_cache_k_<i>` and `kv_cache_v_<i>` (N, context - T, K) int8, the
    slots before the new tokens, those not filled yet masked. Outputs: `logits`, and the new rows
    `kv_slice_k_<i>`, `kv_slice_v_<i>` (N, T, K), which the host puts in the cache.

    Every signature has the same S: LiteRT's int16 SOFTMAX leaves a little to each masked key, so
    only then chunks and single steps give the bits that one long prefill gives.

    Args:
      prefill: tokens of the long signature.
      context: positions after the prefix, the new tokens included.
      logits: of all positions of a prefill or only of the last.

    Raises:
      UserError: more positions than the model has, or a context without room for a cache.
    """
    build_cached(model, prefill, context, logits).write(path)


def build_cached(
    model: IntegerModel, prefill: int, context: int, logits: Positions = "last"
) -> ModelWriter:
    """The model of `write_cached`, in memory."""
    writer = ModelWriter()
    for key, tokens in ((f"prefill_{prefill}", prefill), ("decode", 1)):
        dec = cached_decoder(model, tokens, context, logits)
        subgraph = writer.add_subgraph(key)
        ids = subgraph.add_tensor("ids", (tokens,), "int32")
        positions = subgraph.add_tensor("positions", (tokens,), "int32")
        mask = _input(subgraph, "mask", dec.layer["mask"])
        whole = model.decoder(context)
        tables = model.inputs(whole)
        eps = _shared(subgraph, dec.layer["norm.eps"], tables["norm.eps"])
        shared = {"mask": mask, "norm.eps": eps}
        for name in ("rope.cos", "rope.sin"):
            table = _shared(subgraph, whole.layer[name], tables[name], f"{name}.table")
            shared[name] = _input(subgraph, name, dec.layer[name])
            code, options, _ = spell(Embedding(), dec.layer, dec.layer.nodes[0], 0)
            subgraph.add_op(code, options, [table, positions], [shared[name]])
        caches = [_caches(model, subgraph, dec, i) for i in range(dec.layer.layers)]
        out, rows = _emit(model, subgraph, dec, ids, shared, caches)
        inputs = {"ids": ids, "positions": positions, "mask": mask}
        outputs = {"logits": out}
        for i, (cache, new) in enumerate(zip(caches, rows, strict=True)):
            for letter, row in zip("kv", new, strict=True):
                inputs[f"kv_cache_{letter}_{i}"] = cache[f"attn.cache_{letter}"]
                outputs[f"kv_slice_{letter}_{i}"] = row
        subgraph.add_signature(key, inputs, outputs)
    return writer


def cached_decoder(
    model: IntegerModel, tokens: int, context: int, logits: Positions = "last"
) -> Decoder:
    """The graphs of a signature of `write_cached`: as many cache slots as the new tokens leave.

    Raises:
      UserError: as `write_cached`.
    """
    if tokens >= context:
        raise UserError(
            f"context: {context} positions for {tokens} new tokens; expected more; raise --context"
            " or lower --prefill"
        )
    return model.decoder(tokens, context - tokens, logits)


def _emit(
    model: IntegerModel,
    subgraph: SubgraphWriter,
    dec: Decoder,
    ids: int,
    shared: dict[str, int],
    caches: list[dict[str, int]],
) -> tuple[int, list[list[int]]]:
    """All graphs, layers unrolled: the logits, and each layer's new rows of keys and values."""
    values, out, rows = {"ids": ids}, ids, []
    for graph in dec.graphs:
        for layer in range(graph.layers):
            own = caches[layer] if graph is dec.layer else {}
            env = _Emitter(model, subgraph, graph, layer).emit(values | shared | own)
            out = env[graph.outputs[0]]
            values = {"input.residual": out}
            if graph is dec.layer:
                rows.append([env[name] for name in graph.outputs[1:]])
    return out, rows


def _shared(
    subgraph: SubgraphWriter, spec: TensorSpec, codes: np.ndarray, name: str | None = None
) -> int:
    assert spec.fixed is not None
    scale, zero_point = spec.fixed
    return subgraph.add_tensor(
        name or spec.name, spec.shape, "int16", np.float32(scale), zero_point, data=codes
    )


def _input(subgraph: SubgraphWriter, name: str, spec: TensorSpec) -> int:
    assert spec.fixed is not None
    return subgraph.add_tensor(name, spec.shape, "int16", np.float32(spec.fixed[0]), spec.fixed[1])


def _caches(
    model: IntegerModel, subgraph: SubgraphWriter, dec: Decoder, layer: int
) -> dict[str, int]:
    """Inputs for the cached keys and values of a layer, in the codes of its new rows."""
    return {
        f"attn.cache_{letter}": subgraph.add_tensor(
            f"kv_cache_{letter}_{layer}",
            dec.layer[f"attn.cache_{letter}"].shape,
            "int8",
            model.scale[f"layers.attn.cache_{letter}"][layer],
        )
        for letter in "kv"
    }


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
