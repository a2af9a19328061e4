"""Inputs that all layers share: RoPE tables, the attention mask, the epsilon of norms."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int

from qnpu_jax.config import ModelConfig
from qnpu_jax.graph.decoder import MASK, Decoder


def rope_frequencies(cfg: ModelConfig) -> Float64[np.ndarray, " half"]:
    """Angles per position, (K/2,) float64, with linear or llama3 scaling.

    Reference: transformers/modeling_rope_utils.py, `_compute_linear_scaling_rope_parameters`,
    `_compute_llama3_parameters`.
    """
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim
    frequency = cfg.rope_theta**-exponent
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * np.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_positions / wavelength - low) / (high - low)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rope_tables(
    cfg: ModelConfig, positions: Int[np.ndarray, " t"]
) -> tuple[Float32[np.ndarray, "t 1 k"], Float32[np.ndarray, "t 1 k"]]:
    """cos and signed sin for the positions, (T, 1, K) float32; the first half of sin is
    negative."""
    angle = positions[:, None] * rope_frequencies(cfg)[None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    cos = np.concatenate([cos, cos], axis=1)[:, None, :]
    sin = np.concatenate([-sin, sin], axis=1)[:, None, :]
    return cos.astype(np.float32), sin.astype(np.float32)


def visible(
    tokens: int, prefix: int = 0, cache: int = 0, filled: int = 0
) -> Bool[np.ndarray, "t s"]:
    """Where a token may look: keys are [prefix | cache | new], of which the whole prefix, the first
    `filled` cache slots and new keys up to the token's own are visible."""
    seen = np.zeros((tokens, prefix + cache + tokens), dtype=bool)
    seen[:, : prefix + filled] = True
    seen[:, prefix + cache :] = np.tril(np.ones((tokens, tokens), dtype=bool))
    return seen


def masks(
    seen: Bool[np.ndarray, "t s"], groups: int, bits: int
) -> dict[str, Float32[np.ndarray, "1 r s"]]:
    """Of what is `visible`: `mask`, which is added to scores, 0 there and MASK elsewhere; `keep`,
    which probabilities are multiplied by, 1 and 0. (1, T G, S), a row for each of G query heads.

    Args:
      bits: of the mask.
    """
    rows = np.repeat(seen, groups, axis=0)[None]
    mask = np.where(rows, np.float32(0), np.float32(MASK[bits]))
    return {"mask": mask, "keep": rows.astype(np.float32)}


def layer_inputs(dec: Decoder, filled: int = 0) -> dict[str, np.ndarray]:
    """Values of the inputs that all layers share, by local name, in real numbers (float32)."""
    start = dec.prefix + filled
    cos, sin = rope_tables(dec.config, np.arange(start, start + dec.tokens))
    eps = np.full((1, 1, 1), dec.config.hidden_size * dec.config.rms_norm_eps, np.float32)
    seen = visible(dec.tokens, dec.prefix, dec.cache, filled)
    every = {"rope.cos": cos, "rope.sin": sin, "norm.eps": eps}
    every |= masks(seen, dec.config.queries_per_kv_head, dec.layer["mask"].quant.bits[0])
    named = {t.name for t in dec.layer.named("input")}
    return {name: x for name, x in every.items() if name in named}
