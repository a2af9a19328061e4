"""Tiny decoders whose layers are of several kinds, and their definition in float64 NumPy, written
from transformers' modeling code: heads side by side, halves of the rotated channels, no folding."""

import functools
import math

import numpy as np
import tiny

from qnpu_jax import pipeline
from qnpu_jax.calibrate.ranges import calibrate_activations, weight_scales
from qnpu_jax.calibrate.statistics import collect_statistics
from qnpu_jax.config import LayerKind, ModelConfig, RopeScaling
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.graph.layered import Params
from qnpu_jax.graph.qparams import Scales
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.models.llama import ATTENTION, MLP
from qnpu_jax.transform.prefix import add_prefix

WINDOW = 6
YARN = RopeScaling("yarn", 4.0, original_max_positions=64, attention_factor=1.2, beta_fast=4.0)
LONG = RopeScaling("longrope", 4.0, attention_factor=1.3, divisors=(1.5, 3.0))
THREE = ModelConfig(
    family="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    kinds=(LayerKind(100.0, window=WINDOW), LayerKind(None), LayerKind(500.0, YARN)),
    kind_of_layer=(0, 1, 2, 0),
    biases=(*ATTENTION, *MLP),
)
"""A window, no positions, and scaled RoPE."""
PARTIAL = ModelConfig(
    family="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    kinds=(LayerKind(50.0, LONG), LayerKind(100.0, window=WINDOW)),
    kind_of_layer=(1, 0, 1),
    rotary_dim=4,
    double_norms=True,
)
"""Half of the channels rotate; the first layer is not of kind 0, no layer has biases, and norms are
taken twice."""
CONFIGS = {"three": THREE, "partial": PARTIAL}


def checkpoint(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights, as a loader would give them: heads attend sharply enough to be told apart."""
    rng = np.random.default_rng(0)
    d, f, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    q = config.num_heads * config.head_dim
    shapes = {"attn.q": (q, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, q)}
    shapes |= {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    out = {
        "embed.weight": rng.normal(0, 1, (config.vocab_size, d)),
        "head.weight": rng.normal(0, 0.5, (config.vocab_size, d)),
        "head.norm.gamma": rng.uniform(0.5, 1.5, d),
    }
    for norm in ("attn.norm", "mlp.norm"):
        out[f"layers.{norm}.gamma"] = rng.uniform(0.5, 1.5, (config.num_layers, d))
    for name, shape in shapes.items():
        gain = 2.0 if name in ("attn.q", "attn.k") else 1.0
        weight = rng.normal(0, gain / shape[1] ** 0.5, (config.num_layers, *shape))
        out[f"layers.{name}.weight"] = weight
        if name in config.biases:
            out[f"layers.{name}.bias"] = rng.normal(0, 0.2, (config.num_layers, shape[0]))
    return {name: x.astype(np.float32) for name, x in out.items()}


def frequencies(config: ModelConfig, kind: LayerKind) -> list[float]:
    """Angle per position of each rotated pair, by scalar arithmetic (modeling_rope_utils.py)."""
    assert kind.rope_theta is not None
    dim, base, s = config.rotated, kind.rope_theta, kind.rope_scaling
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if s is None:
        return plain
    if s.kind == "longrope":
        return [x / divisor for x, divisor in zip(plain, s.divisors, strict=True)]
    assert s.kind == "yarn"  # tests/graph/test_decoder.py defines the others
    low, high = (_correction(turns, dim, base, s) for turns in (s.beta_fast, s.beta_slow))
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramps = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
    return [x / s.factor * r + x * (1 - r) for x, r in zip(plain, ramps, strict=True)]


def _correction(turns: float, dim: int, base: float, s: RopeScaling) -> float:
    length = s.original_max_positions
    return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))


def logits(
    config: ModelConfig, params: dict[str, np.ndarray], ids: np.ndarray, prefix: int = 0
) -> np.ndarray:
    """Logits (T, V) of a checkpoint.

    The first `prefix` tokens stay visible whatever the window; transformers has none of these.
    """
    w = {name: x.astype(np.float64) for name, x in params.items()}
    x = w["embed.weight"][ids]
    for layer, index in enumerate(config.layer_kinds):
        own = {n.removeprefix("layers."): p[layer] for n, p in w.items() if n.startswith("layers.")}
        y = _norm(config, x, own["attn.norm.gamma"])
        x = x + _attention(config, config.kinds[index], own, y, prefix)
        y = _norm(config, x, own["mlp.norm.gamma"])
        gate = _linear(own, "mlp.gate", y)
        x = x + _linear(own, "mlp.down", gate / (1 + np.exp(-gate)) * _linear(own, "mlp.up", y))
    return _norm(config, x, w["head.norm.gamma"]) @ w["head.weight"].T


def _norm(config: ModelConfig, x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * gamma


def _linear(own: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0)


def _attention(
    config: ModelConfig, kind: LayerKind, own: dict[str, np.ndarray], x: np.ndarray, prefix: int
) -> np.ndarray:
    tokens, k = len(x), config.head_dim
    q, key, value = (_linear(own, f"attn.{n}", x).reshape(tokens, -1, k) for n in "qkv")
    q, key = (_rope(config, kind, y) for y in (q, key))
    at = np.arange(tokens)
    seen = at[None] <= at[:, None]
    if kind.window is not None:
        seen &= (at[None] > at[:, None] - kind.window) | (at[None] < prefix)
    heads = []
    for h in range(config.num_heads):
        kv = h // config.queries_per_kv_head
        scores = np.where(seen, q[:, h] @ key[:, kv].T * k**-0.5, -np.inf)
        probs = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(probs / probs.sum(axis=1, keepdims=True) @ value[:, kv])
    return _linear(own, "attn.o", np.concatenate(heads, axis=1))


def _rope(config: ModelConfig, kind: LayerKind, x: np.ndarray) -> np.ndarray:
    """x (T, heads, K): transformers' rotate_half on the first channels, the rest as they are."""
    if kind.rope_theta is None:
        return x
    factor = kind.rope_scaling.attention_factor if kind.rope_scaling else 1.0
    angle = np.arange(len(x))[:, None] * np.asarray(frequencies(config, kind))[None]
    cos, sin = (np.tile(f(angle), 2)[:, None] * factor for f in (np.cos, np.sin))
    turned, rest = x[..., : config.rotated], x[..., config.rotated :]
    left, right = np.split(turned, 2, axis=-1)
    swapped = np.concatenate([-right, left], axis=-1)
    return np.concatenate([turned * cos + swapped * sin, rest], axis=-1)


@functools.cache
def prepared(name: str, plan: str = "w8a8") -> Params:
    """Folded, rotated parameters of a model of CONFIGS."""
    config = CONFIGS[name]
    return pipeline.prepare(config, checkpoint(config), tiny.recipe(plan))


@functools.cache
def quantized(name: str, plan: str) -> IntegerModel:
    """A model of CONFIGS with a prefix, calibrated on random tokens and frozen."""
    config, plans = CONFIGS[name], tiny.PLANS[plan]
    params = add_prefix(config, plans, prepared(name), tiny.PREFIX)
    dec = decoder(config, plans, tiny.TOKENS, len(tiny.PREFIX))
    statistics = collect_statistics(dec, params, tiny.random_ids((4, tiny.TOKENS)))
    scales, _ = calibrate_activations(dec, statistics, "class", tame=True)
    free: Scales = scales | weight_scales(dec, params, "mse")
    return freeze(dec, params, free, tiny.PREFIX)
