"""Text that the model writes itself, so that calibration needs no download.

Decoding runs the graphs of `qnpu_jax.graph.decoder` in float, one token of every row per step, over a
cache of keys and values. Rows are independent: a row whose document ends begins another one, at
position 0 and with an empty cache, so that every row is full whatever the model likes to end.

Reference: LLM-QAT (arXiv 2305.17888), section 3.1: training data sampled from the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import evaluate
from qnpu_jax.graph import Decoder, Params, Tensors, decoder, layer_inputs, local
from qnpu_jax.models import Tokenizer

BATCH = 32
"""Rows decoded together: every step reads all weights once, whatever the number of rows."""

Progress = Callable[[Iterable[int], int], Iterable[int]]
"""Wraps the iteration over the decoding steps; its second argument is their number."""

QUESTIONS = (
    "What is the capital of France?",
    "Explain photosynthesis to a ten-year-old.",
    "Write a Python function that reverses a string.",
    "Give me three tips for sleeping better.",
    "Translate 'Good morning, how are you?' into Spanish.",
    "Write a short poem about the sea.",
    "A train travels 120 km in 90 minutes. What is its average speed?",
    "Summarize the causes of the First World War.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite email asking for a day off.",
    "How do I cook rice?",
    "List five animals that live in the desert.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Correct the grammar: 'She don't like apples.'",
    "Tell me a story about a robot that learns to paint.",
    "What should I see in Japan in one week?",
)
"""What chats in the calibration text begin with: facts, code, sums, languages and tales."""


@flax.struct.dataclass(kw_only=True)
class Prompts:
    """How documents begin, and how they end.

    Attributes:
      ids: P prompts, padded to the longest.
      lengths: their true lengths.
      stop: tokens that end a document where they are drawn.
      bos: the token that rows leave out where a document begins with it, -1 for none.
    """

    ids: Int32[Array, "p t"]
    lengths: Int32[Array, " p"]
    stop: Int32[Array, " e"]
    bos: Int32[Array, ""]


@flax.struct.dataclass(kw_only=True)
class Stream:
    """The state of B rows between two steps.

    Attributes:
      key: of the random numbers still to be drawn.
      prompt: which prompt each row's document began with.
      token: the latest token of each row, not yet in the cache.
      position: its position in its document.
      ended: whether it is the last one of its document.
      k, v: the cache of all layers; slots from `position` on are free.
    """

    key: Key[Array, ""]
    prompt: Int32[Array, " b"]
    token: Int32[Array, " b"]
    position: Int32[Array, " b"]
    ended: Bool[Array, " b"]
    k: Float32[Array, "l b n c h"]
    v: Float32[Array, "l b n h c"]


def sample(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    prompts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    temperature: float = 1.0,
    *,
    stop: Collection[int] = (),
    bos: int | None = None,
    progress: Progress | None = None,
) -> Int32[np.ndarray, "b t"]:
    """One row of `length` tokens per prompt: the prompt, then p(token) ~ exp(logit / temperature).

    A document ends with a drawn `stop` token, which stays in the row, or with the row. Row b begins
    with prompt b and takes the next prompt (cyclically) for each further document, so that a prompt
    the model answers briefly does not fill its row with repetitions. Equal arguments give equal
    tokens.

    Args:
      plan: any; float evaluation ignores bits.
      params: folded parameters (`fold.fold_norms`); prefix K/V, if any, precede every document.
      prompts: token ids, at least one each; cut where longer than a row.
      temperature: 0 takes the likeliest token.
      bos: fed where a document begins with it, but left out of the rows.
      progress: wraps the iteration over steps, `length` for each 32 rows.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, or rows longer than the model's
        positions.
    """
    table = _prompts(config, prompts, stop, bos)
    dec = _decoder(config, plan, params, cache=length - 1)
    groups = -(-len(prompts) // BATCH)
    rows = -(-len(prompts) // groups)  # per group, equal so that one compiled step serves all
    keys = jax.random.split(jax.random.key(seed), groups)
    starts = (_start(dec, keys[i], i * rows, rows, len(prompts)) for i in range(groups))
    weights = {name: jnp.asarray(x) for name, x in params.items()}
    tokens = chain.from_iterable(
        _decode(dec, weights, table, at, length, temperature) for at in starts
    )
    steps: Iterable[int] = range(groups * length)
    steps = progress(steps, groups * length) if progress else steps
    # `steps` comes first in zip: its end, not that of the tokens, closes the progress bar.
    out = np.stack([token for _, token in zip(steps, tokens, strict=False)])
    return out.reshape(groups, length, rows).swapaxes(1, 2).reshape(-1, length)[: len(prompts)]


def greedy(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    prompt_ids: Sequence[int],
    max_new: int,
    eos_ids: Collection[int],
) -> list[int]:
    """The likeliest continuation, token by token, without the token of `eos_ids` that ends it.

    Args:
      plan, params: as in `sample`.
      max_new: at most this many tokens.

    Raises:
      UserError: as `sample`.
    """
    table = _prompts(config, [prompt_ids], (), None)
    length = len(prompt_ids) + max_new
    dec = _decoder(config, plan, params, cache=length - 2)
    weights = {name: jnp.asarray(x) for name, x in params.items()}
    start = _start(dec, jax.random.key(0), 0, 1, 1)
    out: list[int] = []
    for i, token in enumerate(_decode(dec, weights, table, start, length, temperature=0.0)):
        if i >= len(prompt_ids):
            if int(token[0]) in eos_ids:
                break
            out.append(int(token[0]))
    return out


def calibration_windows(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    tokenizer: Tokenizer,
    tokens: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
) -> Int32[np.ndarray, "n t"]:
    """Calibration text by the model itself: windows of `length` tokens, at least `tokens` in all.

    Every other window begins as a chat with one of QUESTIONS, the rest as free text, after BOS (a
    random token where the model has no BOS). Without a chat template all are free text. BOS itself
    is in no window where a document begins: the product puts a prefix there, and a BOS behind it
    would be an outlier that ordinary text does not have.

    Args:
      plan, params, progress: as in `sample`.
      tokenizer: the model's own.

    Raises:
      UserError: as `sample`, or the chat template refuses a plain question.
    """
    count = max(1, -(-tokens // length))
    opening = np.random.default_rng(seed).integers(tokenizer.vocab_size, size=count)
    prompts = [[int(i)] if tokenizer.bos_id is None else [tokenizer.bos_id] for i in opening]
    if tokenizer.chat_template is not None:
        chats = [tokenizer.chat([{"role": "user", "content": q}]) for q in QUESTIONS]
        for i in range(1, count, 2):
            prompts[i] = chats[i // 2 % len(chats)]
    ends = {"stop": tokenizer.eos_ids, "bos": tokenizer.bos_id}
    return sample(config, plan, params, prompts, length, seed, progress=progress, **ends)


def _prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], stop: Collection[int], bos: int | None
) -> Prompts:
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
        stop=jnp.asarray(list(stop), jnp.int32),
        bos=jnp.asarray(-1 if bos is None else bos, jnp.int32),
    )


def _decoder(config: ModelConfig, plan: BitPlan, params: Params, cache: int) -> Decoder:
    """Staged for one token after `cache` slots and the prefix that the parameters hold."""
    prefix = params.get("layers.attn.prefix_k")
    # Without a slot the graph would have no cache inputs, a second form for one-token rows only.
    return decoder(config, plan, 1, 0 if prefix is None else prefix.shape[2], max(cache, 1))


def _start(dec: Decoder, key: Key[Array, ""], first: int, rows: int, prompts: int) -> Stream:
    """Before the first token: as if each row had just ended the prompt before its own."""
    cfg = dec.config
    cache = (cfg.num_layers, rows, cfg.num_kv_heads, dec.cache, cfg.head_dim)
    return Stream(
        key=key,
        prompt=(jnp.arange(rows, dtype=jnp.int32) + (first - 1)) % prompts,
        token=jnp.zeros(rows, jnp.int32),
        position=jnp.zeros(rows, jnp.int32),
        ended=jnp.ones(rows, bool),
        k=jnp.zeros(cache, jnp.float32),
        v=jnp.zeros((*cache[:3], cfg.head_dim, dec.cache), jnp.float32),
    )


def _decode(
    dec: Decoder, params: Tensors, prompts: Prompts, at: Stream, steps: int, temperature: float
) -> Iterator[Int32[np.ndarray, " b"]]:
    """The tokens of each step; the caller may stop at any."""
    tables = _tables(dec)
    for _ in range(steps):
        at = _step(dec, params, tables, prompts, at, temperature)
        yield np.asarray(at.token)


def _tables(dec: Decoder) -> Tensors:
    """What the layers share (RoPE rows, mask, D eps), for 0 to `cache` filled slots on axis 0."""
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
    """One more token in every row: the prompt's while it lasts, then a drawn one."""
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
    # A document that begins with another token than BOS shows it, so this step was for nothing.
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
    """Logits of what follows each row's token, and the state with that token in the cache."""
    shared = {name: table[at.position] for name, table in tables.items()}

    def embed(token: Array) -> Array:
        return evaluate(dec.embed, {"ids": token[None], **local(params, "embed.")})["residual"]

    def head(x: Array, eps: Array) -> Array:
        inputs = {"input.residual": x, "norm.eps": eps, **local(params, "head.")}
        return evaluate(dec.head, inputs)["logits"][0]

    x = jax.vmap(embed)(at.token)
    x, (k, v) = jax.lax.scan(
        partial(_layer, dec, shared), x, (local(params, "layers."), at.k, at.v)
    )
    # Written here, in place, for all layers: caches that the scan returned would be copies.
    every, rows = slice(None), jnp.arange(len(at.token))
    k = at.k.at[every, rows, :, at.position].set(jnp.moveaxis(k, 1, 0), mode="drop")
    v = at.v.at[every, rows, :, :, at.position].set(jnp.moveaxis(v, 1, 0), mode="drop")
    return jax.vmap(head)(x, shared["norm.eps"]), replace(at, k=k, v=v)


def _layer(
    dec: Decoder,
    shared: Tensors,
    x: Float32[Array, "b 1 d"],
    values: tuple[Tensors, Float32[Array, "b n c h"], Float32[Array, "b n h c"]],
) -> tuple[Float32[Array, "b 1 d"], tuple[Float32[Array, "b n h"], Float32[Array, "b n h"]]]:
    """The new residual, and the token's row of keys and of values."""
    weights, k, v = values

    def row(x: Array, k: Array, v: Array, shared: Mapping[str, Array]):
        inputs = {"input.residual": x, "attn.cache_k": k, "attn.cache_v": v}
        env = evaluate(dec.layer, {**inputs, **shared, **weights})
        return env["mlp.residual"], (env["attn.k_rows"][:, 0], env["attn.v_rows"][..., 0])

    return jax.vmap(row)(x, k, v, shared)
