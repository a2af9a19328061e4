"""Inputs that layers share: RoPE tables, the attention mask, the epsilon of norms."""

from __future__ import annotations

from typing import assert_never

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Integer

from qnpu_jax.config import LayerKind, ModelConfig, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import MASK, MASK_CODE, Decoder, normed_width
from qnpu_jax.graph.shared_names import shared_name


def rope_frequencies(cfg: ModelConfig, kind: LayerKind) -> Float64[np.ndarray, " half"]:
    """Rotary angles per position of each pair of channels, (K/2,) float64.

    With R rotated channels, pair i < R/2 has theta^(-2i/R), scaled as the kind says; the others
    have 0, and so have all in layers without positions (NoPE). A frequency of 0 leaves a pair as it
    is: cos 1, sin 0. `transform.fold` moves the two channels of a pair K/2 apart.

    Reference: transformers/modeling_rope_utils.py.
    """
    if kind.rope_theta is None:
        return np.zeros(cfg.head_dim // 2)
    exponent = np.arange(0, cfg.rotated, 2, dtype=np.float64) / cfg.rotated
    frequency = _scaled(kind.rope_theta, kind.rope_scaling, kind.rope_theta**-exponent)
    return np.pad(frequency, (0, (cfg.head_dim - cfg.rotated) // 2))


def _scaled(
    theta: float, scaling: RopeScaling | None, frequency: Float64[np.ndarray, " pairs"]
) -> Float64[np.ndarray, " pairs"]:
    """Scales frequencies, the highest first.

    Linear scaling divides every frequency by its factor. llama3 and yarn divide low ones only, and
    blend: llama3 by wavelength, yarn by index. longrope divides each by a divisor of its own.

    Reference: `_compute_linear_scaling_rope_parameters`, `_compute_llama3_parameters`,
    `_compute_yarn_parameters`, `_compute_longrope_parameters`.
    """
    if scaling is None:
        return frequency
    match scaling.kind:
        case "linear":
            return frequency / scaling.factor
        case "llama3":
            wavelength = 2 * np.pi / frequency
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            blend = (scaling.original_max_positions / wavelength - low) / (high - low)
            blend = np.clip(blend, 0.0, 1.0)
        case "yarn":
            blend = 1 - _yarn_ramp(theta, scaling, len(frequency))
        case "longrope":
            if len(scaling.divisors) != len(frequency):
                raise UserError(
                    f"rope_scaling: {len(scaling.divisors)} divisors for {len(frequency)}"
                    " frequencies; expected one for each; check the model's long_factor and"
                    " short_factor"
                )
            return frequency / np.asarray(scaling.divisors, np.float64)
        case _:
            assert_never(scaling.kind)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn_ramp(theta: float, scaling: RopeScaling, pairs: int) -> Float64[np.ndarray, " pairs"]:
    """Share of each frequency that yarn divides by its factor: 0 to 1, rising with the index.

    The ramp begins at the pair that turns `beta_fast` times in the original context, and ends at
    the one that turns `beta_slow` times.
    """

    def index(turns: float) -> float:
        return pairs * np.log(scaling.original_max_positions / (turns * 2 * np.pi)) / np.log(theta)

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    if low == high:
        high += 0.001  # as the reference does
    return np.clip((np.arange(pairs) - low) / (high - low), 0.0, 1.0)


def rope_tables(
    cfg: ModelConfig, kind: LayerKind, positions: Int[np.ndarray, " t"]
) -> tuple[Float32[np.ndarray, "t 1 k"], Float32[np.ndarray, "t 1 k"]]:
    """RoPE tables cos and signed sin of the positions, (T, 1, K) float32.

    The first half of sin is negative, so that RoPE is x cos + swap(x) sin. The attention factor of
    yarn and longrope is not in them but in the queries (`fold.score_scale`): tables hold [-1, 1].
    """
    angle = positions[:, None] * rope_frequencies(cfg, kind)[None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    cos = np.concatenate([cos, cos], axis=1)[:, None, :]
    sin = np.concatenate([-sin, sin], axis=1)[:, None, :]
    return cos.astype(np.float32), sin.astype(np.float32)


def visible(
    tokens: int, prefix: int = 0, cache: int = 0, filled: int = 0, window: int | None = None
) -> Bool[np.ndarray, "t s"]:
    """Causal visibility of keys, (T, S) bool.

    Keys are [prefix | cache | new]. A token sees the whole prefix, the first `filled` cache slots,
    and new keys up to its own; with a window, of slots and new keys the last `window` only, its own
    included.

    >>> visible(2, prefix=1).astype(int).tolist()
    [[1, 1, 0], [1, 1, 1]]
    >>> visible(3, prefix=1, window=2).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    seen = np.zeros((tokens, prefix + cache + tokens), dtype=bool)
    seen[:, : prefix + filled] = True
    seen[:, prefix + cache :] = np.tril(np.ones((tokens, tokens), dtype=bool))
    if window is not None:
        query = filled + np.arange(tokens)
        key = np.concatenate([np.arange(cache), query])
        seen[:, prefix:] &= query[:, None] - key[None, :] < window
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


def layer_inputs(dec: Decoder, filled: int = 0, held: int | None = None) -> dict[str, np.ndarray]:
    """Real values (float32) of the inputs that layers share, by shared name (`shared_names`).

    Args:
      filled: cache slots that hold keys; new positions follow them.
      held: places of the prefix that hold tokens, the first ones; None for all.
    """
    cfg, held = dec.config, dec.prefix if held is None else held
    positions = held + filled + np.arange(dec.tokens)
    widths = {
        "norm.eps": cfg.hidden_size,
        "q_norm.eps": normed_width(cfg, cfg.num_heads),
        "k_norm.eps": normed_width(cfg, cfg.num_kv_heads),
    }
    eps = {n: np.full((1, 1, 1), w * cfg.rms_norm_eps, np.float32) for n, w in widths.items()}
    of_kind: dict[int, dict[str, np.ndarray]] = {}
    for index in dict.fromkeys(cfg.layer_kinds):
        kind = cfg.kinds[index]
        cos, sin = rope_tables(cfg, kind, positions)
        seen = visible(dec.tokens, dec.prefix, dec.cache, filled, kind.window)
        seen[:, held : dec.prefix] = False
        of_kind[index] = {"rope.cos": cos, "rope.sin": sin, **eps}
        of_kind[index] |= masks(seen, cfg.queries_per_kv_head)
    named = {t.name for t in dec.layer.named("input")}
    found: dict[str, np.ndarray] = {}
    for layer, index in enumerate(cfg.layer_kinds):
        for name, x in of_kind[index].items():
            if name in named:
                found.setdefault(shared_name(dec, dec.layer, name, layer), x)
    return found | {shared_name(dec, dec.head, "norm.eps", 0): eps["norm.eps"]}
