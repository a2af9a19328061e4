"""The decoder, written like a forward function and staged as three graphs: embed, one layer, head.

Gamma, rotations and the attention scale are in the weights already (`qnpu_jax.transform.rotate`): a norm here
is x / sqrt(sum x^2 + D eps), scores are q k^T. Attention is staged per KV head, with the keys
[prefix | cache | new], because NPU compilers refuse the batched form at decode. Values are kept
transposed, (N, K, S): CPU kernels pack the second operand of a BATCH_MATMUL at every call, and are
several times as fast at it where adj_y is set.
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
from qnpu_jax.graph.ops import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    FullyConnected,
    Keep,
    Logistic,
    Mul,
    Requantize,
    Reshape,
    Rsqrt,
    Slice,
    Softmax,
    Sqrt,
    Transpose,
)

TABLE_SCALE = {8: 1 / 127, 16: 1 / 32767}
"""Scale of the RoPE tables by their bits: cos and sin use the whole code range."""
MASK = {8: -254.0, 16: -2032.0}
MASK_SCALE = {8: 2.0, 16: 1 / 16}
"""A masked position adds MASK to its score, by its bits: code -127 in 8, which are symmetric,
-32512 in 16. A power of two keeps the ADD's rescaling of 16-bit scores exact to 1/200 of a code; in
8 bits a mask no lower than scores need (`freeze.check_mask`) keeps Hexagon's precise."""
KEEP_SCALE = {16: 1 / 32767}
"""Of what multiplies 16-bit probabilities, in which LiteRT's SOFTMAX leaves 2/32768 to every masked
key: 1 where a token may look, 0 elsewhere. In 8 bits so little is 0 already."""


@dataclass(frozen=True)
class LayerInputs:
    """What every layer of a run shares: RoPE tables (T, 1, K); the mask and, beside 16-bit
    probabilities only, what it keeps, (1, T G, S), a row for every query head that shares a KV
    head; D eps (1, 1, 1)."""

    cos: TensorSpec
    sin: TensorSpec
    mask: TensorSpec
    keep: TensorSpec | None
    eps: TensorSpec


