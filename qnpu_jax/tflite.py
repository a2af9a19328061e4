"""An `IntegerModel` written as a .tflite: every op of the graphs spelled as a LiteRT operator,
layers unrolled.

Tensors keep their names (`layers.3.attn.q`), scales and zero points exactly as frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from qnpu_jax.config import UserError
from qnpu_jax.decoder import Decoder
from qnpu_jax.flatbuffer import ModelWriter, SubgraphWriter
from qnpu_jax.freeze import IntegerModel
from qnpu_jax.graph import Graph, Node
from qnpu_jax.ops import Embedding
from qnpu_jax.spelling import add_op
from qnpu_jax.squares import add_diagonals, are_squares, block_size
from qnpu_jax.stored import Composite, Integers, Stored

Positions = Literal["all", "last"]
"""Of which positions a signature gives logits."""


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


def build(
    model: IntegerModel, tokens: int, logits: Positions = "all", stored: Stored | None = None
) -> ModelWriter:
    """The model of `write`, in memory; as integers, if `stored` does not say otherwise."""
    stored = Integers(model) if stored is None else stored
    dec = model.decoder(tokens, logits=logits)
    writer = ModelWriter()
    subgraph = writer.add_subgraph("main")
    ids = subgraph.add_tensor("ids", (tokens,), "int32")
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
    prefix; `mask` (1, T G, S) as wide as the scores, 0 where a token may look and -127 (int8) or
    -32512 (int16, `decoder.MASK`) elsewhere, with a row for each of the G query heads of a KV head,
    S = prefix + context; beside 16-bit probabilities `keep`, of that shape, 32767 and 0; for every
    layer i `kv_cache_k_<i>` (N, context - T, K) and `kv_cache_v_<i>` (N, K, context - T) int8, the
    slots before the new tokens, those not filled yet masked. Outputs: `logits`, and the new rows
    `kv_slice_k_<i>` (N, T, K), `kv_slice_v_<i>` (N, K, T), which the host puts in the cache.

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
        add_cached(stored, writer.add_subgraph(key), key, dec, model.decoder(context))
    return writer


def add_cached(
    stored: Stored,
    subgraph: SubgraphWriter,
    key: str,
    dec: Decoder,
    whole: Decoder,
    emitter: type[Emitter] | None = None,
) -> None:
    """One signature of `write_cached`; `whole` takes all positions at once, for its RoPE tables.
    An `emitter` of its own spells ops its own way."""
    ids, positions = (
        subgraph.add_tensor(name, (dec.tokens,), "int32") for name in ("ids", "positions")
    )
    shared = at_positions(stored, subgraph, dec, whole, positions)
    common = Emitter(stored, subgraph, dec.layer, 0)
    names = {t.name for t in dec.layer.named("input")}
    masks = {n: common.tensor(n, label=n) for n in ("mask", "keep") if n in names}
    shared |= masks
    caches = [
        {
            f"attn.cache_{letter}": Emitter(stored, subgraph, dec.layer, i).tensor(
                f"attn.cache_{letter}", label=f"kv_cache_{letter}_{i}"
            )
            for letter in "kv"
        }
        for i in range(dec.layer.layers)
    ]
    out, rows = emit(stored, subgraph, dec.graphs, ids, shared, caches, emitter)
    inputs = {"ids": ids, "positions": positions, **masks}
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
        add_op(subgraph, Embedding(), [positions, table], shared[name])
    return shared


def emit(
    stored: Stored,
    subgraph: SubgraphWriter,
    graphs: Sequence[Graph],
    ids: int,
    shared: dict[str, int],
    caches: list[dict[str, int]],
    emitter: type[Emitter] | None = None,
) -> tuple[int, list[list[int]]]:
    """A decoder's graphs, layers unrolled: the logits, or what the last graph gives, and each
    layer's new rows of keys and values."""
    emitter = emitter or Emitter
    values, out, rows = {"ids": ids}, ids, []
    for graph in graphs:
        is_layer = graph.prefix == "layers."
        for layer in range(graph.layers):
            own = caches[layer] if is_layer else {}
            env = emitter(stored, subgraph, graph, layer).emit(values | shared | own)
            out = env[graph.outputs[0]]
            values = {"input.residual": out}
            if is_layer:
                rows.append([env[name] for name in graph.outputs[1:]])
    return out, rows


