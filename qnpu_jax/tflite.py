"""An `IntegerModel` written as a .tflite: every op of the graphs spelled as a LiteRT operator,
layers unrolled.

Tensors keep their names (`layers.3.attn.q`), scales and zero points exactly as frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, assert_never, runtime_checkable

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.config import UserError
from qnpu_jax.decoder import Decoder, layer_inputs
from qnpu_jax.flatbuffer import ModelWriter, SubgraphWriter
from qnpu_jax.freeze import IntegerModel, dequantize
from qnpu_jax.graph import Graph, Node, is_identity
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
    stored = Integers(model)
    common = Emitter(stored, subgraph, dec.layer, 0)
    shared = {name: common.tensor(name, x, name) for name, x in stored.inputs(dec).items()}
    out, _ = emit(stored, subgraph, dec.graphs, ids, shared, [{}] * dec.layer.layers)
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
    prefix; `mask` (T, 1, S) as wide as the scores, 0 where a token may look, the code of
    `decoder.MASK` elsewhere, S = prefix + context; for every layer i `kv_cache_k_<i>` and
    `kv_cache_v_<i>` (N, context - T, K) int8, the slots before the new tokens, those not filled yet
    masked. Outputs: `logits`, and the new rows `kv_slice_k_<i>`, `kv_slice_v_<i>` (N, T, K), which
    the host puts in the cache.

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
    model: IntegerModel,
    prefill: int,
    context: int,
    logits: Positions = "last",
    stored: Stored | None = None,
) -> ModelWriter:
    """The model of `write_cached`, in memory; as integers, if `stored` does not say otherwise."""
    stored = Integers(model) if stored is None else stored
    writer = ModelWriter()
    for key, tokens in ((f"prefill_{prefill}", prefill), ("decode", 1)):
        dec = cached_decoder(model, tokens, context, logits)
        _add_cached(stored, writer.add_subgraph(key), key, dec, model.decoder(context))
    return writer


def _add_cached(
    stored: Stored, subgraph: SubgraphWriter, key: str, dec: Decoder, whole: Decoder
) -> None:
    """One signature of `write_cached`; `whole` takes all positions at once, for its RoPE tables."""
    ids, positions = (
        subgraph.add_tensor(name, (dec.tokens,), "int32") for name in ("ids", "positions")
    )
    shared = at_positions(stored, subgraph, dec, whole, positions)
    shared["mask"] = Emitter(stored, subgraph, dec.layer, 0).tensor("mask", label="mask")
    caches = [
        {
            f"attn.cache_{letter}": Emitter(stored, subgraph, dec.layer, i).tensor(
                f"attn.cache_{letter}", label=f"kv_cache_{letter}_{i}"
            )
            for letter in "kv"
        }
        for i in range(dec.layer.layers)
    ]
    out, rows = emit(stored, subgraph, dec.graphs, ids, shared, caches)
    inputs = {"ids": ids, "positions": positions, "mask": shared["mask"]}
    outputs = {"logits": out}
    for i, (cache, new) in enumerate(zip(caches, rows, strict=True)):
        for letter, row in zip("kv", new, strict=True):
            inputs[f"kv_cache_{letter}_{i}"] = cache[f"attn.cache_{letter}"]
            outputs[f"kv_slice_{letter}_{i}"] = row
    subgraph.add_signature(key, inputs, outputs)


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


def at_positions(
    stored: Stored, subgraph: SubgraphWriter, dec: Decoder, whole: Decoder, positions: int
) -> dict[str, int]:
    """What all layers share but the mask: RoPE rows of `positions` (T,), from the tables of
    `whole`, which takes all positions at once."""
    common, every = (Emitter(stored, subgraph, d.layer, 0) for d in (dec, whole))
    tables = stored.inputs(whole)
    shared = {"norm.eps": common.tensor("norm.eps", tables["norm.eps"], "norm.eps")}
    for name in ("rope.cos", "rope.sin"):
        table = every.tensor(name, tables[name], f"{name}.table")
        shared[name] = common.tensor(name, label=name)
        code, options, _ = spell(Embedding(), dec.layer, dec.layer.nodes[0], 0)
        subgraph.add_op(code, options, [table, positions], [shared[name]])
    return shared


def emit(
    stored: Stored,
    subgraph: SubgraphWriter,
    graphs: Sequence[Graph],
    ids: int,
    shared: dict[str, int],
    caches: list[dict[str, int]],
) -> tuple[int, list[list[int]]]:
    """A decoder's graphs, layers unrolled: the logits, or what the last graph gives, and each
    layer's new rows of keys and values."""
    values, out, rows = {"ids": ids}, ids, []
    for graph in graphs:
        is_layer = graph.prefix == "layers."
        for layer in range(graph.layers):
            own = caches[layer] if is_layer else {}
            env = Emitter(stored, subgraph, graph, layer).emit(values | shared | own)
            out = env[graph.outputs[0]]
            values = {"input.residual": out}
            if is_layer:
                rows.append([env[name] for name in graph.outputs[1:]])
    return out, rows


