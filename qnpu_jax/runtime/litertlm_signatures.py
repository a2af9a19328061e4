"""An `IntegerModel` as a .tflite with the signatures that LiteRT-LM's executor for CPUs drives.

Decoder and codes are those of `cached.write_cached`, op for op. What differs is the rim, because
LiteRT-LM keeps a cache in one buffer that is input and output, has masks only as floats or
booleans, and samples from floats:

- The cache comes whole and leaves whole: SLICE gives the decoder its slots before the new tokens,
  DYNAMIC_UPDATE_SLICE puts their rows in place.
- No mask comes in. Its codes follow from the first position, by LESS and SELECT_V2.
- Behind the logits is a DEQUANTIZE, the only op with floats.

Letters: T new tokens, S keys, N KV heads, C context, K head_dim, V vocabulary.

Reference: google-ai-edge/LiteRT-LM, runtime/executor/llm_litert_compiled_model_executor.cc,
  litert_compiled_model_executor_utils.cc, litert/state.cc (`HeuristicBasedCreate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.tflite import (
    DType,
    Emitter,
    Integers,
    ModelWriter,
    SubgraphWriter,
    TensorType,
    at_positions,
    cached_decoder,
    emit,
)

Code = schema.BuiltinOperator
INT32: DType = "int32"
SHORT = 16
"""Tokens of the short prefill. LiteRT-LM refuses a prompt of which a chunk, filled up, does not fit
what is left of the context; and a short prompt need not wait for a long chunk."""


def write_signatures(form: Integers, path: Path, prefill: int, context: int) -> None:
    """Writes the signatures `prefill_<prefill>`, `prefill_16` if that is shorter, and `decode` (one
    token), which share all weights that are stored alike.

    Inputs of T tokens: `tokens` (1, T) int32; `input_pos` (T,) int32, consecutive, 0 for the first
    token after the prefix; for every layer i `kv_cache_k_<i>` (1, N, C, K) and `kv_cache_v_<i>`
    (1, N, K, C) int8. Outputs: the caches, under the same names, with what is new from slot
    `input_pos[0]` on; of `decode` also `logits` (1, 1, V) float32. A cache's output may be its
    input's memory.

    What fills up a prefill that is not full may have any token and position: its rows are masked
    until others replace them.

    Args:
      stored: the model, and how the file holds it.
      prefill: tokens of the longest signature.
      context: positions after the prefix, the new tokens included.

    Raises:
      UserError: more positions than the model has, or a context without room for a cache.
    """
    build_signatures(form, prefill, context).write(path)


def build_signatures(form: Integers, prefill: int, context: int) -> ModelWriter:
    """The model of `write_signatures`, in memory."""
    writer = ModelWriter()
    prefills = (prefill, SHORT) if prefill > SHORT else (prefill,)
    for key, tokens in (*((f"prefill_{n}", n) for n in prefills), ("decode", 1)):
        _Signature(form, writer.add_subgraph(key), tokens, context).emit(key)
    return writer


class _Signature:
    """One signature, while it is written."""

    def __init__(self, form: Integers, graph: SubgraphWriter, tokens: int, context: int) -> None:
        self.form, self.graph, self.context = form, graph, context
        self.model, self.dec = form.model, cached_decoder(form.model, tokens, context)

    def emit(self, key: str) -> None:
        """All of it; the updates come last, when every layer has read its cache."""
        graph, dec = self.graph, self.dec
        inputs = {
            "tokens": graph.add_tensor("tokens", (1, dec.tokens), "int32"),
            "input_pos": graph.add_tensor("input_pos", (dec.tokens,), "int32"),
        }
        start = self._slice("start", inputs["input_pos"], (1,), INT32)
        whole = self.model.decoder(self.context)
        shared = at_positions(self.form, graph, dec, whole, inputs["input_pos"])
        names = {t.name for t in dec.layer.named("input")}
        shared |= {n: self._mask(n, start) for n in ("mask", "keep") if n in names}
        past: list[dict[str, int]] = []
        for layer in range(dec.layer.layers):
            past.append({})
            for letter in "kv":
                name = f"kv_cache_{letter}_{layer}"
                kind = self._cache_type(layer, letter)
                shape = self._cache_shape(letter, self.context)
                inputs[name] = graph.add_tensor(name, shape, kind)
                past[-1][f"attn.cache_{letter}"] = self._past(letter, name, inputs[name], kind)
        is_decode = dec.tokens == 1
        graphs = dec.graphs if is_decode else dec.graphs[:-1]  # nobody reads a prefill's logits
        ids = self._reshape("ids", inputs["tokens"], (dec.tokens,), INT32)
        out, rows = emit(partial(Emitter, self.form, graph), graphs, ids, shared, past)
        outputs = self._updates(inputs, rows, start)
        if is_decode:
            outputs["logits"] = self._floats(out)
        graph.add_signature(key, inputs, outputs)

    def _mask(self, mask: str, start: int) -> int:
        """Codes (1, T G, S) of `mask` or `keep` of `shared_inputs.masks`, with the cache's
        slots before `start` visible. The prefix is seen by all, new tokens by themselves and later
        ones."""
        dec = self.dec
        codes = self.model.inputs(dec)[mask]
        kind = self.form.tensor_type(dec.layer, 0, mask)
        cache, new = dec.prefix, dec.prefix + dec.cache
        slots = np.arange(dec.cache, dtype=np.int32).reshape(1, 1, -1)
        is_filled = self.graph.add_tensor(f"{mask}.is_filled", slots.shape, "bool")
        slots = self._constant(f"{mask}.slots", slots)
        self._add(Code.LESS, schema.LessOptionsT(), [slots, start], is_filled)
        hidden = codes[:, :, cache : cache + 1]  # no slot is filled in `codes`
        seen = np.full_like(hidden, codes[0, 0, new])  # a token sees itself
        choices = [
            self._constant(f"{mask}.{name}", x, kind)
            for name, x in (("visible", seen), ("hidden", hidden))
        ]
        past = self.graph.add_tensor(f"{mask}.cache", codes[:, :, cache:new].shape, kind)
        self._add(Code.SELECT_V2, schema.SelectV2OptionsT(), [is_filled, *choices], past)
        parts = [past, self._constant(f"{mask}.new", codes[:, :, new:], kind)]
        if dec.prefix:
            parts.insert(0, self._constant(f"{mask}.prefix", codes[:, :, :cache], kind))
        return self._concat(mask, parts, codes.shape, 2, kind)

    def _cache_shape(self, letter: str, slots: int) -> tuple[int, ...]:
        heads, width = self.model.config.num_kv_heads, self.model.config.head_dim
        return (1, heads, slots, width) if letter == "k" else (1, heads, width, slots)

    def _cache_type(self, layer: int, letter: str) -> TensorType:
        return self.form.tensor_type(self.dec.layer, layer, f"attn.cache_{letter}")

    def _past(self, letter: str, name: str, cache: int, kind: TensorType | DType) -> int:
        """The slots before the new tokens, C - T: as many as the decoder was staged for, so that
        every signature has the same S (see `cached.write_cached`)."""
        shape = self._cache_shape(letter, self.dec.cache)
        past = self._slice(f"{name}.past", cache, shape, kind)
        return self._reshape(f"{name}.heads", past, shape[1:], kind)

    def _updates(
        self, inputs: dict[str, int], rows: Sequence[Sequence[int]], start: int
    ) -> dict[str, int]:
        """The caches with what is new in every layer, keys (N, T, K) and values (N, K, T)."""
        zeros = {n: self._constant(f"at.{n}", np.zeros(n, np.int32)) for n in (1, 2, 3)}
        at = {
            "k": self._concat("at.k", [zeros[2], start, zeros[1]], (4,), 0, INT32),
            "v": self._concat("at.v", [zeros[3], start], (4,), 0, INT32),
        }
        updated = {}
        for layer, new in enumerate(rows):
            for letter, row in zip("kv", new, strict=True):
                name, kind = f"kv_cache_{letter}_{layer}", self._cache_type(layer, letter)
                new_shape, shape = (
                    self._cache_shape(letter, n) for n in (self.dec.tokens, self.context)
                )
                row = self._reshape(f"{name}.new", row, new_shape, kind)
                out = self.graph.add_tensor(f"{name}.out", shape, kind)
                self._add(Code.DYNAMIC_UPDATE_SLICE, None, [inputs[name], row, at[letter]], out)
                updated[name] = out
        return updated

    def _floats(self, logits: int) -> int:
        """(1, V) codes to (1, 1, V) float32."""
        vocabulary = self.model.config.vocab_size
        real = self.graph.add_tensor("logits.real", (1, vocabulary), "float32")
        self._add(Code.DEQUANTIZE, schema.DequantizeOptionsT(), [logits], real)
        return self._reshape("logits", real, (1, 1, vocabulary), "float32")

    def _add(self, code: int, options: Any, inputs: Sequence[int], output: int) -> int:
        self.graph.add_op(code, options, inputs, [output])
        return output

    def _constant(self, name: str, data: np.ndarray, kind: TensorType | DType = INT32) -> int:
        return self.graph.add_tensor(name, data.shape, kind, data)

    def _slice(self, name: str, x: int, size: Sequence[int], kind: TensorType | DType) -> int:
        """The first elements of every axis."""
        operands = [
            self._constant(f"{name}/{i}", np.asarray(values, np.int32))
            for i, values in enumerate(([0] * len(size), size))
        ]
        out = self.graph.add_tensor(name, size, kind)
        return self._add(Code.SLICE, schema.SliceOptionsT(), [x, *operands], out)

    def _reshape(self, name: str, x: int, shape: Sequence[int], kind: TensorType | DType) -> int:
        options = schema.ReshapeOptionsT()
        options.newShape = list(shape)
        operand = self._constant(f"{name}/0", np.asarray(shape, np.int32))
        out = self.graph.add_tensor(name, shape, kind)
        return self._add(Code.RESHAPE, options, [x, operand], out)

    def _concat(
        self,
        name: str,
        parts: Sequence[int],
        shape: Sequence[int],
        axis: int,
        kind: TensorType | DType,
    ) -> int:
        options = schema.ConcatenationOptionsT()
        options.axis = axis
        out = self.graph.add_tensor(name, shape, kind)
        return self._add(Code.CONCATENATION, options, parts, out)
