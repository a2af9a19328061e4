"""The decoder, written like a forward function and staged as three graphs: embed, one layer, head.

Gamma, rotations and the attention scale are in the parameters already (`qnpu_jax.transform`): a
norm here is x / sqrt(sum x^2 + D eps), scores are q k^T.

Letters: as in `layer`, and V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from qnpu_jax.choices import Positions
from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph.builder import Builder
from qnpu_jax.graph.graph import Graph, TensorSpec, global_name
from qnpu_jax.graph.layer import LayerInputs, decoder_layer
from qnpu_jax.graph.layered import local
from qnpu_jax.graph.norms import stream_norm
from qnpu_jax.graph.ops import (
    FullyConnected,
    Requantize,
    Slice,
)

TABLE_SCALE = {8: 1 / 127, 16: 1 / 32767}
"""Scale of the RoPE tables by their bits: cos and sin use the whole code range."""
MASK = -1e9
"""Value that float evaluation adds to the score of a masked position: lower than any score."""
MASK_CODE = {8: -127, 16: -32512}
"""Code of a masked position by the mask's bits; its scale follows from the scores
(`scales.mask_scale`)."""
KEEP_SCALE = 1 / 32767
"""Scale of the 16-bit tensor that multiplies probabilities: 1 where a token may look, 0 elsewhere.

Only 16-bit probabilities need it: LiteRT's int16 SOFTMAX leaves 2/32768 to every masked key. In 8
bits so little rounds to 0.
"""


@dataclass(frozen=True)
class Decoder:
    """A quantized decoder as three graphs, staged for fixed lengths.

    Attributes:
      tokens: new positions of one run, T.
      prefix: constant positions before them, whose keys and values are parameters.
      cache: slots of the KV cache between prefix and new positions.
      embed, layer, head: the graphs; the layer graph runs `config.num_layers` times.
    """

    config: ModelConfig
    plan: BitPlan
    tokens: int
    prefix: int
    cache: int
    embed: Graph
    layer: Graph
    head: Graph

    @property
    def graphs(self) -> tuple[Graph, Graph, Graph]:
        return (self.embed, self.layer, self.head)

    @property
    def keys(self) -> int:
        """Positions that attention reads, S = prefix + cache + tokens."""
        return self.prefix + self.cache + self.tokens


@lru_cache(maxsize=32)
def decoder(
    config: ModelConfig,
    plan: BitPlan,
    tokens: int,
    prefix: int = 0,
    cache: int = 0,
    logits: Positions = "all",
) -> Decoder:
    """Stages the graphs for `tokens` new positions after `prefix` constant and `cache` cached ones.

    Args:
      plan: bits of every tensor.
      logits: of all T positions, or of the last only.

    Raises:
      UserError: more positions than the model has, a tensor that no rule of the plan matches, or a
        rule that matches no tensor.
    """
    if (positions := prefix + cache + tokens) > config.max_positions:
        raise UserError(
            f"length: prefix {prefix} + cache {cache} + {tokens} tokens = {positions} positions;"
            " expected at most"
            f" the model's {config.max_positions}; choose a shorter length"
        )
    graphs, asked = _staged(config, plan, tokens, prefix, cache, logits)
    _check_used(config, plan, asked, tokens)
    return Decoder(config, plan, tokens, prefix, cache, *graphs)


def with_additions(config: ModelConfig) -> ModelConfig:
    """The model with all that `pipeline` may add to its graph: centred keys, norms taken twice."""
    return replace(config, centred_keys=True, double_norms=True)


def _check_used(config: ModelConfig, plan: BitPlan, asked: list[str], tokens: int) -> None:
    """Raises UserError for a rule that matches no tensor of the model, with additions or without:
    a plan for a model with some is checked on the model without them first."""
    try:
        plan.check_used(asked)
    except UserError:
        every = with_additions(config)
        added = []
        for some in (every, replace(every, double_norms=False), replace(every, centred_keys=False)):
            with suppress(UserError):  # the plan need not fit a model with what it was not for
                added += _staged(some, plan, tokens, 1, 0)[1]
        plan.check_used([*asked, *added])


def planned_names(dec: Decoder) -> list[str]:
    """Global names of the tensors that the bit plan decides: the others copy another's bits."""
    return list(dict.fromkeys(_staged(dec.config, dec.plan, dec.tokens, dec.prefix, dec.cache)[1]))


def _staged(
    config: ModelConfig,
    plan: BitPlan,
    tokens: int,
    prefix: int,
    cache: int,
    logits: Positions = "all",
) -> tuple[tuple[Graph, Graph, Graph], list[str]]:
    """Stages the graphs, and records every name that the plan was asked for."""
    asked: list[str] = []

    def bits_of(where: str, layers: int):
        def bits(name: str) -> tuple[int, ...]:
            names = [global_name(f"{where}.", i, name) for i in range(layers)]
            asked.extend(names)
            return tuple(plan.bits(n) for n in names)

        return Builder(f"{where}.", bits)

    embed = _embed(bits_of("embed", 1), config, tokens)
    layer = _layer(bits_of("layers", config.num_layers), config, tokens, prefix, cache)
    head = _head(bits_of("head", 1), config, tokens, logits)
    return (embed, layer, head), asked