@runtime_checkable
class Stored(Protocol):
    """How a file holds tensors."""

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        """Contents of the parameters of a graph in one layer, by local name."""
        ...

    def inputs(self, dec: Decoder) -> dict[str, np.ndarray]:
        """Contents of what all layers share, by local name."""
        ...

    def form(self, graph: Graph, layer: int, name: str) -> dict[str, Any]:
        """Type and quantization of a tensor, as `SubgraphWriter.add_tensor` takes them."""
        ...

    def drops(self, graph: Graph, node: Node, layer: int) -> bool:
        """Whether the op changes nothing and is left out."""
        ...


@dataclass(frozen=True)
class Integers:
    """Codes, scales and zero points as frozen."""

    model: IntegerModel

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        return self.model.constants(graph, layer)

    def inputs(self, dec: Decoder) -> dict[str, np.ndarray]:
        return self.model.inputs(dec)

    def form(self, graph: Graph, layer: int, name: str) -> dict[str, Any]:
        quant = graph[name].quant
        assert quant is not None
        scale, zero_point = (
            values[graph.prefix + name] for values in (self.model.scale, self.model.zero_point)
        )
        if graph.prefix == "layers.":
            scale, zero_point = scale[layer], zero_point[layer]
        return {
            "dtype": DTYPES[quant.bits[layer]],
            "scale": np.asarray(scale, np.float32)[()],
            "zero_point": int(zero_point),
            "axis": quant.axis or 0,
        }

    def drops(self, graph: Graph, node: Node, layer: int) -> bool:
        return is_identity(graph, node, layer)


@dataclass(frozen=True)
class Reals:
    """Float32: the frozen weights times their scales, and activations that nothing rounds. What a
    benchmark holds the integers against."""

    params: Mapping[str, np.ndarray]

    @staticmethod
    def of(model: IntegerModel) -> Reals:
        return Reals(dequantize(model))

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        at = layer if graph.prefix == "layers." else ()
        return {t.name: self.params[graph.prefix + t.name][at] for t in graph.named("param")}

    def inputs(self, dec: Decoder) -> dict[str, np.ndarray]:
        return layer_inputs(dec)

    def form(self, graph: Graph, layer: int, name: str) -> dict[str, Any]:
        return {"dtype": "float32"}

    def drops(self, graph: Graph, node: Node, layer: int) -> bool:
        return isinstance(node.op, Requantize)


class Emitter:
    """Emits one graph, for one layer, into a subgraph."""

    def __init__(self, stored: Stored, subgraph: SubgraphWriter, graph: Graph, layer: int) -> None:
        self.stored, self.subgraph, self.graph, self.layer = stored, subgraph, graph, layer

    def emit(self, env: dict[str, int]) -> dict[str, int]:
        """Tensor indices by local name; `env` holds those of the inputs."""
        env = dict(env)
        for name, contents in self.stored.constants(self.graph, self.layer).items():
            env[name] = self.tensor(name, contents)
        for node in self.graph.nodes:
            if self.stored.drops(self.graph, node, self.layer):
                env[node.output] = env[node.inputs[0]]
            else:
                env[node.output] = self.add(node, env)
        return env

    def add(self, node: Node, env: Mapping[str, int]) -> int:
        """Adds an op; the tensor that it makes."""
        output = self.tensor(node.output)
        code, options, extra = spell(node.op, self.graph, node, self.layer)
        constants = [
            self.subgraph.add_tensor(f"{self._global(node.output)}/{i}", c.shape, "int32", data=c)
            for i, c in enumerate(extra)
        ]
        inputs = [env[n] for n in node.inputs]
        if isinstance(node.op, Embedding):
            inputs.reverse()  # GATHER takes the table first
        self.subgraph.add_op(code, options, [*inputs, *constants], [output])
        return output

    def tensor(self, name: str, data: np.ndarray | None = None, label: str | None = None) -> int:
        """Adds a tensor of the graph, by its global name or a label of its own."""
        spec = self.graph[name]
        form = self.stored.form(self.graph, self.layer, name)
        return self.subgraph.add_tensor(label or self._global(name), spec.shape, data=data, **form)

    def _global(self, name: str) -> str:
        if self.graph.prefix == "layers.":
            return f"layers.{self.layer}.{name}"
        return self.graph.prefix + name


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
