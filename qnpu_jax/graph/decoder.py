"""The decoder, written like a forward function and staged as three graphs: embed, one layer, head.

Gamma, rotations and the attention scale are in the parameters already (`qnpu_jax.transform`): a
norm here is x / sqrt(sum x^2 + D eps), scores are q k^T. Attention is staged per KV head, with the
keys [prefix | cache | new], because NPU compilers refuse the batched form at decode. Values are
kept transposed, (N, K, S): CPU kernels pack the second operand of a BATCH_MATMUL at every call,
which is several times as fast where adj_y is set.

Letters: T tokens, S keys, D hidden, H heads, N KV heads, G = H/N, K head_dim, F intermediate, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from qnpu_jax.choices import Positions
from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph.builder import Builder
from qnpu_jax.graph.graph import Graph, TensorSpec, global_name
from qnpu_jax.graph.layered import T
from qnpu_jax.graph.norms import norm_after, norm_before, scaled_norm, stream_norm
from qnpu_jax.graph.ops import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    FullyConnected,
    Gelu,
    Keep,
    Logistic,
    Mul,
    Requantize,
    Reshape,
    Slice,
    Softmax,
    Transpose,
)
from qnpu_jax.graph.shared_names import select

TABLE_SCALE = {8: 1 / 127, 16: 1 / 32767}
"""Scale of the RoPE tables by their bits: cos and sin use the whole code range."""
MASK = -1e9
"""Value that float evaluation adds to the score of a masked position: lower than any score."""
MASK_CODE = {8: -127, 16: -32512}
"""Code of a masked position by the mask's bits; its scale follows from the scores
(`scales.mask_scale`)."""
KEEP_SCALE = {16: 1 / 32767}
"""Scale of the tensor that multiplies probabilities: 1 where a token may look, 0 elsewhere.

Only 16-bit probabilities need it: LiteRT's int16 SOFTMAX leaves 2/32768 to every masked key. In 8
bits so little rounds to 0.
"""


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of the layer graph that all layers share.

    Attributes:
      cos, sin: RoPE tables, (T, 1, K).
      mask: added to scores, (1, T G, S): one row for each of the G query heads of a KV head.
      keep: multiplies probabilities, of the mask's shape; None beside 8-bit probabilities.
      eps: D eps of the norms, (1, 1, 1).
      q_eps, k_eps: of the norms of queries and keys, likewise; None where the model has none.
    """

    cos: TensorSpec
    sin: TensorSpec
    mask: TensorSpec
    keep: TensorSpec | None
    eps: TensorSpec
    q_eps: TensorSpec | None = None
    k_eps: TensorSpec | None = None


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

    def shared(self, graph: Graph, values: Mapping[str, T], layer: int = 0) -> dict[str, T]:
        """Selects the shared inputs that a graph reads in one layer (`shared_names.select`)."""
        return select(self.config, graph, values, layer)


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
    plan.check_used(asked)
    return Decoder(config, plan, tokens, prefix, cache, *graphs)


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
    """Stages an input that all layers share.

    Its kernel combines it with the tensor `like`, so it has that tensor's bits, which must be the
    same in all layers. Without `scales` its scale is derived from others (`scales.resolve`).
    """
    bits = g.bits(like)
    if len(set(bits)) > 1:
        raise UserError(
            f"layers.*.{like}: bits {list(bits)}; expected the same in all layers, which"
            f" share one {name}; change the bit plan's rule"
        )
    if scales is None:
        return g.input(name, shape, bits=bits)
    if bits[0] not in scales:
        raise UserError(
            f"{g.prefix}{like}: the bit plan gives it {bits[0]} bits; expected"
            f" {' or '.join(map(str, scales))}; correct the rule that matches it"
        )
    return g.input(name, shape, bits=bits, fixed=(scales[bits[0]], 0))


def _embed(g: Builder, cfg: ModelConfig, tokens: int) -> Graph:
    ids = g.ids("ids", (tokens,))
    out = g.gather("out", ids, g.param("weight", (cfg.vocab_size, cfg.hidden_size)))
    return g.finish(g.add("residual", Requantize(), out, symmetric=True))


