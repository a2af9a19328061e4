"""Diagonal scales that merge into the weights: same function, channels of more equal range.

Where only channelwise or linear steps lie between two linears, a channel can be multiplied by a
factor in the first and divided by it in the second. Per-tensor quantization then gives every
channel more codes, and the weights that take the factor fewer:

  up -> down  up' = D up, down' = down D^-1
  v -> o      v' = D v, o' = o D^-1, for each KV head; every query head of it mixes the same values
  k, q        k' = D k, q' = D^-1 q, with D_i = D_{i+K/2}: RoPE turns each such pair, and commutes;
              where queries and keys are normed, D is in the gammas, since a norm erases it before
  gamma -> W  gamma' = D gamma, W' = W D^-1, of all linears W that read the norm of a block, where
              its gamma is a tensor of the graph and not in W already
  o -> c      o' = D o, c' = c D^-1, of o and down and the factor c that multiplies their output
              where a norm follows it

Biases, the centre of keys and the prefix's K and V are scaled like the rows that make them.
Rotations come first (`rotate`): these are the channels of the rotated values v R2.
`scale_parameter` scales one parameter, traced in float32 while learning; `scale_channels` scales
all of them, in float64.

Letters as in `rotate`; G = H/N query heads share a KV head, half = K/2, P prefix tokens, M sets of
factors of q and k: N, or 1 where one gamma is that of all heads.

Reference: Xiao et al., SmoothQuant (arXiv 2211.10438), equations 3 and 4; Shao et al., OmniQuant
(arXiv 2308.13137), section 3.3; Tan et al., MobileQuant (arXiv 2408.13933).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Float64, Int
from numpy.typing import DTypeLike

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import passes
from qnpu_jax.graph import Decoder, Params, Tensors
from qnpu_jax.transform.fold import A, by_layer, check_folded, kept_gammas, output_factors

_READ_NORM = {f"{n}.weight" for n in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")}
"""Linears that read the norm before their block."""
_ENDS = {f"{n}.{s}" for n in ("attn.o", "mlp.down") for s in ("weight", "bias")}


@struct.dataclass(kw_only=True)
class Diagonal:
    """Channel factors, all positive.

    Attributes:
      up_down: of the rows of up.
      v_o: of the rows of v.
      q_k: of the rows of k, one per RoPE pair (`key_sets`).
      attn_in, mlp_in: of the gamma before attention and MLP; None where linears hold it.
      attn_out, mlp_out: of the rows of o and down; None where no norm follows them.
    """

    up_down: Float[Array | np.ndarray, "L F"]
    v_o: Float[Array | np.ndarray, "L N K"]
    q_k: Float[Array | np.ndarray, "L M half"]
    attn_in: Float[Array | np.ndarray, "L D"] | None = None
    mlp_in: Float[Array | np.ndarray, "L D"] | None = None
    attn_out: Float[Array | np.ndarray, "L D"] | None = None
    mlp_out: Float[Array | np.ndarray, "L D"] | None = None

    def given(self) -> dict[str, Any]:
        """The factors that there are, by field."""
        return {name: x for name, x in vars(self).items() if x is not None}


# --- merging ---


def key_sets(config: ModelConfig) -> int:
    """M: KV heads that have factors of q and k of their own; 1 where all heads share a gamma."""
    return 1 if config.qk_norm == "head" else config.num_kv_heads


def identity_diagonal(config: ModelConfig) -> Diagonal:
    """Makes factors of 1, float64, which change nothing."""
    layers, n, k = config.num_layers, config.num_kv_heads, config.head_dim
    kept = {*kept_gammas(config), *output_factors(config)}
    ends = {"in": "norm.gamma", "out": "post_norm.factor"}
    return Diagonal(
        up_down=np.ones((layers, config.intermediate_size)),
        v_o=np.ones((layers, n, k)),
        q_k=np.ones((layers, key_sets(config), k // 2)),
        **{
            f"{block}_{end}": np.ones((layers, config.hidden_size))
            for end, name in ends.items()
            for block in ("attn", "mlp")
            if f"{block}.{name}" in kept
        },
    )


def scale_parameter(
    name: str, x: Float[A, "*out n"], by: Diagonal, *, normed: bool = False
) -> Float[A, "*out n"]:
    """Scales one parameter of the graph, by this module's equations; one layer of `layers.*`.

    Arrays are all NumPy float64 or all JAX float32 (traced or not), and so is the result.

    Args:
      name: global, `layers.attn.q.weight`.
      x: a weight (out, in), a bias (out,), a gamma, `layers.attn.prefix_k` (N, P, K) or
        `prefix_v` (N, K, P).
      by: this layer's factors, without their first axis.
      normed: queries and keys are normed, with gammas of their own.

    Raises:
      UserError: no parameter of the graph has this name.
    """
    n, half = len(by.v_o), by.q_k.shape[1]
    local = name.removeprefix("layers.")
    x = _scaled_ends(local, x, by)
    match local:
        case "mlp.up.weight" | "mlp.up.bias":
            return (x.reshape(len(x), -1) * by.up_down[:, None]).reshape(x.shape)
        case "mlp.down.weight":
            return x / by.up_down[None]
        case "attn.v.weight" | "attn.v.bias":
            return (x.reshape(len(x), -1) * by.v_o.reshape(-1, 1)).reshape(x.shape)
        case "attn.prefix_v":
            return x * by.v_o[:, :, None]
        case "attn.o.weight":
            return (x.reshape(len(x), n, -1, 2 * half) / by.v_o[None, :, None]).reshape(x.shape)
        case "attn.prefix_k":
            return (x.reshape(n, -1, 2, half) * by.q_k[:, None, None]).reshape(x.shape)
        case "attn.q.weight" | "attn.q.bias" | "attn.k.weight" | "attn.k.bias":
            return x if normed else _scaled_rows(name, x, by.q_k)
        case "attn.q_norm.gamma" | "attn.k_norm.gamma":
            return _scaled_rows(name, x.reshape(-1), by.q_k).reshape(x.shape)
        case "attn.rope.q_offset" | "attn.rope.k_offset" | "attn.rope.k_centre":
            return _scaled_rows(name, x.reshape(-1), by.q_k).reshape(x.shape)
        case _ if name.endswith(("norm.gamma", "norm.factor")):  # of the residual stream
            return x
        case "attn.o.bias" | "mlp.gate.weight" | "mlp.gate.bias" | "mlp.down.bias":
            return x
        case "embed.weight" | "head.weight" | "head.bias":
            return x
    raise UserError(f"{name}: not expected; expected a parameter of `fold_norms` or the prefix's")


def _scaled_ends(local: str, x: Float[A, "*out n"], by: Diagonal) -> Float[A, "*out n"]:
    """Scales a parameter by the factors of what its block reads and makes, if it has some."""
    attention = local.startswith("attn")
    read, made = (by.attn_in, by.attn_out) if attention else (by.mlp_in, by.mlp_out)
    if read is not None and local in _READ_NORM:
        return x / read[None]
    if read is not None and local.endswith(".norm.gamma"):
        return x * read[None]
    if made is not None and local in _ENDS:
        return (x.reshape(len(x), -1) * made[:, None]).reshape(x.shape)
    if made is not None and local.endswith(".post_norm.factor"):
        return x / made[None]
    return x


def _scaled_rows(name: str, x: Float[A, "rows *n"], q_k: Any) -> Float[A, "rows *n"]:
    """Scales the rows of a weight, bias or gamma: those of keys by q_k (M, half), of queries by its
    inverse."""
    m, half = q_k.shape
    rows = x.reshape(m, len(x) // (2 * m * half), 2, half, -1)
    factor = q_k[:, None, None, :, None]
    keys = name.removeprefix("layers.attn.").removeprefix("rope.").startswith("k")
    return (rows * factor if keys else rows / factor).reshape(x.shape)


def scale_channels(
    config: ModelConfig, params: Params, diagonal: Diagonal, dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """Scales all parameters: the same function, with every scaled channel times its factor.

    Args:
      params: the output of `fold_norms` or `rotate`, with the prefix's K and V or without.
      dtype: stored type; products are float64.

    Raises:
      UserError: factors of the wrong shape, not finite or not positive; parameters are not those of
        `fold_norms`.
    """
    check_folded(config, params)
    factors, normed = _checked(config, diagonal), config.qk_norm is not None

    def scale(name: str, layer: int, x: np.ndarray) -> np.ndarray:
        by = Diagonal(**{field: f[layer] for field, f in factors.items()})
        return scale_parameter(name, x, by, normed=normed)

    return {
        name: by_layer(x, partial(scale, name), dtype)
        if name.startswith("layers.")
        else np.asarray(x).astype(dtype)
        for name, x in params.items()
    }


def _checked(config: ModelConfig, diagonal: Diagonal) -> dict[str, np.ndarray]:
    """The factors in float64, by field."""
    expected, given = identity_diagonal(config).given(), diagonal.given()
    if odd := expected.keys() ^ given.keys():
        raise UserError(
            f"{min(odd)}: expected factors {[*expected]}, got {[*given]}; make them with"
            " `identity_diagonal` or `smoothquant`"
        )
    factors = {}
    for name, one in expected.items():
        x = np.asarray(given[name])
        if x.shape != one.shape:
            raise UserError(
                f"{name}: expected shape {one.shape}, got {x.shape}; make it with"
                " `identity_diagonal` or `smoothquant`"
            )
        x = x.astype(np.float64)
        if not (np.isfinite(x) & (x > 0)).all():
            raise UserError(
                f"{name}: expected finite factors above 0, got"
                f" {x[~(np.isfinite(x) & (x > 0))][0]}; check the peaks behind them, or learn"
                " their logarithms at a lower rate"
            )
        factors[name] = x
    return factors


# --- factors from statistics ---


@dataclass(frozen=True, eq=False)
class ChannelPeaks:
    """max |x| per channel, over tokens and over channels that share a factor.

    The query heads of a KV head share one, and so do the two channels of a RoPE pair, and all heads
    that share a gamma.

    Attributes:
      act: input of down, gate*up.
      mixed: input of o.
      q, k: queries and keys after RoPE, the prefix's keys included.
      attn_in, mlp_in: input of attention and MLP; None where the linears hold the gamma.
      attn_out, mlp_out: output of o and down; None where no norm follows them.
    """

    act: Float[np.ndarray, "L F"]
    mixed: Float[np.ndarray, "L N K"]
    q: Float[np.ndarray, "L M half"]
    k: Float[np.ndarray, "L M half"]
    attn_in: Float[np.ndarray, "L D"] | None = None
    mlp_in: Float[np.ndarray, "L D"] | None = None
    attn_out: Float[np.ndarray, "L D"] | None = None
    mlp_out: Float[np.ndarray, "L D"] | None = None


def channel_peaks(
    dec: Decoder, params: Params, windows: Int[np.ndarray, "n t"], batch: int = 8
) -> ChannelPeaks:
    """Measures the peaks of the float model's channels over the windows.

    Args:
      dec: staged for windows of T tokens.
      params: folded float parameters, with prefix K/V if dec has a prefix.
      windows: (N, T) token ids.
      batch: windows per pass.
    """
    layers = dec.config.num_layers
    names = {"act": "mlp.act", "mixed": "attn.mixed", "q": "attn.q_pos", "k": "attn.k_rows"}
    if dec.prefix:
        names["k"] = "attn.keys"
    still = identity_diagonal(dec.config).given()
    ends = {"attn_in": "attn.input", "mlp_in": "mlp.input", "attn_out": "attn.o"}
    ends["mlp_out"] = "mlp.down"
    names |= {field: ends[field] for field in still if field in ends}
    kept = tuple(names.values())
    peaks: dict[str, np.ndarray] = {}
    for start in range(0, len(windows), batch):
        ids = jnp.asarray(windows[start : start + batch], jnp.int32)
        rows = []
        for graph, _, env in passes(dec, params, ids, lambda g: kept if g is dec.layer else ()):
            if graph is dec.layer:
                rows.append(_layer_peaks(dec.config, {f: env[n] for f, n in names.items()}))
            if len(rows) == layers:
                break  # the head is not looked at
        for field in names:
            found = np.stack([row[field] for row in rows])
            peaks[field] = np.maximum(peaks.get(field, found), found)
    return ChannelPeaks(**peaks)


def _layer_peaks(config: ModelConfig, of: Tensors) -> dict[str, np.ndarray]:
    """Peaks of one layer, by field of `ChannelPeaks`."""
    n, groups, width = config.num_kv_heads, config.queries_per_kv_head, config.head_dim
    pairs, sets = (2, width // 2), (key_sets(config), -1, width // 2)
    b = len(of["act"])
    views = {
        **{field: (x, (0, 1)) for field, x in of.items()},
        "mixed": (of["mixed"].reshape(-1, n, groups, width), (0, 2)),
        "q": (of["q"].reshape(-1, n, groups, *pairs), (0, 2, 3)),
        "k": (of["k"].reshape(b, n, -1, *pairs), (0, 2, 3)),
    }
    found = {f: np.asarray(jnp.abs(x).max(axis=axes), np.float64) for f, (x, axes) in views.items()}
    return found | {f: found[f].reshape(sets).max(axis=1) for f in ("q", "k")}


def smoothquant(config: ModelConfig, params: Params, peaks: ChannelPeaks, alpha: float) -> Diagonal:
    """Balances peaks: D_j = max|W_j|^(1-alpha) / max|x_j|^alpha, and sqrt(max|q| / max|k|) of q_k.

    x_j is a channel of the input of down (of o), and W_j are the weights that read it. D multiplies
    the rows that make x_j and divides W_j: alpha 0 gives all W_j the same peak, alpha 1 all x_j.
    Only ratios within a layer matter, so D is divided by its geometric mean there. The factors of q
    and k give both the same peak. A channel that is all zero on either side gets 1.

    Args:
      params: those that `peaks` were taken with.
      alpha: from 0 to 1; 0.5 to 0.9 are usual.

    Raises:
      UserError: alpha is out of range.

    Reference: SmoothQuant (arXiv 2211.10438), equation 4, with s = 1/D.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: expected 0 to 1, got {alpha}; 0.5 is usual")
    down, o = (np.asarray(params[f"layers.{n}.weight"]) for n in ("mlp.down", "attn.o"))
    heads = (config.num_kv_heads, config.queries_per_kv_head, config.head_dim)
    o = o.reshape(*o.shape[:2], *heads)
    read = {
        f"{block}_in": _balanced(x, _column_peaks(params, block), alpha)
        for block, x in (("attn", peaks.attn_in), ("mlp", peaks.mlp_in))
        if x is not None
    }
    made = {"attn_out": peaks.attn_out, "mlp_out": peaks.mlp_out}
    read |= {f: _balanced(x, np.ones_like(x), 1.0) for f, x in made.items() if x is not None}
    return Diagonal(
        up_down=_balanced(peaks.act, np.abs(down).max(axis=1), alpha),
        v_o=_balanced(peaks.mixed, np.abs(o).max(axis=(1, 3)), alpha),
        q_k=np.exp((_log(peaks.q) - _log(peaks.k)) / 2 * ((peaks.q > 0) & (peaks.k > 0))),
        **read,
    )


