"""What scores and RoPE need of a head's channels: factors, and an order.

The graph's RoPE turns channel i with channel i + K/2, by tables in [-1, 1]. A checkpoint that
rotates its first R channels turns i with i + R/2: `rotary_order` moves the channels of q and k, the
same way in both, which changes no score. What a score is multiplied by is in q (`score_scale`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError


def score_scale(config: ModelConfig, layer: int) -> Float64[np.ndarray, " K"]:
    """Factors of the channels of a query head in one layer, as the checkpoint orders them.

    All have the factor of the scores, K^-1/2 or `query_scale`. Those that rotate have f^2 too, f
    the attention factor that yarn and longrope multiply cos and sin by, in queries and in keys.
    """
    kind = config.kinds[config.layer_kinds[layer]]
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    out = np.full(config.head_dim, scale)
    if kind.rope_theta is not None and kind.rope_scaling is not None:
        out[: config.rotated] *= kind.rope_scaling.attention_factor**2
    return out


def rotary_order(config: ModelConfig) -> Int[np.ndarray, " K"]:
    """Channels of a head of q or k in the order that the graph's RoPE needs.

    Of the R that rotate, the first half goes to the front and the second half to K/2.

    Raises:
      UserError: R or K is odd.

    >>> from qnpu_jax.config import ModelConfig
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    >>> config = ModelConfig("", **sizes, num_kv_heads=1, head_dim=8, max_positions=8, rotary_dim=4)
    >>> rotary_order(config).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    if config.rotated % 2 or config.head_dim % 2:
        raise UserError(
            f"rotary_dim: {config.rotated} of {config.head_dim} channels; expected even numbers,"
            " because RoPE turns pairs; check the model's config"
        )
    turned, rest = np.split(np.arange(config.head_dim), [config.rotated])
    parts = zip(np.split(turned, 2), np.split(rest, 2), strict=True)
    return np.concatenate([x for part in parts for x in part])


def head_order(config: ModelConfig, channels: int) -> Int[np.ndarray, " channels"]:
    """`rotary_order` within every head of so many channels."""
    return np.arange(channels).reshape(-1, config.head_dim)[:, rotary_order(config)].ravel()


def head_scales(config: ModelConfig, channels: int) -> Float64[np.ndarray, "L channels"]:
    """`score_scale` of every layer, for every head of so many channels."""
    of_layers = np.stack([score_scale(config, i) for i in range(config.num_layers)])
    return np.tile(of_layers, channels // config.head_dim)