class Emitter:
    """Emits one graph, for one layer, into a subgraph."""

    def __init__(self, stored: Stored, subgraph: SubgraphWriter, graph: Graph, layer: int) -> None:
        self.stored, self.subgraph, self.graph, self.layer = stored, subgraph, graph, layer

    def emit(self, env: dict[str, int]) -> dict[str, int]:
        """Tensor indices by local name; `env` holds those of the inputs."""
        env = dict(env)
        for name, contents in self.stored.constants(self.graph, self.layer).items():
            env[name] = self.tensor(name, contents)
        return self.run(self.stored.parts(self.graph), env)

    def run(self, parts: Iterable[Node | Composite], env: Mapping[str, int]) -> dict[str, int]:
        """Adds ops; `env` with what they make."""
        env = dict(env)
        for part in parts:
            if isinstance(part, Composite):
                env[part.output] = self.wrap(part, env)
            elif self.stored.drops(self.graph, part, self.layer):
                env[part.output] = env[part.inputs[0]]
            else:
                env[part.output] = self.add(part, env)
        return env

    def wrap(self, part: Composite, env: Mapping[str, int]) -> int:
        """Adds a composite and, as a subgraph, its nodes; the tensor that it makes."""
        label = self._global(part.output)
        inner = Emitter(self.stored, self.subgraph.sibling(label), self.graph, self.layer)
        known = {name: inner.tensor(name) for name in part.inputs}
        fed = [*known.values(), *(x.add_to(inner.subgraph, label) for x in part.operands)]
        constants = {name: inner.tensor(name, x) for name, x in part.constants.items()}
        made = inner.run(part.nodes, known | constants)
        inner.subgraph.finish(fed, [made[part.output]])
        output = self.tensor(part.output)
        options = schema.StableHLOCompositeOptionsT()
        options.name, options.version = part.name, 1
        options.decompositionSubgraphIndex = inner.subgraph.index
        options.compositeAttributes = list(flexbuffers.Dumps(dict(part.attributes)))
        operands = [x.add_to(self.subgraph, label, filled=True) for x in part.operands]
        inputs = [*(env[name] for name in known), *operands]
        code = schema.BuiltinOperator.STABLEHLO_COMPOSITE
        self.subgraph.add_op(code, options, inputs, [output])
        return output

    def add(self, node: Node, env: Mapping[str, int]) -> int:
        """Adds an op; the tensor that it makes."""
        output = self.tensor(node.output)
        if (block := self.block(node)) > 1:
            forms = [
                self.stored.form(self.graph, self.layer, n) for n in (node.inputs[0], node.output)
            ]
            add_diagonals(self.subgraph, env[node.inputs[0]], output, block, *forms)
            return output
        add_op(self.subgraph, node.op, [env[n] for n in node.inputs], output)
        return output

    def block(self, node: Node) -> int:
        """Rows per block of sums of squares (`squares`), 1 for other ops.

        Also 1 in 16 bits: LiteRT's kernel for them packs nothing, and would compute all products of
        a block.
        """
        if not are_squares(self.graph, node):
            return 1
        form = self.stored.form(self.graph, self.layer, node.inputs[0])
        return 1 if form["dtype"] == "int16" else block_size(self.graph[node.output].shape[0])

    def tensor(self, name: str, data: np.ndarray | None = None, label: str | None = None) -> int:
        """Adds a tensor of the graph, by its global name or a label of its own."""
        spec = self.graph[name]
        form = self.stored.form(self.graph, self.layer, name)
        return self.subgraph.add_tensor(label or self._global(name), spec.shape, data=data, **form)

    def _global(self, name: str) -> str:
        if self.graph.prefix == "layers.":
            return f"layers.{self.layer}.{name}"
        return self.graph.prefix + name
