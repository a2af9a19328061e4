"""Rotations of a decoder's float parameters: same function, tensors without outliers.

A decoder without norm gammas computes the same logits when its residual stream x (a row vector) is
replaced by x R1 and each head's values v by v R2_i, R1 and R2_i orthogonal: the unit L2 norm
commutes with R1, and attention mixes tokens, not channels. Both merge into the weights, so that no
rotation runs in the model, and the graph has no op for them. A random rotation spreads an outlier
channel over all channels, which narrows the ranges that static quantization must cover.

R1 is left out where a norm's gamma stands between a block and the residual sum
(`ModelConfig.merges_r1`): diag(gamma) does not commute with it. Norms of queries and keys do not
see it.

Two steps, in this order: `fold_norms` turns a checkpoint into the graph's parameters, `rotate`
turns those into others of the same function. Products are taken in float64, one layer or one block
of rows at a time, and stored as `dtype`. `rotate_parameter` rotates one parameter, traced in
float32 while learning; `rotate` rotates all of them, in float64.

Names: V vocabulary, D hidden size, F intermediate size, L layers, H query heads, KV key/value
heads, K head size. A linear is y = W x + b with W (out, in), layers stacked on a leading axis.

Reference: Liu et al., SpinQuant: LLM quantization with learned rotations (arXiv 2405.16406),
section 3; Ashkboos et al., QuaRot (arXiv 2404.00456), sections 3 and 4.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float
from numpy.typing import DTypeLike

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params
from qnpu_jax.transform.fold import HEAD_GAMMA, TABLES, A, by_layer, by_rows, check_folded
from qnpu_jax.transform.hadamard import Matrix64, has_hadamard, random_hadamard, random_orthogonal

_ORTHOGONAL = 1e-4  # largest |R R^T - I| of a rotation; float32 rounding stays far below it


@struct.dataclass(kw_only=True)
class Rotation:
    """Orthogonal matrices: R1 of the residual stream (all layers) or None, R2 of each layer's
    values."""

    r1: Float[Array | np.ndarray, "D D"] | None
    r2: Float[Array | np.ndarray, "L K K"]


def rotations_of(config: ModelConfig) -> dict[str, str]:
    """Tells of each rotation what it turns, or why it cannot be merged, in plain words."""
    reason = "not merged: a norm's gain stands between each block and the residual sum"
    return {
        "R1": "residual stream" if config.merges_r1 else reason,
        "R2": "values of each layer",
    }


def random_rotation(config: ModelConfig, seed: int) -> Rotation:
    """Draws R1 (D, D) and R2 (L, K, K), float64: random Hadamard, or orthogonal at orders without.

    R1 depends on (seed, D) only, and R2_i on (seed, i, K). R1 is None where it does not merge.
    """

    def draw(order: int, index: int) -> Matrix64:
        make = random_hadamard if has_hadamard(order) else random_orthogonal
        return make(order, (seed, index))

    r2 = [draw(config.head_dim, 1 + i) for i in range(config.num_layers)]
    r1 = draw(config.hidden_size, 0) if config.merges_r1 else None
    return Rotation(r1=r1, r2=np.stack(r2))


def _orthogonal(name: str, r: np.ndarray, order: int) -> Matrix64:
    """`r` in float64, after checking that it is an orthogonal matrix of this order."""
    if r.shape != (order, order):
        raise UserError(
            f"{name}: expected shape {(order, order)}, got {r.shape};"
            " make it with `random_rotation`"
        )
    r = r.astype(np.float64)
    error = np.max(np.abs(r @ r.T - np.eye(order)))
    if not error <= _ORTHOGONAL:  # written so that NaN fails
        raise UserError(
            f"{name}: not orthogonal: expected max |R R^T - I| <= {_ORTHOGONAL:g}, got {error:.3g};"
            " orthonormalise it (QR) or lower the learning rate of the rotations"
        )
    return r


@jax.default_matmul_precision("highest")  # TF32, what a GPU would take, is worth 10 bits
def rotate_parameter(
    name: str,
    x: Float[A, "*out n"],
    r1: Float[A, "D D"] | None,
    r2: Float[A, "K K"] | None = None,
) -> Float[A, "*out n"]:
    """Rotates one parameter of the graph, by the equations of `rotate`; one layer of `layers.*`.

    Arrays are all NumPy float64 or all JAX float32 (traced or not), and so is the result.

    Args:
      name: global, `layers.attn.q.weight`.
      x: a weight (out, in), a bias (out,), a gamma, a block of rows of `embed.weight` or
        `head.weight`, or `layers.attn.prefix_k` (N, P, K) or `prefix_v` (N, K, P).
      r1: None leaves the residual stream as it is.
      r2: of this layer; `embed.*` and `head.*` have none.

    Raises:
      UserError: no parameter of the graph has this name.
    """
    match name:
        case "embed.weight" | "head.weight" | "layers.attn.q.weight" | "layers.attn.k.weight":
            return _from_stream(x, r1)
        case "layers.mlp.gate.weight" | "layers.mlp.up.weight":
            return _from_stream(x, r1)
        case "layers.mlp.down.weight" | "layers.attn.o.bias" | "layers.mlp.down.bias":
            return _to_stream(x, r1)
        case "layers.attn.q.bias" | "layers.attn.k.bias" | "layers.attn.prefix_k" | "head.bias":
            return x
        case (
            "layers.attn.rope.q_offset" | "layers.attn.rope.k_offset" | "layers.attn.rope.k_centre"
        ):
            return x
        case "layers.mlp.gate.bias" | "layers.mlp.up.bias":
            return x
        case "layers.attn.q_norm.gamma" | "layers.attn.k_norm.gamma":
            return x
        case _ if r1 is None and name.endswith(("norm.gamma", "norm.factor")):  # of the stream
            return x
    if r2 is None:
        raise UserError(f"{name}: expected R2 of its layer, got None; pass `r2`")
    return _rotated_values(name, x, r1, r2)


def _from_stream(x: Float[A, "*out D"], r1: Float[A, "D D"] | None) -> Float[A, "*out D"]:
    """x R1: of a weight that reads the residual stream, or a table that makes it."""
    return x if r1 is None else x @ r1


def _to_stream(x: Float[A, "D *n"], r1: Float[A, "D D"] | None) -> Float[A, "D *n"]:
    """R1^T x: of a weight or bias that adds to the residual stream."""
    return x if r1 is None else r1.T @ x


def _rotated_values(
    name: str, x: Float[A, "*out n"], r1: Float[A, "D D"] | None, r2: Float[A, "K K"]
) -> Float[A, "*out n"]:
    """`rotate_parameter` for the parameters that make values or read them."""
    k = len(r2)
    match name.removeprefix("layers.attn."):
        case "v.weight":
            return (r2.T @ _from_stream(x, r1).reshape(-1, k, x.shape[1])).reshape(x.shape)
        case "v.bias":
            return (x.reshape(-1, k) @ r2).reshape(x.shape)
        case "prefix_v":
            return r2.T @ x
        case "o.weight":
            return _to_stream((x.reshape(len(x), -1, k) @ r2).reshape(x.shape), r1)
    raise UserError(f"{name}: not expected; expected a parameter of `fold_norms` or the prefix's")


def rotate(
    config: ModelConfig,
    params: Params,
    rotation: Rotation,
    dtype: DTypeLike = np.float32,
    *,
    consume: bool = False,
) -> dict[str, np.ndarray]:
    """Rotates all parameters: the same function, with residual stream x R1 and values v R2_i.

    E <- E R1; q, k, gate, up, head: W <- W R1; v: W <- R2_i^T W R1, b <- R2_i^T b for each KV head;
    o: W <- R1^T W blockdiag(R2_i), b <- R1^T b; down: W <- R1^T W, b <- R1^T b; values of a prefix:
    V <- R2_i^T V. Gammas stay.

    Args:
      params: the output of `fold_norms` (or of `rotate`: rotations compose), with the prefix's K
        and V or without.
      dtype: stored type; products are float64.
      consume: remove each tensor from `params`, a dict, once its result exists.

    Raises:
      UserError: R1 does not merge into this model; R1 or an R2_i is not orthogonal or has the wrong
        shape; parameters are not those of `fold_norms`.

    Reference: SpinQuant (arXiv 2405.16406), figure 1 and section 3.1.
    """
    check_folded(config, params)
    r1 = _checked_r1(config, rotation)
    if len(rotation.r2) != config.num_layers:
        raise UserError(f"R2: expected one per layer, {config.num_layers}, got {len(rotation.r2)}")
    r2 = [
        _orthogonal(f"R2 of layer {i}", r, config.head_dim)
        for i, r in enumerate(np.asarray(rotation.r2))
    ]

    left: Any = params if consume else dict(params)
    whole = [name for name in ("head.bias", HEAD_GAMMA) if name in left]
    out = {name: np.asarray(left.pop(name)).astype(dtype) for name in whole}
    for name in TABLES:
        out[name] = by_rows(left.pop(name), partial(rotate_parameter, name, r1=r1), dtype)
    for name in [n for n in left if n.startswith("layers.")]:
        out[name] = by_layer(
            left.pop(name), lambda i, x, n=name: rotate_parameter(n, x, r1, r2[i]), dtype
        )
    return out


def _checked_r1(config: ModelConfig, rotation: Rotation) -> Matrix64 | None:
    if rotation.r1 is None:
        return None
    if not config.merges_r1:
        raise UserError(
            "R1: does not merge into a model with norms after its blocks; expected None; make the"
            " rotation with `random_rotation`"
        )
    return _orthogonal("R1", np.asarray(rotation.r1), config.hidden_size)
