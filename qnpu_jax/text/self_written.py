"""Text that the model writes itself, so that calibration needs no download.

The float decoder of `qnpu_jax.graph` runs step by step: each step adds one token to each of B rows,
over a cache of keys and values. Rows are independent. Where a document of a row ends, the row
begins another document at position 0 with an empty cache, so every row is filled to its end however
soon the model ends a document.

Reference: LLM-QAT (arXiv 2305.17888), section 3.1: training data sampled from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import evaluate, scanned_inputs
from qnpu_jax.graph import Decoder, Params, Tensors, decoder, layer_inputs, local
from qnpu_jax.models import Tokenizer
from qnpu_jax.text.prompts import prompts_of

BATCH = {"cpu": 32, "gpu": 2048}
"""Rows decoded together at most, by backend: a step reads all weights once, however many rows share
it."""
CACHE = {"cpu": jnp.float32, "gpu": jnp.bfloat16}
"""Type of the cache, by backend: a GPU spends most of a step on reading it, a CPU on products."""
CACHE_BYTES = 2**34
"""Most memory for the cache of the rows that are decoded together."""

Progress = Callable[[Iterable[int], int], Iterable[int]]
"""Shows progress: wraps the iteration over decoding steps; its second argument is their number."""


@dataclass(frozen=True)
class Writer:
    """The float model that writes.

    Attributes:
      plan: any bits; the graph needs some, and float evaluation ignores them.
      params: folded parameters (`fold_norms`). Prefix keys and values, if there are any, precede
        every document.
    """

    config: ModelConfig
    plan: BitPlan
    params: Params


@dataclass(frozen=True)
class Drawing:
    """Settings of `sample`.

    Attributes:
      temperature: 0 takes the likeliest token.
      stop: tokens that end a document where they are drawn.
      bos: token that is fed where a document begins with it, but left out of the rows.
    """

    seed: int
    temperature: float = 1.0
    stop: Collection[int] = ()
    bos: int | None = None


@flax.struct.dataclass(kw_only=True)
class Prompts:
    """Beginnings of documents, and the tokens that end them, as arrays of the compiled step.

    Attributes:
      ids: P prompts, padded with 0 to the longest.
      lengths: tokens of each prompt.
      stop: as in `Drawing`.
      bos: as in `Drawing`; -1 for none.
    """

    ids: Int32[Array, "p t"]
    lengths: Int32[Array, " p"]
    stop: Int32[Array, " e"]
    bos: Int32[Array, ""]


@flax.struct.dataclass(kw_only=True)
class Stream:
    """State of B rows between two steps.

    Attributes:
      key: random key for the draws to come.
      prompt: index of the prompt that each row's document began with.
      token: latest token of each row, not yet in the cache.
      position: position of `token` in its document, 0 or more.
      ended: whether `token` is the last one of its document.
      k, v: cache of all layers, of the type that CACHE names; slots from `position` on are free.
    """

    key: Key[Array, ""]
    prompt: Int32[Array, " b"]
    token: Int32[Array, " b"]
    position: Int32[Array, " b"]
    ended: Bool[Array, " b"]
    k: Float[Array, "l b n c h"]
    v: Float[Array, "l b n h c"]


def sample(
    writer: Writer,
    prompts: Sequence[Sequence[int]],
    length: int,
    drawing: Drawing,
    progress: Progress | None = None,
) -> Int32[np.ndarray, "b t"]:
    """Writes a row of tokens for each prompt: the prompt, then p(token) ~ exp(logit / temperature).

    Row b begins with prompt b. A document ends with the first drawn `stop` token, which stays in
    the row, or where the row is full. Each further document of a row takes the next prompt
    (cyclically), so that a prompt which the model answers briefly does not fill its row with
    repetitions. Equal arguments give equal tokens.

    Args:
      prompts: token ids, at least one each; cut where longer than a row.
      length: tokens of a row.
      progress: shows progress: wraps the iteration over steps, `length` for each group of rows.

    Returns:
      Token ids, one row for each prompt.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, or rows longer than the model's
        positions.
    """
    table = _prompts(writer.config, prompts, drawing)
    dec = _decoder(writer, cache=length - 1)
    groups = -(-len(prompts) // _rows_at_once(dec))
    rows = -(-len(prompts) // groups)  # per group, equal so that one compiled step serves all
    keys = jax.random.split(jax.random.key(drawing.seed), groups)
    starts = (_start(dec, keys[i], i * rows, rows, len(prompts)) for i in range(groups))
    weights = {name: jnp.asarray(x) for name, x in writer.params.items()}
    tokens = chain.from_iterable(
        _decode(dec, weights, table, at, length, drawing.temperature) for at in starts
    )
    steps: Iterable[int] = range(groups * length)
    steps = progress(steps, groups * length) if progress else steps
    # `steps` comes first in zip: its end, not that of the tokens, closes the progress bar.
    out = np.stack([token for _, token in zip(steps, tokens, strict=False)])
    return out.reshape(groups, length, rows).swapaxes(1, 2).reshape(-1, length)[: len(prompts)]


def calibration_windows(
    writer: Writer,
    tokenizer: Tokenizer,
    tokens: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
) -> Int32[np.ndarray, "n t"]:
    """Writes windows of `length` tokens, at least `tokens` in all, to calibrate with.

    Window i begins with prompt i of `prompts.prompts_of`. BOS itself stands in no window where a
    document begins: the quantized model puts its prefix there, and a BOS behind the prefix would be
    an outlier that ordinary text does not have.

    Args:
      tokenizer: the model's own.
      seed, progress: as in `Drawing` and `sample`.

    Raises:
      UserError: as `sample`.
    """
    count = max(1, -(-tokens // length))
    prompts = [p.ids for p in prompts_of(tokenizer, count, seed)]
    drawing = Drawing(seed, stop=tokenizer.eos_ids, bos=tokenizer.bos_id)
    return sample(writer, prompts, length, drawing, progress)


def _prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], drawing: Drawing) -> Prompts:
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {i}: no tokens; expected at least one; begin with the model's BOS, or with"
                " any text where it has none"
            )
        # Indexing inside jit would silently take the last row of the embedding table.
        if outside := [t for t in prompt if not 0 <= t < config.vocab_size]:
            raise UserError(
                f"prompt {i}: token {outside[0]} is outside the vocabulary; expected 0 to"
                f" {config.vocab_size - 1}; take model and tokenizer of the same checkpoint"
            )
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Prompts(
        ids=jnp.asarray(ids),
        lengths=jnp.asarray([len(p) for p in prompts], jnp.int32),
        stop=jnp.asarray(list(drawing.stop), jnp.int32),
        bos=jnp.asarray(-1 if drawing.bos is None else drawing.bos, jnp.int32),
    )


def _decoder(writer: Writer, cache: int) -> Decoder:
    """Builds the graphs for one token after `cache` slots and the prefix in the parameters."""
    prefix = writer.params.get("layers.attn.prefix_k")
    length = 0 if prefix is None else prefix.shape[2]
    # Without a slot the graph would have no cache inputs, a second form for one-token rows only.
    return decoder(writer.config, writer.plan, 1, length, max(cache, 1))


def _of_backend(values: Mapping[str, Any]) -> Any:
    return values.get(jax.default_backend(), values["gpu"])


def _rows_at_once(dec: Decoder) -> int:
    """Rows decoded together: at least one."""
    cfg = dec.config
    slot = (
        2
        * cfg.num_layers
        * cfg.num_kv_heads
        * cfg.head_dim
        * jnp.dtype(_of_backend(CACHE)).itemsize
    )
    return max(1, min(_of_backend(BATCH), CACHE_BYTES // (slot * dec.cache)))


def _start(dec: Decoder, key: Key[Array, ""], first: int, rows: int, prompts: int) -> Stream:
    """Makes the state before the first token: every row as if a document had just ended."""
    cfg = dec.config
    cache = (cfg.num_layers, rows, cfg.num_kv_heads, dec.cache, cfg.head_dim)
    kept = _of_backend(CACHE)
    return Stream(
        key=key,
        prompt=(jnp.arange(rows, dtype=jnp.int32) + (first - 1)) % prompts,
        token=jnp.zeros(rows, jnp.int32),
        position=jnp.zeros(rows, jnp.int32),
        ended=jnp.ones(rows, bool),
        k=jnp.zeros(cache, kept),
        v=jnp.zeros((*cache[:3], cfg.head_dim, dec.cache), kept),
    )


def _decode(
    dec: Decoder, params: Tensors, prompts: Prompts, at: Stream, steps: int, temperature: float
) -> Iterator[Int32[np.ndarray, " b"]]:
    """Yields the tokens of each step, one per row."""
    tables = _tables(dec)
    for _ in range(steps):
        at = _step(dec, params, tables, prompts, at, temperature)
        yield np.asarray(at.token)


def _tables(dec: Decoder) -> Tensors:
    """Stacks what layers share (RoPE rows, mask, D eps) by shared name; axis 0: 0 to `cache` filled
    slots."""
    steps = [layer_inputs(dec, filled) for filled in range(dec.cache + 1)]
    return {name: jnp.asarray(np.stack([step[name] for step in steps])) for name in steps[0]}


@partial(jax.jit, static_argnames=("dec", "temperature"), donate_argnames="at")
def _step(
    dec: Decoder,
    params: Tensors,
    tables: Tensors,
    prompts: Prompts,
    at: Stream,
    temperature: float,
) -> Stream:
    """Adds a token to every row: the prompt's while it lasts, then a drawn one."""
    key, draw = jax.random.split(at.key)
    fresh = at.ended
    prompt = jnp.where(fresh, (at.prompt + 1) % len(prompts.lengths), at.prompt)
    first = prompts.ids[prompt, 0]
    position = jnp.where(fresh, 0, at.position)
    token = jnp.where(fresh, first, at.token)
    at = replace(at, key=key, prompt=prompt, token=token, position=position)
    logits, at = _next_logits(dec, params, tables, at)

    position = position + 1
    drawn = position >= prompts.lengths[prompt]
    given = prompts.ids[prompt, jnp.minimum(position, prompts.ids.shape[1] - 1)]
    token = jnp.where(drawn, _draw(logits, draw, temperature), given)
    # A first token other than BOS belongs in the row. A step gives a row one token: this one gives
    # the token that it fed, and the next step feeds it again.
    shown = fresh & (first != prompts.bos)
    token, position = jnp.where(shown, first, token), jnp.where(shown, 0, position)
    # Stop tokens inside a prompt (the end of a system turn) end nothing.
    stops = (token[:, None] == prompts.stop[None, :]).any(axis=1)
    return replace(at, token=token, position=position, ended=stops & drawn & ~shown)


