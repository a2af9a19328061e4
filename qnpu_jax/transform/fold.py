"""Norm gammas folded into the linears that follow them, and what RoPE and scores need of q and k.

The graph's RoPE turns channel i with channel i + K/2, by tables in [-1, 1]. A checkpoint that
rotates its first R channels turns i with i + R/2: `rotary_order` moves the channels of q and k, the
same way in both, which changes no score. What a score is multiplied by is in q (`score_scale`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from jax import Array
from jaxtyping import Float64, Int
from numpy.typing import DTypeLike

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params

A = TypeVar("A", Array, np.ndarray)
"""Arrays of one kind throughout a call: NumPy float64 (merging) or JAX float32 (learning)."""

_LINEARS = {
    "layers.attn.q": "layers.attn.norm",
    "layers.attn.k": "layers.attn.norm",
    "layers.attn.v": "layers.attn.norm",
    "layers.attn.o": None,
    "layers.mlp.gate": "layers.mlp.norm",
    "layers.mlp.up": "layers.mlp.norm",
    "layers.mlp.down": None,
}
"""Each linear of a layer, with the norm whose gamma scales its input."""
_NORMS = ("layers.attn.norm", "layers.mlp.norm", "head.norm")
TABLES = ("embed.weight", "head.weight")
_PREFIX = ("layers.attn.prefix_k", "layers.attn.prefix_v")
_ROWS = 8192
"""Rows of the embedding and the head that are float64 at a time."""


def by_layer(
    stack: Array | np.ndarray, merge: Callable[[int, np.ndarray], np.ndarray], dtype: DTypeLike
) -> np.ndarray:
    """Computes merge(i, stack[i]) for every layer i, in float64.

    Args:
      stack: (L, ..).
      merge: keeps the shape.
      dtype: stored type.
    """
    source = np.asarray(stack)
    out = np.empty(source.shape, dtype)
    for i, x in enumerate(source):
        out[i] = merge(i, x.astype(np.float64))
    return out


def by_rows(
    table: Array | np.ndarray, merge: Callable[[np.ndarray], np.ndarray], dtype: DTypeLike
) -> np.ndarray:
    """Computes merge(rows) for blocks of rows of a (V, D) table, in float64.

    Args:
      merge: keeps the shape.
      dtype: stored type.
    """
    source = np.asarray(table)
    out = np.empty(source.shape, dtype)
    for i in range(0, len(source), _ROWS):
        out[i : i + _ROWS] = merge(source[i : i + _ROWS].astype(np.float64))
    return out


def _check_names(params: Params, required: set[str], optional: set[str], way_out: str) -> None:
    """Raises UserError for a missing or unknown parameter: one left out changes the logits."""
    if missing := required - params.keys():
        raise UserError(f"{min(missing)}: missing; expected {sorted(required)}; {way_out}")
    if unknown := params.keys() - required - optional:
        raise UserError(
            f"{min(unknown)}: not expected; expected {sorted(required | optional)}; {way_out}"
        )


def check_folded(params: Params) -> None:
    """Checks that these are the parameters of `fold_norms`, with or without prefix K/V.

    Raises:
      UserError: a parameter is missing or unknown.
    """
    linears = {f"{name}.{suffix}" for name in _LINEARS for suffix in ("weight", "bias")}
    required = {*linears, *TABLES, "head.bias"}
    _check_names(params, required, set(_PREFIX), "call `fold_norms` first")


def _check_checkpoint(config: ModelConfig, params: Params) -> None:
    required = {f"{name}.weight" for name in _LINEARS} | {f"{norm}.gamma" for norm in _NORMS}
    required |= {"embed.weight"} if config.tie_embeddings else {"embed.weight", "head.weight"}
    way_out = "this is no Llama checkpoint, or its loader misnames a tensor"
    _check_names(params, required, {f"{name}.bias" for name in _LINEARS}, way_out)


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


class _Rows(NamedTuple):
    """Factors of the rows of a linear, (L, out) or (L, 1), and their order."""

    scale: np.ndarray
    order: np.ndarray | slice


def _rows(config: ModelConfig, name: str, out: int) -> _Rows:
    scale, order = np.ones((config.num_layers, 1)), slice(None)
    if name in ("layers.attn.q", "layers.attn.k"):
        order = np.arange(out).reshape(-1, config.head_dim)[:, rotary_order(config)].ravel()
    if name == "layers.attn.q":
        of_layers = [score_scale(config, i) for i in range(config.num_layers)]
        scale = np.tile(np.stack(of_layers), config.num_heads)
    return _Rows(scale, order)


def _scaled_rows(i: int, w: np.ndarray, columns: np.ndarray, rows: _Rows) -> np.ndarray:
    """W diag(columns), its rows times their factors and in their order, in layer i."""
    return (w * (columns[i] * rows.scale[i][:, None]))[rows.order]


def fold_norms(
    config: ModelConfig, params: Params, dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """Folds norms into weights: W <- W diag(gamma sqrt(D)), and q's rows times `score_scale` too.

    The graph's norm is x / sqrt(sum(x^2) + D eps), which is RMSNorm without gamma divided by
    sqrt(D), and its scores are q k^T without the factor K^-1/2: the weights hold both factors. Rows
    of q and k are in `rotary_order`.

    Args:
      params: a checkpoint: `embed.weight` (V, D), `layers.{attn,mlp}.norm.gamma` (L, D),
        `layers.attn.{q,k,v,o}.weight`, `layers.mlp.{gate,up,down}.weight` (L, out, in), any of
        their biases (L, out), `head.norm.gamma` (D,) and, where embeddings are not tied,
        `head.weight` (V, D).
      dtype: stored type; products are float64.

    Returns:
      Weights without gammas; `head.weight` also where embeddings are tied; a bias for every linear
      and the head, zero where the checkpoint has none.

    Raises:
      UserError: a parameter is missing or unknown.
    """
    _check_checkpoint(config, params)
    gamma = {
        norm: np.asarray(params[f"{norm}.gamma"]).astype(np.float64) * config.hidden_size**0.5
        for norm in _NORMS
    }
    out = {"embed.weight": np.asarray(params["embed.weight"]).astype(dtype)}
    for name, norm in _LINEARS.items():
        columns = np.ones((config.num_layers, 1)) if norm is None else gamma[norm]
        weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
        rows = _rows(config, name, weight.shape[1])
        scaled = partial(_scaled_rows, columns=columns, rows=rows)
        out[f"{name}.weight"] = by_layer(weight, scaled, dtype)
        bias = np.zeros(weight.shape[:2]) if bias is None else bias
        out[f"{name}.bias"] = by_layer(bias, lambda i, b, r=rows: (b * r.scale[i])[r.order], dtype)
    head = params["embed.weight" if config.tie_embeddings else "head.weight"]
    out["head.weight"] = by_rows(head, lambda w: w * gamma["head.norm"], dtype)
    out["head.bias"] = np.zeros(config.vocab_size, dtype)
    return out
