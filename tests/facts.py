"""Tiny models of every fact about norms, activation and factors, and a direct reference of them."""

import functools
from dataclasses import replace

import numpy as np
import tiny

from qnpu_jax import pipeline
from qnpu_jax.config import ModelConfig
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.recipes import RECIPES, Recipe
from qnpu_jax.text.windows import Windows
from qnpu_jax.transform.prefix_search import Starts

BASE = ModelConfig(
    family="facts", vocab_size=96, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_positions=64,
)  # fmt: skip
FACTS: dict[str, ModelConfig] = {
    "gelu": replace(BASE, activation="gelu_tanh"),
    "after, qk all": replace(BASE, norms="after", qk_norm="all", tie_embeddings=True),
    "both, qk head, gelu": replace(
        BASE, norms="both", qk_norm="head", activation="gelu_tanh", query_scale=0.5,
        embed_scale=24**0.5, tie_embeddings=True,
    ),
    "qk head": replace(BASE, qk_norm="head", biases=("attn.q", "attn.k", "attn.v")),
    "multipliers": replace(
        BASE, embed_scale=12.0, residual_scale=0.22, logits_scale=0.125, query_scale=0.0156,
        biases=("attn.o", "mlp.down"), tie_embeddings=True,
    ),
    "both, residual scale": replace(BASE, norms="both", residual_scale=0.5),
}  # fmt: skip
"""By their names: OLMo-2 is `after, qk all`, Gemma 3 `both, qk head, gelu`, Qwen3 `qk head`,
Granite `multipliers`."""

TEXT = tiny.random_ids((6, tiny.TOKENS))
"""Windows that models are calibrated on."""


def checkpoint(config: ModelConfig, seed: int = 7) -> dict[str, np.ndarray]:
    """Random float64 parameters of a checkpoint."""
    rng = np.random.default_rng(seed)
    d, f, layers, k = (
        config.hidden_size, config.intermediate_size, config.num_layers, config.head_dim
    )  # fmt: skip
    h, kv = config.num_heads * k, config.num_kv_heads * k
    shapes = {"attn.q": (h, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, h)}
    shapes |= {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    params = {f"layers.{n}.weight": rng.normal(0, 0.3, (layers, *s)) for n, s in shapes.items()}
    params |= {
        f"layers.{n}.bias": rng.normal(0, 0.5, (layers, shapes[n][0])) for n in config.biases
    }
    gammas = {}
    if config.norms != "after":
        gammas |= {"attn.norm": d, "mlp.norm": d}
    if config.norms != "before":
        gammas |= {"attn.post_norm": d, "mlp.post_norm": d}
    if config.qk_norm is not None:
        head = config.qk_norm == "head"
        gammas |= {"attn.q_norm": k if head else h, "attn.k_norm": k if head else kv}
    params |= {f"layers.{n}.gamma": rng.uniform(0.2, 2, (layers, w)) for n, w in gammas.items()}
    params["head.norm.gamma"] = rng.uniform(0.2, 2, d)
    params["embed.weight"] = rng.normal(0, 1, (config.vocab_size, d))
    if not config.tie_embeddings:
        params["head.weight"] = rng.normal(0, 0.3, (config.vocab_size, d))
    return params


def rms(x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    return gamma * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def rotary(x: np.ndarray, theta: float) -> np.ndarray:
    """Half-split rotary embedding; x (T, heads, K)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] / theta ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def attention(config: ModelConfig, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    t, k, eps = len(x), config.head_dim, config.rms_norm_eps

    def heads(name: str, normed: bool) -> np.ndarray:
        y = x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)
        if normed and config.qk_norm == "all":
            y = rms(y, p[f"{name}_norm.gamma"], eps)
        y = y.reshape(t, -1, k)
        return rms(y, p[f"{name}_norm.gamma"], eps) if normed and config.qk_norm == "head" else y

    theta = config.kinds[0].rope_theta
    assert theta is not None
    q, key = (rotary(heads(f"attn.{n}", True), theta) for n in "qk")
    key, value = (
        np.repeat(y, config.queries_per_kv_head, 1) for y in (key, heads("attn.v", False))
    )
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    scores = np.einsum("thk,shk->hts", q, key) * scale + np.triu(np.full((t, t), -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shk->thk", weights, value).reshape(t, -1)
    return mixed @ p["attn.o.weight"].T + p.get("attn.o.bias", 0)


def mlp(config: ModelConfig, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    gate, up = (x @ p[f"mlp.{n}.weight"].T + p.get(f"mlp.{n}.bias", 0) for n in ("gate", "up"))
    if config.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = gate / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return gate * up @ p["mlp.down.weight"].T + p.get("mlp.down.bias", 0)


def reference(config: ModelConfig, params: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits (T, V) of a checkpoint in float64, straight from its facts."""
    eps, x = config.rms_norm_eps, params["embed.weight"][ids] * config.embed_scale
    for i in range(config.num_layers):
        p = {n.removeprefix("layers."): w[i] for n, w in params.items() if n.startswith("layers.")}
        for block, run in (("attn", attention), ("mlp", mlp)):
            y = x if config.norms == "after" else rms(x, p[f"{block}.norm.gamma"], eps)
            y = run(config, p, y)
            y = y if config.norms == "before" else rms(y, p[f"{block}.post_norm.gamma"], eps)
            x = x + y * config.residual_scale
    head = params["embed.weight" if config.tie_embeddings else "head.weight"]
    return rms(x, params["head.norm.gamma"], eps) @ head.T * config.logits_scale


def as_checkpoint(
    config: ModelConfig, folded: dict[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The graph's parameters as those of a checkpoint without factors, where norms that the graph
    has no gamma of have D^-1/2: what the graph computes, read by `reference` in float64."""
    d, layers = config.hidden_size, config.num_layers
    plain = replace(
        config, query_scale=1.0, embed_scale=1.0, residual_scale=1.0, logits_scale=1.0,
        tie_embeddings=False,
    )  # fmt: skip
    own = (".gamma", ".factor", "head.bias")
    params = {n: x for n, x in folded.items() if not n.endswith(own)}
    for block, end in (("attn", "o"), ("mlp", "down")) if config.norms != "before" else ():
        factor = folded[f"layers.{block}.post_norm.factor"].reshape(layers, d)
        for n, x in ((f"layers.{block}.{end}.{s}", s) for s in ("weight", "bias")):
            params[n] = folded[n] * (factor[..., None] if x == "weight" else factor)
    for name in (n for n in folded if n.endswith(".gamma")):
        gamma = folded[name]
        stacked = (layers, -1) if name.startswith("layers.") else -1
        params[name] = gamma.reshape(stacked) / gamma.shape[-1] ** 0.5
    if config.norms == "before":
        params |= {f"layers.{b}.norm.gamma": np.full((layers, d), d**-0.5) for b in ("attn", "mlp")}
        params["head.norm.gamma"] = np.full(d, d**-0.5)
    return plain, params


def recipe(plan: str) -> Recipe:
    """Rotated, without a prefix."""
    return replace(RECIPES[plan], prefix="none")


@functools.cache
def quantized(fact: str, plan: str) -> IntegerModel:
    """Calibrated on random tokens, with nothing learned."""
    config = FACTS[fact]
    params = pipeline.prepare(config, checkpoint(config), recipe(plan))
    return pipeline.quantize(config, params, recipe(plan), Windows.of(TEXT), Starts()).model