def _draw(
    logits: Float32[Array, "b v"], key: Key[Array, ""], temperature: float
) -> Int32[Array, " b"]:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def _next_logits(
    dec: Decoder, params: Tensors, tables: Tensors, at: Stream
) -> tuple[Float32[Array, "b v"], Stream]:
    """Computes the logits of each row's next token, and puts its latest into the cache."""
    shared = {name: table[at.position] for name, table in tables.items()}

    def embed(token: Array) -> Array:
        return evaluate(dec.embed, {"ids": token[None], **local(params, "embed.")})["residual"]

    def head(x: Array, eps: Array) -> Array:
        inputs = {"input.residual": x, "norm.eps": eps, **local(params, "head.")}
        return evaluate(dec.head, inputs)["logits"][0]

    x = jax.vmap(embed)(at.token)
    kinds, of_kind = scanned_inputs(dec, shared)

    def layer(x: Array, values: Any) -> Any:
        kind, *own = values
        return _layer(dec, of_kind(kind), x, *own)

    x, (k, v) = jax.lax.scan(layer, x, (kinds, local(params, "layers."), at.k, at.v))
    # Written in place for all layers at once: a cache that the scan returned would be a copy.
    every, rows = slice(None), jnp.arange(len(at.token))
    k, v = (jnp.moveaxis(x, 1, 0).astype(at.k.dtype) for x in (k, v))
    k = at.k.at[every, rows, :, at.position].set(k, mode="drop")
    v = at.v.at[every, rows, :, :, at.position].set(v, mode="drop")
    return jax.vmap(head)(x, shared["norm.eps"]), replace(at, k=k, v=v)


def _layer(
    dec: Decoder,
    shared: Tensors,
    x: Float32[Array, "b 1 d"],
    weights: Tensors,
    k: Float[Array, "b n c h"],
    v: Float[Array, "b n h c"],
) -> tuple[Float32[Array, "b 1 d"], tuple[Float32[Array, "b n h"], Float32[Array, "b n h"]]]:
    """Runs one layer; returns the new residual, and the token's row of keys and of values."""

    def row(x: Array, k: Array, v: Array, shared: Mapping[str, Array]):
        cache = {"attn.cache_k": k, "attn.cache_v": v}
        inputs = {"input.residual": x, **{n: c.astype(jnp.float32) for n, c in cache.items()}}
        env = evaluate(dec.layer, {**inputs, **shared, **weights})
        return env["mlp.residual"], (env["attn.k_rows"][:, 0], env["attn.v_rows"][..., 0])

    return jax.vmap(row)(x, k, v, shared)
