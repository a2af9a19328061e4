"""An `IntegerModel` written as a .tflite with a KV cache: prefill and decode signatures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder, Embedding, Positions
from qnpu_jax.integer import IntegerModel
from qnpu_jax.tflite.emitter import Emitter, emit
from qnpu_jax.tflite.flatbuffer import ModelWriter, SubgraphWriter
from qnpu_jax.tflite.forms import FileForm, Integers
from qnpu_jax.tflite.operators import add_op


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
    form: FileForm | None = None,
) -> ModelWriter:
    """The model of `write_cached`, in memory; as integers, if `form` does not say otherwise."""
    form = Integers(model) if form is None else form
    writer = ModelWriter()
    for key, tokens in ((f"prefill_{prefill}", prefill), ("decode", 1)):
        dec = cached_decoder(model, tokens, context, logits)
        add_cached(form, writer.add_subgraph(key), key, dec, model.decoder(context))
    return writer


def add_cached(
    form: FileForm,
    subgraph: SubgraphWriter,
    key: str,
    dec: Decoder,
    whole: Decoder,
    emitter: type[Emitter] = Emitter,
) -> None:
    """One signature of `write_cached`; `whole` takes all positions at once, for its RoPE tables.
    An `emitter` of its own spells ops its own way."""
    ids, positions = (
        subgraph.add_tensor(name, (dec.tokens,), "int32") for name in ("ids", "positions")
    )
    shared = at_positions(form, subgraph, dec, whole, positions)
    common = Emitter(form, subgraph, dec.layer, 0)
    names = {t.name for t in dec.layer.named("input")}
    masks = {n: common.tensor(n, label=n) for n in ("mask", "keep") if n in names}
    shared |= masks
    caches = [
        {
            f"attn.cache_{letter}": Emitter(form, subgraph, dec.layer, i).tensor(
                f"attn.cache_{letter}", label=f"kv_cache_{letter}_{i}"
            )
            for letter in "kv"
        }
        for i in range(dec.layer.layers)
    ]
    out, rows = emit(partial(emitter, form, subgraph), dec.graphs, ids, shared, caches)
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
    form: FileForm, subgraph: SubgraphWriter, dec: Decoder, whole: Decoder, positions: int
) -> dict[str, int]:
    """What all layers share but the mask: RoPE rows of `positions` (T,), from the tables of
    `whole`, which takes all positions at once."""
    common, every = (Emitter(form, subgraph, d.layer, 0) for d in (dec, whole))
    tables = form.inputs(whole)
    shared = {"norm.eps": common.tensor("norm.eps", tables["norm.eps"], "norm.eps")}
    for name in ("rope.cos", "rope.sin"):
        table = every.tensor(name, tables[name], f"{name}.table")
        shared[name] = common.tensor(name, label=name)
        add_op(subgraph, Embedding(), [positions, table], shared[name])
    return shared