def _layer(g: Builder, cfg: ModelConfig, tokens: int, prefix: int, cache: int) -> Graph:
    keys = prefix + cache + tokens
    table = (tokens, 1, cfg.head_dim)
    square = (1, tokens * cfg.queries_per_kv_head, keys)
    x = g.input("input.residual", (tokens, cfg.hidden_size))
    like = shared_widths(cfg)
    probs = g.bits(like["keep"])
    env = LayerInputs(
        cos=_shared(g, "rope.cos", table, like["rope.cos"], TABLE_SCALE),
        sin=_shared(g, "rope.sin", table, like["rope.sin"], TABLE_SCALE),
        mask=_shared(g, "mask", square, like["mask"]),
        keep=_shared(g, "keep", square, like["keep"], KEEP_SCALE) if 16 in probs else None,
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
    x = stream_norm(g, cfg, x, _eps(g, cfg, "norm.eps", cfg.hidden_size, "norm.sum"))
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
    """Tensor of the layer graph whose bits each input that layers share has, by local name."""
    first = "attn.post_norm.norm.sum" if cfg.norms == "after" else "attn.norm.sum"
    found = {
        "rope.cos": "attn.rope.q",
        "rope.sin": "attn.rope.q",
        "mask": "attn.kv0.scores",
        "keep": "attn.kv0.probs",
        "norm.eps": first,
    }
    if cfg.qk_norm is not None:
        found |= {f"{x}_norm.eps": f"attn.{x}_norm.norm.sum" for x in "qk"}
    return found


def _head_eps(
    g: Builder, cfg: ModelConfig, name: str, heads: int, like: Mapping[str, str]
) -> TensorSpec | None:
    """Stages eps of the norm of queries or keys."""
    return _eps(g, cfg, name, normed_width(cfg, heads), like[name]) if name in like else None


def normed_width(cfg: ModelConfig, heads: int) -> int:
    """Channels that a norm of queries or keys goes over: those of a head, or of all heads."""
    return cfg.head_dim * (heads if cfg.qk_norm == "all" else 1)


def decoder_layer(
    g: Builder, cfg: ModelConfig, x: TensorSpec, env: LayerInputs, past: list[tuple[str, int]]
) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """Stages one layer: x <- x + attention(norm(x)), x <- x + mlp(norm(x)).

    Norms stand before the blocks, after them, or both.

    Args:
      x: residual stream, (T, D).
      env: inputs that all layers share.
      past: sources of earlier keys and values with their lengths, ("prefix", P) and ("cache", C).

    Returns:
      The residual stream (T, D), new keys (N, T, K) and new values (N, K, T).
    """
    with g.scope("attn"):
        mixed, k_rows, v_rows = attention(g, cfg, norm_before(g, cfg, x, env.eps), env, past)
        mixed = norm_after(g, cfg, mixed, env.eps)
        x = g.add("residual", Add(), x, mixed, symmetric=True)
    with g.scope("mlp"):
        mixed = gated_mlp(g, cfg, norm_before(g, cfg, x, env.eps))
        mixed = norm_after(g, cfg, mixed, env.eps)
        x = g.add("residual", Add(), x, mixed, symmetric=True)
    return x, k_rows, v_rows


def rope(g: Builder, name: str, x: TensorSpec, env: LayerInputs, bias: bool = False) -> TensorSpec:
    """Stages rotary positions: x cos + swap(x) sin, for x (T, heads, K).

    `swap` exchanges the halves of each head. The minus sign of its first half is in the sin table.

    Args:
      bias: add the linear's bias here, at RoPE's width: Qwen2's biases are a hundred times what
        the linear itself puts out, and would take its 8 bits.
    """
    tokens, heads, width = x.shape
    half = (tokens, heads, width // 2)
    with g.scope("rope"):
        x = g.add(name, Requantize(), x, symmetric=True)
        if bias:
            offset = g.constant(f"{name}_offset", (1, heads, width), like=x)
            x = g.add(f"{name}_biased", Add(), x, offset, symmetric=True)
        left = g.add(f"{name}_left", Slice((0, 0, 0), half), x)
        right = g.add(f"{name}_right", Slice((0, 0, width // 2), half), x)
        swap = g.add(f"{name}_swap", Concat(2), right, left)
        cos = g.add(f"{name}_cos", Mul(), x, env.cos)
        sin = g.add(f"{name}_sin", Mul(), swap, env.sin)
        return g.add(f"{name}_out", Add(), cos, sin)


def attention(
    g: Builder, cfg: ModelConfig, x: TensorSpec, env: LayerInputs, past: list[tuple[str, int]]
) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """Stages softmax(q k^T + mask) v through the output linear o.

    Returns:
      The output (T, D), new keys (N, T, K) and new values (N, K, T).
    """
    tokens, n, k = x.shape[0], cfg.num_kv_heads, cfg.head_dim
    x = g.add("input", Requantize(), x)
    q = g.fully_connected("q", x, cfg.num_heads * k)
    key = g.fully_connected("k", x, n * k)
    value = g.fully_connected("v", x, n * k, symmetric=True)
    q = rope(g, "q", split_heads(g, cfg, "q", q, env.q_eps), env, "q" in cfg.late_biases)
    key = rope(g, "k", split_heads(g, cfg, "k", key, env.k_eps), env, "k" in cfg.late_biases)
    if cfg.centred_keys:
        with g.scope("rope"):
            centre = g.constant("k_centre", (1, n, k), like=key)
            key = g.add("k_centred", Add(), key, centre, symmetric=True)
    value = g.add("v_heads", Reshape((tokens, n, k)), value)
    q = g.add("q_pos", Requantize(), q)
    key = g.add("k_cache", Requantize(), key, symmetric=True)
    value = g.add("v_cache", Requantize(), value, symmetric=True)
    k_rows = g.add("k_rows", Transpose((1, 0, 2)), key)
    v_rows = g.add("v_rows", Transpose((1, 2, 0)), value)
    keys = _with_past(g, "keys", "k", k_rows, past, axis=1)
    values = _with_past(g, "values", "v", v_rows, past, axis=2)
    heads = [_kv_head(g, cfg, i, q, keys, values, env) for i in range(n)]
    mixed = g.add("mixed", Concat(1), *heads)
    return g.fully_connected("o", mixed, cfg.hidden_size), k_rows, v_rows


def split_heads(
    g: Builder, cfg: ModelConfig, letter: str, x: TensorSpec, eps: TensorSpec | None
) -> TensorSpec:
    """Stages queries or keys by heads, (T, heads, K), normed where the model says so."""
    name = f"{letter}_norm"
    if eps is not None and cfg.qk_norm == "all":
        x = scaled_norm(g, name, x, eps)
    tokens, channels = x.shape
    shape = (tokens, channels // cfg.head_dim, cfg.head_dim)
    x = g.add(f"{letter}_heads", Reshape(shape), x)
    if eps is not None and cfg.qk_norm == "head":
        x = scaled_norm(g, name, x, eps)
    return x


def _with_past(
    g: Builder, name: str, letter: str, rows: TensorSpec, past: list[tuple[str, int]], axis: int
) -> TensorSpec:
    """Stages the concatenation of earlier positions and new rows along `axis`."""
    bits = rows.quant.bits
    parts = []
    for source, length in past:
        shape = (*rows.shape[:axis], length, *rows.shape[axis + 1 :])
        make = g.param if source == "prefix" else g.input
        parts.append(make(f"{source}_{letter}", shape, bits=bits))
    return g.add(name, Concat(axis), *parts, rows) if parts else rows


def _kv_head(
    g: Builder,
    cfg: ModelConfig,
    i: int,
    q: TensorSpec,
    keys: TensorSpec,
    values: TensorSpec,
    env: LayerInputs,
) -> TensorSpec:
    """Stages attention of one KV head: its G query heads are one matrix of T G rows."""
    tokens, groups, k = q.shape[0], cfg.queries_per_kv_head, cfg.head_dim
    length = keys.shape[1]
    rows = (1, tokens * groups)
    with g.scope(f"kv{i}"):
        q = g.add("q", Slice((0, i * groups, 0), (tokens, groups, k)), q)
        q = g.add("queries", Reshape((*rows, k)), q)
        keys = g.add("keys", Slice((i, 0, 0), (1, length, k)), keys)
        values = g.add("values", Slice((i, 0, 0), (1, k, length)), values)
        scores = g.add("scores", BatchMatmul(adj_y=True), q, keys, symmetric=True)
        scores = g.add("masked", AddMask(), scores, env.mask, symmetric=True)
        probs = g.add("probs", Requantize(), g.add("softmax", Softmax(), scores))
        if env.keep is not None:
            probs = g.add("kept", Keep(), probs, env.keep)
        mixed = g.add("mixed", BatchMatmul(adj_y=True), probs, values)
        return g.add("out", Reshape((tokens, groups * k)), mixed)


def gated_mlp(g: Builder, cfg: ModelConfig, x: TensorSpec) -> TensorSpec:
    """Stages down(f(gate(x)) up(x)) for x (T, D): f is silu(z) = z sigmoid(z), or gelu."""
    x = g.add("input", Requantize(), x)
    gate = g.fully_connected("gate", x, cfg.intermediate_size)
    up = g.fully_connected("up", x, cfg.intermediate_size)
    if cfg.activation == "gelu_tanh":
        active = g.add("gelu", Gelu(), gate)
    else:
        active = g.add("silu", Mul(), gate, g.add("sigmoid", Logistic(), gate))
    return g.fully_connected("down", g.add("act", Mul(), active, up), cfg.hidden_size)
