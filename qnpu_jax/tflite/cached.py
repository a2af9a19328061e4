"""An `IntegerModel` written as a .tflite with a KV cache: prefill and decode signatures."""

from __future__ import annotations

from functools import partial

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder, Embedding, Positions, shared_names
from qnpu_jax.integer import IntegerModel
from qnpu_jax.tflite.emitter import Emitter, emit
from qnpu_jax.tflite.flatbuffer import ModelWriter, SubgraphWriter
from qnpu_jax.tflite.forms import FileForm, Integers
from qnpu_jax.tflite.operators import add_op


def build_cached(
    model: IntegerModel,
    prefill: int,
    context: int,
    logits: Positions = "last",
    form: FileForm | None = None,
) -> ModelWriter:
    """Builds a file with the signatures `prefill_<prefill>` and `decode` (one token).

    They share all weights that they hold in the same way.
    Letters: T new tokens, N KV heads, G query heads of each, K head_dim, S = prefix + context.

    Inputs of a signature:
      `ids` (T,) int32.
      `positions` (T,) int32, 0 for the first token after the prefix.
      `mask` (1, T G, S), codes with the bits of the scores: 0 where a token may look, elsewhere
        -127 (int8) or -32512 (int16). Layers with a sliding window of W tokens read
        `mask_window_<W>` (and `keep_window_<W>`) in its place.
      `keep` (1, T G, S) int16, only in models with 16-bit probabilities: 32767 where a token may
        look, 0 elsewhere.
      `kv_cache_k_<i>` (N, context - T, K) and `kv_cache_v_<i>` (N, K, context - T) int8, for every
        layer i: the slots before the new tokens. The mask hides those that are not filled.

    Outputs:
      `logits`, codes (T, V) or (1, V).
      `kv_slice_k_<i>` (N, T, K) and `kv_slice_v_<i>` (N, K, T) int8: keys and values of the new
        tokens, which the host puts in the cache.

    Every signature has the same S, because LiteRT's int16 SOFTMAX gives each masked key a little
    probability: the sum over keys depends on their number. So chunks and single steps give the same
    bits as one long prefill.

    Args:
      prefill: tokens of the long signature.
      context: positions after the prefix, the new tokens included.
      logits: of all positions of a prefill, or of the last only.
      form: how the file holds the model; None takes `Integers`.

    Returns:
      The file, not yet written.

    Raises:
      UserError: more positions than the model has, or a context without room for a cache.
    """
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
    """Adds one signature of `build_cached` to a subgraph.

    Args:
      key: name of the signature.
      dec: graphs of the signature (`cached_decoder`).
      whole: decoder of all positions at once, whose RoPE tables the signature reads.
      emitter: class that adds the ops of a graph.
    """
    ids, positions = (
        subgraph.add_tensor(name, (dec.tokens,), "int32") for name in ("ids", "positions")
    )
    shared = at_positions(form, subgraph, dec, whole, positions)
    masks = {
        name: Emitter(form, subgraph, graph, layer).tensor(local, label=name)
        for name, (graph, local, layer) in shared_names(dec).items()
        if local in ("mask", "keep")
    }
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
    out, rows = emit(partial(emitter, form, subgraph), dec, ids, shared, caches)
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
    """Returns the graphs of a signature of `build_cached`, with context - tokens cache slots.

    Raises:
      UserError: as `build_cached`.
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
    """Adds what layers share beside the masks: the RoPE rows of some positions, and eps.

    Args:
      whole: decoder of all positions at once, whose RoPE tables the rows are gathered from.
      positions: tensor of the positions (T,) int32.

    Returns:
      Tensors by shared name (`graph.shared_names`): `rope.cos`, `rope.sin`, ..., and every eps.
    """
    readers, tables, shared = shared_names(dec), form.inputs(whole), {}
    for name, x in tables.items():
        graph, local, layer = readers[name]
        if local.endswith(".eps"):
            shared[name] = Emitter(form, subgraph, graph, layer).tensor(local, x, name)
    for name, (graph, local, layer) in readers.items():
        if local in ("rope.cos", "rope.sin"):
            every = Emitter(form, subgraph, whole.layer, layer)
            table = every.tensor(local, tables[name], f"{name}.table")
            shared[name] = Emitter(form, subgraph, graph, layer).tensor(local, label=name)
            add_op(subgraph, Embedding(), [positions, table], shared[name])
    return shared