def limit_peaks(peaks: Float[np.ndarray, "L F"], times: float) -> Float64[np.ndarray, "L F"]:
    """Factors that bring the few largest channels of a layer to a limit: min(1, t / max|x_j|).

    t is `times` the 99th percentile of the layer's peaks: from 1 on about a hundredth of the
    channels change, or fewer; at a half 11% of SmolLM2-135M's. One range holds all channels of a
    static tensor: where one channel reaches ten times further than the rest, the rest is left a
    tenth of the codes.

    >>> limit_peaks(np.asarray([[1.0, 2.0, 2.0, 8.0]]), 0.5).round(2).tolist()
    [[1.0, 1.0, 1.0, 0.49]]

    Args:
      peaks: largest |x| of each channel, 0 or more.
      times: above 0.

    Reference: Outlier Suppression+ (arXiv 2304.09145), equation 5, s_j = max(1, max|x_j| / t), with
    t from the peaks in place of a search.
    """
    limit = times * np.quantile(peaks.astype(np.float64), 0.99, axis=1, keepdims=True)
    above = (peaks > limit) & (limit > 0)
    return np.where(above, limit / np.where(above, peaks, 1), 1.0)


def _column_peaks(params: Params, block: str) -> Float[np.ndarray, "L D"]:
    """max |w| of each column of the linears that read the norm of a block."""
    weights = [np.asarray(params[f"layers.{n}"]) for n in _READ_NORM if n.startswith(block)]
    return np.max([np.abs(w).max(axis=1) for w in weights], axis=0)


def _balanced(
    x: Float[np.ndarray, "L *channels"], w: Float[np.ndarray, "L *channels"], alpha: float
) -> Float[np.ndarray, "L *channels"]:
    """w^(1-alpha) / x^alpha over its geometric mean in the layer; 1 where either is 0."""
    live = (x > 0) & (w > 0)
    log_d = (1 - alpha) * _log(w) - alpha * _log(x)
    channels = tuple(range(1, x.ndim))
    count = np.maximum(live.sum(axis=channels, keepdims=True), 1)
    mean = np.where(live, log_d, 0).sum(axis=channels, keepdims=True) / count
    return np.exp(np.where(live, log_d - mean, 0))


def _log(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """log x in float64, 0 where x is 0."""
    return np.log(np.where(x > 0, x, 1).astype(np.float64))