@dataclass(frozen=True)
class Decoder:
    """Three graphs and the sizes they were staged for. The layer graph runs `config.num_layers`
    times."""

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

    Raises:
      UserError: more positions than the model has, a tensor that no rule of the plan matches, or a
      rule that
        matches no tensor.
    """
    if (positions := prefix + cache + tokens) > config.max_positions:
        raise UserError(
            f"length: prefix {prefix} + cache {cache} + {tokens} tokens = {positions} positions;"
            " expected at most"
            f" the model's {config.max_positions}; choose a shorter length"
        )
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
    plan.check_used(asked)
    return Decoder(config, plan, tokens, prefix, cache, embed, layer, head)


def _shared(
    g: Builder, name: str, shape: tuple[int, ...], like: str, scales: Mapping[int, float]
) -> TensorSpec:
    """An input that all layers share, so as wide in all of them as what it is combined with."""
    bits = g.bits(like)
    if len(set(bits)) > 1:
        raise UserError(
            f"layers.*.{like}: bits {list(bits)}; expected the same in all layers, which"
            f" share one {name}; change the bit plan's rule"
        )
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
    probs = g.bits("attn.kv0.probs")
    env = LayerInputs(
        cos=_shared(g, "rope.cos", table, "attn.rope.q", TABLE_SCALE),
        sin=_shared(g, "rope.sin", table, "attn.rope.q", TABLE_SCALE),
        mask=_shared(g, "mask", square, "attn.kv0.scores", MASK_SCALE),
        keep=_shared(g, "keep", square, "attn.kv0.probs", KEEP_SCALE) if 16 in probs else None,
        eps=_eps(g, cfg, "attn.norm.sum"),
    )
    past = [(source, n) for source, n in (("prefix", prefix), ("cache", cache)) if n]
    return g.finish(*decoder_layer(g, cfg, x, env, past))


def _head(g: Builder, cfg: ModelConfig, tokens: int, logits: str) -> Graph:
    x = g.input("input.residual", (tokens, cfg.hidden_size))
    if logits == "last":
        x = g.add("last", Slice((tokens - 1, 0), (1, cfg.hidden_size)), x)
    x = rms_norm(g, x, _eps(g, cfg, "norm.sum"))
    x = g.add("input", Requantize(), x)
    weight = g.param("weight", (cfg.vocab_size, cfg.hidden_size), axis=0)
    bias = g.param("bias", (cfg.vocab_size,), axis=0)
    return g.finish(g.add("logits", FullyConnected(), x, weight, bias))


def _eps(g: Builder, cfg: ModelConfig, like: str) -> TensorSpec:
    """D eps, the highest code of its width."""
    real = cfg.hidden_size * cfg.rms_norm_eps
    scales = {bits: real / (2 ** (bits - 1) - 1) for bits in (8, 16)}
    return _shared(g, "norm.eps", (1, 1, 1), like, scales)


def decoder_layer(
    g: Builder, cfg: ModelConfig, x: TensorSpec, env: LayerInputs, past: list[tuple[str, int]]
) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """x + attention(norm(x)), then + swiglu(norm(x)). Returns the residual and the new rows of keys
    and values."""
    with g.scope("attn"):
        mixed, k_rows, v_rows = attention(g, cfg, rms_norm(g, x, env.eps), env, past)
        x = g.add("residual", Add(), x, mixed, symmetric=True)
    with g.scope("mlp"):
        x = g.add("residual", Add(), x, swiglu(g, cfg, rms_norm(g, x, env.eps)), symmetric=True)
    return x, k_rows, v_rows


def rms_norm(g: Builder, x: TensorSpec, eps: TensorSpec) -> TensorSpec:
    """x / sqrt(sum(x^2) + D eps), of unit length (the factor sqrt(D) is in the weights).

    A BATCH_MATMUL sums the squares in 64 bits and rounds once; sqrt before rsqrt halves the dynamic
    range that the RSQRT table must cover (litert.md, section 2: below 0.6% error for rows 128 times
    smaller than the largest).
    """
    tokens, hidden = x.shape
    with g.scope("norm"):
        rows = g.add("rows", Reshape((tokens, 1, hidden)), x)
        total = g.add("squares", BatchMatmul(adj_y=True), rows, rows)
        total = g.add("sum", Add(), total, eps)
        quarter = g.add("inv_root", Rsqrt(), g.add("root", Sqrt(), total))
        inverse = g.add("inv", Mul(), quarter, quarter)
        out = g.add("out", Mul(), rows, inverse)
        return g.add("flat", Reshape((tokens, hidden)), out)


def rope(g: Builder, name: str, x: TensorSpec, env: LayerInputs) -> TensorSpec:
    """x cos + swap(x) sin, where swap exchanges the halves of each head; the sign is in the sin
    table."""
    tokens, heads, width = x.shape
    half = (tokens, heads, width // 2)
    with g.scope("rope"):
        x = g.add(name, Requantize(), x, symmetric=True)
        left = g.add(f"{name}_left", Slice((0, 0, 0), half), x)
        right = g.add(f"{name}_right", Slice((0, 0, width // 2), half), x)
        swap = g.add(f"{name}_swap", Concat(2), right, left)
        cos = g.add(f"{name}_cos", Mul(), x, env.cos)
        sin = g.add(f"{name}_sin", Mul(), swap, env.sin)
        return g.add(f"{name}_out", Add(), cos, sin)


def attention(
    g: Builder, cfg: ModelConfig, x: TensorSpec, env: LayerInputs, past: list[tuple[str, int]]
) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
    """softmax(q k^T + mask) v through o. Returns the output and the new keys (N, T, K) and values
    (N, K, T)."""
    tokens, n, k = x.shape[0], cfg.num_kv_heads, cfg.head_dim
    x = g.add("input", Requantize(), x)
    q = g.fully_connected("q", x, cfg.num_heads * k)
    key = g.fully_connected("k", x, n * k)
    value = g.fully_connected("v", x, n * k, symmetric=True)
    q = rope(g, "q", g.add("q_heads", Reshape((tokens, cfg.num_heads, k)), q), env)
    key = rope(g, "k", g.add("k_heads", Reshape((tokens, n, k)), key), env)
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


def _with_past(
    g: Builder, name: str, letter: str, rows: TensorSpec, past: list[tuple[str, int]], axis: int
) -> TensorSpec:
    """What is there of earlier positions, which lie along `axis`, before the new rows."""
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
    """The G query heads that share KV head i, as one matrix of T G rows."""
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


def swiglu(g: Builder, cfg: ModelConfig, x: TensorSpec) -> TensorSpec:
    """down(silu(gate(x)) * up(x)), silu(z) = z sigmoid(z)."""
    x = g.add("input", Requantize(), x)
    gate = g.fully_connected("gate", x, cfg.intermediate_size)
    up = g.fully_connected("up", x, cfg.intermediate_size)
    silu = g.add("silu", Mul(), gate, g.add("sigmoid", Logistic(), gate))
    return g.fully_connected("down", g.add("act", Mul(), silu, up), cfg.hidden_size)