def _shared(
    g: Builder,
    name: str,
    shape: tuple[int, ...],
    like: str,
    scales: Mapping[int, float] | None = None,
) -> TensorSpec:
    """Stages an input that layers share.

    Its kernel combines it with the tensor `like`, so it has that tensor's bits in each layer.
    Without `scales` its scale is derived from others (`scales.resolve`).

    Args:
      scales: by bits.
    """
    bits = g.bits(like)
    if scales is None:
        return g.input(name, shape, bits=bits)
    for layer, b in enumerate(bits):
        if b not in scales:
            raise UserError(
                f"{global_name(g.prefix, layer, like)}: the bit plan gives it {b} bits; expected"
                f" {' or '.join(map(str, scales))}; correct the rule that matches it"
            )
    return g.input(name, shape, bits=bits, fixed=tuple(scales[b] for b in bits))


def _embed(g: Builder, cfg: ModelConfig, tokens: int) -> Graph:
    ids = g.ids("ids", (tokens,))
    out = g.gather("out", ids, g.param("weight", (cfg.vocab_size, cfg.hidden_size)))
    return g.finish(g.add("residual", Requantize(), out, symmetric=True))


def _layer(g: Builder, cfg: ModelConfig, tokens: int, prefix: int, cache: int) -> Graph:
    keys = prefix + cache + tokens
    table = (tokens, 1, cfg.head_dim)
    square = (1, tokens * cfg.queries_per_kv_head, keys)
    x = g.input("input.residual", (tokens, cfg.hidden_size))
    like = local(shared_widths(cfg), g.prefix)
    probs = {b for i in range(cfg.num_kv_heads) for b in g.bits(f"attn.kv{i}.probs")}
    wide, kept = (16,) * cfg.num_layers, (KEEP_SCALE,) * cfg.num_layers
    env = LayerInputs(
        cos=_shared(g, "rope.cos", table, like["rope.cos"], TABLE_SCALE),
        sin=_shared(g, "rope.sin", table, like["rope.sin"], TABLE_SCALE),
        mask=_shared(g, "mask", square, like["mask"]),
        keep=g.input("keep", square, bits=wide, fixed=kept) if 16 in probs else None,
        eps=_eps(g, cfg, "norm.eps", cfg.hidden_size, like["norm.eps"]),
        q_eps=_head_eps(g, cfg, "q_norm.eps", cfg.num_heads, like),
        k_eps=_head_eps(g, cfg, "k_norm.eps", cfg.num_kv_heads, like),
    )
    past = [(source, n) for source, n in (("prefix", prefix), ("cache", cache)) if n]
    return g.finish(*decoder_layer(g, cfg, x, env, past))


def _head(g: Builder, cfg: ModelConfig, tokens: int, logits: str) -> Graph:
    x = g.input("input.residual", (tokens, cfg.hidden_size))
    if logits == "last":
        x = g.add("last", Slice((tokens - 1, 0), (1, cfg.hidden_size)), x)
    like = local(shared_widths(cfg), g.prefix)
    x = stream_norm(g, cfg, x, _eps(g, cfg, "norm.eps", cfg.hidden_size, like["norm.eps"]))
    x = g.add("input", Requantize(), x)
    weight = g.param("weight", (cfg.vocab_size, cfg.hidden_size), axis=0)
    bias = g.param("bias", (cfg.vocab_size,), axis=0)
    return g.finish(g.add("logits", FullyConnected(), x, weight, bias))


def _eps(g: Builder, cfg: ModelConfig, name: str, width: int, like: str) -> TensorSpec:
    """Stages D eps of a norm over D = `width`, scaled so that it is the highest code of its
    width."""
    real = width * cfg.rms_norm_eps
    scales = {bits: real / (2 ** (bits - 1) - 1) for bits in (8, 16)}
    return _shared(g, name, (1, 1, 1), like, scales)


def shared_widths(cfg: ModelConfig) -> dict[str, str]:
    """Local name of the tensor whose bits an input that layers share has, in a layer or in the
    head, by the input's stacked global name."""
    first = "attn.post_norm.norm.sum" if cfg.norms == "after" else "attn.norm.sum"
    found = {
        "rope.cos": "attn.rope.q",
        "rope.sin": "attn.rope.q",
        "mask": "attn.kv0.scores",
        "norm.eps": first,
    }
    if cfg.qk_norm is not None:
        found |= {f"{x}_norm.eps": f"attn.{x}_norm.norm.sum" for x in "qk"}
    return {f"layers.{name}": like for name, like in found.items()} | {"head.norm.eps": "norm.sum"}


def _head_eps(
    g: Builder, cfg: ModelConfig, name: str, heads: int, like: Mapping[str, str]
) -> TensorSpec | None:
    """Stages eps of the norm of queries or keys."""
    return _eps(g, cfg, name, normed_width(cfg, heads), like[name]) if name in like else None


def normed_width(cfg: ModelConfig, heads: int) -> int:
    """Channels that a norm of queries or keys goes over: those of a head, or of all heads."""
    return cfg.head_dim * (heads if cfg.qk_norm == "all" else 1)
