"""A decoder in plain NumPy, from a checkpoint's facts and parameters as loaded: nothing is folded.

It shares no code with the graph, so what a loader reads is checked before any graph is.
"""

import math

import numpy as np

from qnpu_jax.config import LayerKind, ModelConfig


def forward(cfg: ModelConfig, params: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Computes float64 logits (T, V) of token ids (T,)."""
    p = {name: x.astype(np.float64) for name, x in params.items()}
    x = p["embed.weight"][tokens] * cfg.embed_scale
    for i, kind in enumerate(cfg.kinds[k] for k in cfg.layer_kinds):
        layer = {n.removeprefix("layers."): y[i] for n, y in p.items() if n.startswith("layers.")}
        for block, run in (("attn", attention), ("mlp", mlp)):
            h = x
            if cfg.norms != "after":
                h = norm(cfg, h, layer[f"{block}.norm.gamma"])
            h = run(cfg, layer, h, kind)
            if cfg.norms != "before":
                h = norm(cfg, h, layer[f"{block}.post_norm.gamma"])
            x = x + cfg.residual_scale * h
    head = p["embed.weight" if cfg.tie_embeddings else "head.weight"]
    return norm(cfg, x, p["head.norm.gamma"]) @ head.T * cfg.logits_scale


def norm(cfg: ModelConfig, x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.rms_norm_eps) * gamma


def linear(layer: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0.0)


def mlp(cfg: ModelConfig, layer: dict[str, np.ndarray], x: np.ndarray, _: LayerKind) -> np.ndarray:
    gate = linear(layer, "mlp.gate", x)
    if cfg.activation == "silu":
        gate = gate / (1.0 + np.exp(-gate))
    else:
        cubic = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
        gate = 0.5 * gate * (1.0 + np.tanh(cubic))
    return linear(layer, "mlp.down", gate * linear(layer, "mlp.up", x))


def attention(
    cfg: ModelConfig, layer: dict[str, np.ndarray], x: np.ndarray, kind: LayerKind
) -> np.ndarray:
    q, k, v = (linear(layer, f"attn.{n}", x) for n in "qkv")
    if cfg.qk_norm == "all":
        q, k = (norm(cfg, y, layer[f"attn.{n}_norm.gamma"]) for n, y in (("q", q), ("k", k)))
    q, k, v = (y.reshape(len(x), -1, cfg.head_dim).swapaxes(0, 1) for y in (q, k, v))
    if cfg.qk_norm == "head":
        q, k = (norm(cfg, y, layer[f"attn.{n}_norm.gamma"]) for n, y in (("q", q), ("k", k)))
    q, k = rotate(cfg, kind, q), rotate(cfg, kind, k)
    k, v = (np.repeat(y, cfg.queries_per_kv_head, axis=0) for y in (k, v))
    scores = q @ k.swapaxes(1, 2) * (cfg.query_scale or cfg.head_dim**-0.5)
    back = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
    visible = (back >= 0) & (back < (kind.window or len(x)))
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return linear(layer, "attn.o", out.swapaxes(0, 1).reshape(len(x), -1))


def rotate(cfg: ModelConfig, kind: LayerKind, x: np.ndarray) -> np.ndarray:
    """Rotates the first channels of each head, (i, i + R/2) as a pair; x is (N, T, K)."""
    if kind.rope_theta is None:
        return x
    size = cfg.rotated
    angles = np.outer(np.arange(x.shape[1]), frequencies(kind, size))
    factor = kind.rope_scaling.attention_factor if kind.rope_scaling else 1.0
    cos, sin = np.cos(angles) * factor, np.sin(angles) * factor
    a, b, rest = x[..., : size // 2], x[..., size // 2 : size], x[..., size:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def frequencies(kind: LayerKind, size: int) -> np.ndarray:
    assert kind.rope_theta is not None
    f, s = kind.rope_theta ** -(np.arange(0, size, 2) / size), kind.rope_scaling
    if s is None:
        return f
    match s.kind:
        case "linear":
            return f / s.factor
        case "longrope":
            return f / s.divisors
        case "llama3":
            turns = s.original_max_positions * f / (2 * math.pi)
            low, high = s.low_freq_factor, s.high_freq_factor
            keep = np.clip((turns - low) / (high - low), 0, 1)
        case "yarn":
            turns = [
                s.original_max_positions / (b * 2 * math.pi) for b in (s.beta_fast, s.beta_slow)
            ]
            low, high = (size * math.log(t) / (2 * math.log(kind.rope_theta)) for t in turns)
            if s.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, size - 1)
            keep = 1 - np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
    return f * (keep + (1 - keep) / s.factor)
