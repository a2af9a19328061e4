"""Inputs that all layers share: RoPE tables, the attention mask, the epsilon of norms."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Integer

from qnpu_jax.config import LayerKind, ModelConfig
from qnpu_jax.graph.decoder import MASK, MASK_CODE, Decoder, normed_width


def rope_frequencies(cfg: ModelConfig, kind: LayerKind) -> Float64[np.ndarray, " half"]:
    """Rotary angles per position, (K/2,) float64: theta^(-2i/K), scaled as the config says.

    Linear scaling divides every frequency by its factor. llama3 scaling divides low frequencies
    only, and blends between `low_freq_factor` and `high_freq_factor`.

    Reference: transformers/modeling_rope_utils.py, `_compute_linear_scaling_rope_parameters`,
    `_compute_llama3_parameters`.
    """
    if kind.rope_theta is None:
        return np.zeros(cfg.rotated // 2)
    exponent = np.arange(0, cfg.rotated, 2, dtype=np.float64) / cfg.rotated
    frequency = kind.rope_theta**-exponent
    scaling = kind.rope_scaling
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
    cfg: ModelConfig, kind: LayerKind, positions: Int[np.ndarray, " t"]
) -> tuple[Float32[np.ndarray, "t 1 k"], Float32[np.ndarray, "t 1 k"]]:
    """RoPE tables cos and signed sin of the positions, (T, 1, K) float32.

    The first half of sin is negative, so that RoPE is x cos + swap(x) sin.
    """
    angle = positions[:, None] * rope_frequencies(cfg, kind)[None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    cos = np.concatenate([cos, cos], axis=1)[:, None, :]
    sin = np.concatenate([-sin, sin], axis=1)[:, None, :]
    return cos.astype(np.float32), sin.astype(np.float32)


def visible(
    tokens: int, prefix: int = 0, cache: int = 0, filled: int = 0
) -> Bool[np.ndarray, "t s"]:
    """Causal visibility of keys, (T, S) bool.

    Keys are [prefix | cache | new]. A token sees the whole prefix, the first `filled` cache slots,
    and new keys up to its own.

    >>> visible(2, prefix=1).astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    seen = np.zeros((tokens, prefix + cache + tokens), dtype=bool)
    seen[:, : prefix + filled] = True
    seen[:, prefix + cache :] = np.tril(np.ones((tokens, tokens), dtype=bool))
    return seen


def masks(seen: Bool[np.ndarray, "t s"], groups: int) -> dict[str, Float32[np.ndarray, "1 r s"]]:
    """Real values of the inputs `mask` and `keep`, (1, T G, S) float32.

    `mask` is added to scores: 0 where a key is seen, MASK elsewhere. `keep` multiplies
    probabilities: 1 and 0. Rows repeat for each of the G query heads of a KV head.

    Args:
      seen: from `visible`.
      groups: G.
    """
    rows = np.repeat(seen, groups, axis=0)[None]
    mask = np.where(rows, np.float32(0), np.float32(MASK))
    return {"mask": mask, "keep": rows.astype(np.float32)}


def mask_codes(mask: Float32[np.ndarray, "*shape"], bits: int) -> Integer[np.ndarray, "*shape"]:
    """Integer codes of `mask`, int8 or int16: 0 where a key is seen, MASK_CODE elsewhere."""
    codes = np.where(mask == 0, 0, MASK_CODE[bits])
    return codes.astype(np.int8 if bits == 8 else np.int16)


def layer_inputs(dec: Decoder, filled: int = 0) -> dict[str, np.ndarray]:
    """Real values (float32) of the inputs that all layers share, by local name.

    Args:
      filled: cache slots that hold keys; new positions follow them.
    """
    start = dec.prefix + filled
    cos, sin = rope_tables(dec.config, dec.config.kinds[0], np.arange(start, start + dec.tokens))
    cfg = dec.config
    widths = {
        "norm.eps": cfg.hidden_size,
        "q_norm.eps": normed_width(cfg, cfg.num_heads),
        "k_norm.eps": normed_width(cfg, cfg.num_kv_heads),
    }
    eps = {n: np.full((1, 1, 1), w * cfg.rms_norm_eps, np.float32) for n, w in widths.items()}
    seen = visible(dec.tokens, dec.prefix, dec.cache, filled)
    every = {"rope.cos": cos, "rope.sin": sin, **eps}
    every |= masks(seen, cfg.queries_per_kv_head)
    named = {t.name for t in dec.layer.named("input")}
    return {name: x for name, x in every.items() if name in named}
