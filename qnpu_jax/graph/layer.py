"""One decoder layer, written like a forward function: norms, attention, the MLP.

Attention is staged per KV head, with the keys [prefix | cache | new], because NPU compilers refuse
the batched form at decode. Values are kept transposed, (N, K, S): CPU kernels pack the second
operand of a BATCH_MATMUL at every call, which is several times as fast where adj_y is set.

Letters: T tokens, S keys, D hidden, H heads, N KV heads, G = H/N, K head_dim, F intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

from qnpu_jax.config import ModelConfig
from qnpu_jax.graph.builder import Builder
from qnpu_jax.graph.graph import TensorSpec
from qnpu_jax.graph.norms import norm_after, norm_before, scaled_norm
from qnpu_jax.graph.ops import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
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
