"""A .tflite with the signatures that LiteRT-LM's executor for CPUs drives.

Decoder and codes are those of `cached.build_cached`, op for op. Inputs and outputs differ, because
LiteRT-LM keeps a cache in one buffer that is both input and output, knows masks only as floats or
booleans, and samples from floats:

- A cache is passed whole, in and out. SLICE gives the decoder the slots before the new tokens;
  DYNAMIC_UPDATE_SLICE writes the rows of the new tokens.
- No mask is passed. LESS and SELECT_V2 make its codes from the first position, and for layers with
  a sliding window LESS and LOGICAL_AND hide the slots that are out of it.
- DEQUANTIZE makes float logits. It is the only op with floats.

Letters: T new tokens, G query heads of a KV head, S keys, N KV heads, C context, K head_dim,
V vocabulary.

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

from qnpu_jax.graph import shared_names
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
"""Tokens of the short prefill. LiteRT-LM refuses a prompt if one of its chunks, padded, does not
fit in the rest of the context; short chunks fit more often. A short prompt also takes less time."""


def write_signatures(form: Integers, path: Path, prefill: int, context: int) -> None:
    """Writes the signatures `prefill_<prefill>`, `prefill_16` if that is shorter, and `decode` (one
    token).

    They share all weights that they hold in the same way.

    Inputs:
      `tokens` (1, T) int32.
      `input_pos` (T,) int32, consecutive, 0 for the first token after the prefix.
      `kv_cache_k_<i>` (1, N, C, K) and `kv_cache_v_<i>` (1, N, K, C) int8, for every layer i.

    Outputs:
      The caches under the same names, with the rows of the new tokens from slot `input_pos[0]` on.
        An output may have the memory of its input.
      `logits` (1, 1, V) float32, of `decode` only.

    Padding of a prefill may be any token at any position: its rows stay masked until the rows of
    other tokens replace them.

    Args:
      form: the model, and how the file holds it.
      path: file to write or replace.
      prefill: tokens of the longest signature.
      context: positions after the prefix, the new tokens included.

    Raises:
      UserError: more positions than the model has, or a context without room for a cache.
    """
    build_signatures(form, prefill, context).write(path)


def build_signatures(form: Integers, prefill: int, context: int) -> ModelWriter:
    """Returns the file of `write_signatures`, not yet written."""
    writer = ModelWriter()
    prefills = (prefill, SHORT) if prefill > SHORT else (prefill,)
    for key, tokens in (*((f"prefill_{n}", n) for n in prefills), ("decode", 1)):
        _Signature(form, writer.add_subgraph(key), tokens, context).emit(key)
    return writer


class _Signature:
    """Signature under construction."""

    def __init__(self, form: Integers, graph: SubgraphWriter, tokens: int, context: int) -> None:
        self.form, self.graph, self.context = form, graph, context
        self.model, self.dec = form.model, cached_decoder(form.model, tokens, context)

    def emit(self, key: str) -> None:
        """Adds inputs, decoder and outputs. The caches are updated last, after every layer has read
        its own."""
        graph, dec = self.graph, self.dec
        inputs = {
            "tokens": graph.add_tensor("tokens", (1, dec.tokens), "int32"),
            "input_pos": graph.add_tensor("input_pos", (dec.tokens,), "int32"),
        }
        start = self._slice("start", inputs["input_pos"], (1,), INT32)
        whole = self.model.decoder(self.context)
        shared = at_positions(self.form, graph, dec, whole, inputs["input_pos"])
        shared |= self._masks(start)
        past: list[dict[str, int]] = []
        for layer in range(dec.layer.layers):
            past.append({})
            for letter in "kv":
                name = f"kv_cache_{letter}_{layer}"
                kind = self._cache_type(layer, letter)
                shape = self._cache_shape(letter, self.context)
                inputs[name] = graph.add_tensor(name, shape, kind)
                past[-1][f"attn.cache_{letter}"] = self._past(letter, name, inputs[name], kind)
        is_decode = dec.tokens == 1  # nobody reads a prefill's logits
        ids = self._reshape("ids", inputs["tokens"], (dec.tokens,), INT32)
        emitter = partial(Emitter, self.form, graph)
        out, rows = emit(emitter, dec, ids, shared, past, head=is_decode)
        outputs = self._updates(inputs, rows, start)
        if is_decode:
            outputs["logits"] = self._floats(out)
        graph.add_signature(key, inputs, outputs)

    def _masks(self, start: int) -> dict[str, int]:
        """Adds ops that make every mask of the layers, and returns them by shared name.

        Args:
          start: tensor (1,) of the first new token's position, which is the number of filled slots.
        """
        dec, made = self.dec, {}
        codes = self.model.inputs(dec)
        for name, (graph, local, layer) in shared_names(dec).items():
            if local in ("mask", "keep"):
                window = dec.config.kinds[dec.config.layer_kinds[layer]].window
                type_ = self.form.tensor_type(graph, layer, local)
                made[name] = self._mask(name, codes[name], type_, start, window)
        return made

    def _mask(
        self, mask: str, codes: np.ndarray, kind: TensorType, start: int, window: int | None
    ) -> int:
        """Adds ops that make codes (1, T G, S) of a mask: every token sees the prefix, the cache's
        slots before `start`, itself and new tokens before it; of these its window only.

        Args:
          mask: shared name of `mask` or `keep` (`shared_inputs.masks`).
          codes: of the mask while no slot is filled.
          start: as for `_masks`.

        Returns:
          The tensor of the mask.
        """
        dec = self.dec
        cache, new = dec.prefix, dec.prefix + dec.cache
        slots = np.arange(dec.cache, dtype=np.int32).reshape(1, 1, -1)
        is_seen = self.graph.add_tensor(f"{mask}.is_filled", slots.shape, "bool")
        slots = self._constant(f"{mask}.slots", slots)
        self._add(Code.LESS, schema.LessOptionsT(), [slots, start], is_seen)
        if window is not None:
            is_seen = self._in_window(mask, slots, start, window, is_seen)
        hidden = codes[:, :, cache : cache + 1]
        seen = np.full_like(hidden, codes[0, 0, new])  # a token sees itself
        choices = [
            self._constant(f"{mask}.{name}", x, kind)
            for name, x in (("visible", seen), ("hidden", hidden))
        ]
        past = self.graph.add_tensor(f"{mask}.cache", codes[:, :, cache:new].shape, kind)
        self._add(Code.SELECT_V2, schema.SelectV2OptionsT(), [is_seen, *choices], past)
        parts = [past, self._constant(f"{mask}.new", codes[:, :, new:], kind)]
        if dec.prefix:
            parts.insert(0, self._constant(f"{mask}.prefix", codes[:, :, :cache], kind))
        return self._concat(mask, parts, codes.shape, 2, kind)

    def _in_window(self, mask: str, slots: int, start: int, window: int, is_filled: int) -> int:
        """Adds ops that tell which filled slots each row of a mask has in its window: those after
        position start + t - window, for new token t.

        Returns:
          The tensor, (1, T G, cache) bool.
        """
        dec = self.dec
        token = np.repeat(np.arange(dec.tokens, dtype=np.int32), dec.config.queries_per_kv_head)
        shape = (1, len(token), dec.cache)
        offset = self._constant(f"{mask}.offset", (token - np.int32(window)).reshape(1, -1, 1))
        before = self.graph.add_tensor(f"{mask}.before", (1, len(token), 1), INT32)
        self._add(Code.ADD, schema.AddOptionsT(), [offset, start], before)
        near, seen = (
            self.graph.add_tensor(f"{mask}.{n}", shape, "bool") for n in ("is_near", "is_seen")
        )
        self._add(Code.LESS, schema.LessOptionsT(), [before, slots], near)
        return self._add(Code.LOGICAL_AND, schema.LogicalAndOptionsT(), [near, is_filled], seen)

    def _cache_shape(self, letter: str, slots: int) -> tuple[int, ...]:
        heads, width = self.model.config.num_kv_heads, self.model.config.head_dim
        return (1, heads, slots, width) if letter == "k" else (1, heads, width, slots)

    def _cache_type(self, layer: int, letter: str) -> TensorType:
        return self.form.tensor_type(self.dec.layer, layer, f"attn.cache_{letter}")

    def _past(self, letter: str, name: str, cache: int, kind: TensorType | DType) -> int:
        """Slices the first C - T slots from a cache (1, N, C, K) or (1, N, K, C), and drops the
        first axis.

        So every signature has the same number of keys S (see `cached.build_cached`).
        """
        shape = self._cache_shape(letter, self.dec.cache)
        past = self._slice(f"{name}.past", cache, shape, kind)
        return self._reshape(f"{name}.heads", past, shape[1:], kind)

    def _updates(
        self, inputs: dict[str, int], rows: Sequence[Sequence[int]], start: int
    ) -> dict[str, int]:
        """Adds ops that write new keys (N, T, K) and values (N, K, T) to the caches.

        Args:
          inputs: tensors of the caches by name.
          rows: tensors of the new keys and values, for each layer.
          start: tensor (1,) of the slot of the first new token.

        Returns:
          Tensors of the updated caches by name.
        """
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
        """Dequantizes codes (1, V) to (1, 1, V) float32."""
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
        """Slices the first elements of every axis."""
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
