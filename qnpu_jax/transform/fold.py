"""A checkpoint's gammas and factors folded into the parameters of the graph.

A norm's gamma goes into the linears that read it. Where none does (norms after a block, norms of
queries and keys), it stays a parameter of the graph, with the factors that the graph leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jax import Array
from numpy.typing import DTypeLike

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params
from qnpu_jax.transform.heads import head_order, head_scales

A = TypeVar("A", Array, np.ndarray)
"""Arrays of one kind throughout a call: NumPy float64 (merging) or JAX float32 (learning)."""

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""Linears of a layer."""
_ENDS = ("attn.o", "mlp.down")
"""Linears that end a block."""
HEAD_GAMMA = "head.norm.gamma"
TABLES = ("embed.weight", "head.weight")
CENTRE = "layers.attn.rope.k_centre"
_OPTIONAL = {"layers.attn.prefix_k", "layers.attn.prefix_v", CENTRE}
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


def offset_name(letter: str) -> str:
    """Parameter that holds the bias of q or k where the graph adds it at RoPE's width."""
    return f"layers.attn.rope.{letter}_offset"


def kept_gammas(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes, for one layer, of the gammas that stay parameters, by name in the layer graph."""
    shapes = {}
    for block in ("attn", "mlp") if not config.merges_r1 else ():
        for norm in ("norm", "post_norm")[config.norms == "after" :]:
            shapes[f"{block}.{norm}.gamma"] = (1, config.hidden_size)
    heads = {"q": config.num_heads, "k": config.num_kv_heads}
    for letter, count in heads.items():
        if config.qk_norm == "head":
            shapes[f"attn.{letter}_norm.gamma"] = (1, 1, config.head_dim)
        elif config.qk_norm == "all":
            shapes[f"attn.{letter}_norm.gamma"] = (1, count * config.head_dim)
    return shapes


def output_factors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes, for one layer, of the factors of what a norm after a block reads, by name in the
    layer graph."""
    blocks = ("attn", "mlp") if config.norms != "before" else ()
    return {f"{block}.post_norm.factor": (1, config.hidden_size) for block in blocks}


def check_folded(config: ModelConfig, params: Params) -> None:
    """Checks that these are the parameters of `fold_norms`, with or without the prefix's K and V
    and the centre of keys.

    Raises:
      UserError: a parameter is missing or unknown.
    """
    own = {f"layers.{name}.{suffix}" for name in LINEARS for suffix in ("weight", "bias")}
    own |= {f"layers.{name}" for name in (*kept_gammas(config), *output_factors(config))}
    own |= {offset_name(letter) for letter in config.late_biases}
    required = {*own, *TABLES, "head.bias", *({HEAD_GAMMA} if not config.merges_r1 else ())}
    _check_names(params, required, _OPTIONAL, "call `fold_norms` first")


def _check_checkpoint(config: ModelConfig, params: Params) -> None:
    required = {f"layers.{name}.weight" for name in LINEARS} | {"head.norm.gamma"}
    required |= {f"layers.{name}" for name in kept_gammas(config)}
    if config.norms != "after":
        required |= {f"layers.{block}.norm.gamma" for block in ("attn", "mlp")}
    required |= {"embed.weight"} if config.tie_embeddings else {"embed.weight", "head.weight"}
    way_out = "the checkpoint is of another model, or its loader misnames a tensor"
    _check_names(params, required, {f"layers.{name}.bias" for name in LINEARS}, way_out)


def fold_norms(
    config: ModelConfig,
    params: Params,
    dtype: DTypeLike = np.float32,
    *,
    consume: bool = False,
) -> dict[str, np.ndarray]:
    """Folds gammas and factors: W <- W diag(gamma sqrt(D)), and q's times the query scale too.

    The graph's norm is x / sqrt(sum(x^2) + D eps), which is RMSNorm without gamma divided by
    sqrt(D), and its scores are q k^T without a factor: the weights hold both. A gamma that no
    linear reads stays, times the sqrt of the channels that its norm goes over; that of queries
    holds the query scale. The residual scale is in what ends a block: `o` and `down`, or the gamma
    of the norm after it. The scale of embeddings is in their table alone, that of logits in the
    head alone, so that tied tables come apart. Rows of q and k are in `heads.rotary_order`.

    Args:
      params: a checkpoint: `embed.weight` (V, D), `layers.{attn,mlp}.norm.gamma` (L, D) of norms
        before blocks, `layers.{attn,mlp}.post_norm.gamma` (L, D) of norms after them,
        `layers.attn.{q,k}_norm.gamma` (L, K) or (L, heads K), `layers.attn.{q,k,v,o}.weight`,
        `layers.mlp.{gate,up,down}.weight` (L, out, in), any of their biases (L, out),
        `head.norm.gamma` (D,) and, where embeddings are not tied, `head.weight` (V, D).
      dtype: stored type; products are float64.
      consume: remove each tensor from `params`, a dict, once its result exists.

    Returns:
      Weights, the gammas that stay, and factors of 1 where norms follow blocks
      (`output_factors`), each of the shape that it has in the graph; `head.weight`
      also where embeddings are tied; a bias for every linear and the head, zero where the
      checkpoint has none. Biases in `config.late_biases` are not in their linears but in
      `layers.attn.rope.{q,k}_offset` (L, 1, heads, K), which the graph adds before RoPE.

    Raises:
      UserError: a parameter is missing or unknown.
    """
    _check_checkpoint(config, params)
    left: Any = params if consume else dict(params)
    out = _fold_head(config, left, dtype)
    out["embed.weight"] = _embedding(config, left.pop("embed.weight"), dtype)
    for name, shape in kept_gammas(config).items():
        gamma = _gamma(config, name, _real(left.pop(f"layers.{name}")))
        out[f"layers.{name}"] = gamma.astype(dtype).reshape(-1, *shape)
    for name, shape in output_factors(config).items():
        out[f"layers.{name}"] = np.ones((config.num_layers, *shape), dtype)
    gammas = {n: _real(left.pop(n)) for n in list(left) if n.endswith(".gamma")}
    for name in LINEARS:
        gamma = None if name in _ENDS else gammas.get(f"layers.{name.split('.')[0]}.norm.gamma")
        out |= _fold_linear(config, left, name, gamma, dtype)
    return out


def _fold_head(config: ModelConfig, left: Any, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """Parameters of the head, which are removed from `left`; a tied table stays there."""
    columns = _real(left.pop(HEAD_GAMMA)) * config.hidden_size**0.5
    kept = {}
    if not config.merges_r1:
        kept, columns = {HEAD_GAMMA: columns.astype(dtype)[None]}, np.ones(config.hidden_size)
    columns = columns * config.logits_scale
    table = left["embed.weight"] if config.tie_embeddings else left.pop("head.weight")
    weight = by_rows(table, lambda w: w * columns, dtype)
    return {**kept, "head.weight": weight, "head.bias": np.zeros(config.vocab_size, dtype)}


def _fold_linear(
    config: ModelConfig, left: Any, name: str, gamma: np.ndarray | None, dtype: DTypeLike
) -> dict[str, np.ndarray]:
    """Weight and bias of a linear of the layers, which are removed from `left`.

    Args:
      gamma: (L, D) of the norm before it, if there is one.
    """
    weight, bias = f"layers.{name}.weight", f"layers.{name}.bias"
    shape = np.shape(left[weight])
    columns = np.ones((config.num_layers, 1))
    if gamma is not None:
        columns = gamma * config.hidden_size**0.5
    scale, order = _linear_rows(config, name, shape[1])

    def scaled(i: int, w: np.ndarray) -> np.ndarray:
        return (w * (columns[i] * scale[i][:, None]))[order]

    own = left.pop(bias) if bias in left else np.zeros(shape[:2])
    folded = by_layer(own, lambda i, b: (b * scale[i])[order], dtype)
    out = {weight: by_layer(left.pop(weight), scaled, dtype), bias: folded}
    if (letter := name.removeprefix("attn.")) in config.late_biases:
        heads = (config.num_layers, 1, -1, config.head_dim)
        out |= {offset_name(letter): folded.reshape(heads), bias: np.zeros_like(folded)}
    return out


def _real(x: Array | np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _embedding(config: ModelConfig, table: Array | np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """The table times the scale of embeddings."""
    if config.embed_scale == 1:
        return np.asarray(table).astype(dtype)
    return by_rows(table, lambda w: w * config.embed_scale, dtype)


def _linear_rows(config: ModelConfig, name: str, out: int) -> tuple[np.ndarray, Any]:
    """Factors of a linear's rows, (L, out) or (L, 1), and their order."""
    scale, order = np.ones((config.num_layers, 1)), slice(None)
    if name in ("attn.q", "attn.k"):
        order = head_order(config, out)
    if name == "attn.q" and config.qk_norm is None:  # a norm that follows would erase it
        scale = head_scales(config, out)
    if name in _ENDS and config.norms == "before":
        scale = scale * config.residual_scale
    return scale, order


def _gamma(config: ModelConfig, name: str, gamma: np.ndarray) -> np.ndarray:
    """A gamma (L, channels) that stays: times the sqrt of its norm's channels, and times what a
    linear would have; those of heads in the heads' order."""
    channels = gamma.shape[1]
    gamma = gamma * channels**0.5
    if "post_norm" in name:
        return gamma * config.residual_scale
    if name not in ("attn.q_norm.gamma", "attn.k_norm.gamma"):
        return gamma
    if name == "attn.q_norm.gamma":
        gamma = gamma * head_scales(config, channels)
    return gamma[:, head_order(config, channels)]
