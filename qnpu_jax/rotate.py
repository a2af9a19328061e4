"""Rotations of a decoder's float parameters: same function, tensors without outliers.

A decoder without norm gammas computes the same logits when its residual stream x (a row vector) is
replaced by x R1 and each head's values v by v R2_i, R1 and R2_i orthogonal: the unit L2 norm
commutes with R1, and attention mixes tokens, not channels. Both merge into the weights, so that no
rotation runs in the model; the graph never hears of them. A random rotation spreads an outlier
channel over all channels, which narrows the ranges that static quantization must cover.

Two steps, in this order: `fold_norms` turns a checkpoint into the graph's parameters, `rotate`
turns those into others of the same function. Products are taken in float64, one layer or one block
of rows at a time, and stored as `dtype`. `rotated` is the rule of one parameter, which learning
traces in float32 and `rotate` applies in float64.

Names: V vocabulary, D hidden size, F intermediate size, L layers, H query heads, KV key/value
heads, K head size. A linear is y = W x + b with W (out, in), layers stacked on a leading axis.

Reference: Liu et al., SpinQuant: LLM quantization with learned rotations (arXiv 2405.16406),
section 3; Ashkboos et al., QuaRot (arXiv 2404.00456), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Float64, Int
from numpy.typing import DTypeLike

from qnpu_jax.config import ModelConfig, UserError

A = TypeVar("A", Array, np.ndarray)
"""Of one kind throughout a call: float64 of NumPy (merging) or traced float32 of JAX (learning)."""
Params = Mapping[str, Array | np.ndarray]
Seed = int | Sequence[int]
Matrix64 = Float64[np.ndarray, "n n"]

# Each linear of a layer, with the norm whose gamma scales its input.
_LINEARS = {
    "layers.attn.q": "layers.attn.norm",
    "layers.attn.k": "layers.attn.norm",
    "layers.attn.v": "layers.attn.norm",
    "layers.attn.o": None,
    "layers.mlp.gate": "layers.mlp.norm",
    "layers.mlp.up": "layers.mlp.norm",
    "layers.mlp.down": None,
}
_NORMS = ("layers.attn.norm", "layers.mlp.norm", "head.norm")
_TABLES = ("embed.weight", "head.weight")
_PREFIX = ("layers.attn.prefix_k", "layers.attn.prefix_v")
_ROWS = 8192  # rows of the embedding and the head that are float64 at a time
_ORTHOGONAL = 1e-4  # largest |R R^T - I| of a rotation; float32 rounding stays far below it


@struct.dataclass(kw_only=True)
class Rotation:
    """Orthogonal matrices: R1 of the residual stream (all layers), R2 of each layer's values."""

    r1: Float[Array | np.ndarray, "D D"]
    r2: Float[Array | np.ndarray, "L K K"]


# --- Hadamard matrices ---


def _jacobsthal(q: int) -> Int[np.ndarray, "q q"]:
    """Q[i, j] = chi(i - j) for an odd prime q, with Q Q^T = q I - J and Q J = 0 (J all ones).

    chi is the quadratic character: 0 at 0, 1 at squares, -1 elsewhere. Q is skew for q = 3 mod 4,
    symmetric for q = 1 mod 4.
    """
    chi = np.full(q, -1)
    chi[np.arange(1, q) ** 2 % q] = 1
    chi[0] = 0
    i = np.arange(q)
    return chi[(i[:, None] - i[None, :]) % q]


def _bordered(q: int, corner: int) -> Int[np.ndarray, "n n"]:
    """S = [[0, 1^T], [corner 1, Q]] of order q + 1: S S^T = q I when corner = chi(-1)."""
    s = np.zeros((q + 1, q + 1), np.int64)
    s[0, 1:] = 1
    s[1:, 0] = corner
    s[1:, 1:] = _jacobsthal(q)
    return s


def _paley_one(q: int) -> Int[np.ndarray, "n n"]:
    """H = I + S of order q + 1, for a prime q = 3 mod 4.

    S^T = -S, so H H^T = I + S + S^T + S S^T = (q + 1) I.
    """
    return np.eye(q + 1, dtype=np.int64) + _bordered(q, -1)


def _paley_two(q: int) -> Int[np.ndarray, "n n"]:
    """H = S (x) A + I (x) B of order 2 (q + 1), for a prime q = 1 mod 4.

    A = [[1, 1], [1, -1]], B = [[1, -1], [-1, -1]]: A A^T = B B^T = 2 I and A B^T + B A^T = 0.
    With S^T = S, H H^T = S S^T (x) 2 I + I (x) 2 I = 2 (q + 1) I.
    """
    a, b = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
    return np.kron(_bordered(q, 1), a) + np.kron(np.eye(q + 1, dtype=np.int64), b)


def _core(order: int) -> int | None:
    """The one of 1, 12, 20, 28, 36 that times a power of two gives `order`, or None."""
    odd = order // (order & -order) if order > 0 else 0
    core = {1: 1, 3: 12, 5: 20, 7: 28, 9: 36}.get(odd)
    return core if core is not None and order % core == 0 else None


def has_hadamard(order: int) -> bool:
    """True for the orders that `hadamard` constructs: 2^k and 12, 20, 28, 36 times 2^k."""
    return _core(order) is not None


def hadamard(order: int) -> Int[np.ndarray, "n n"]:
    """A matrix of +1 and -1 with H H^T = order I, exactly.

    Sylvester's doubling [[H, H], [H, -H]] of a core of order 1, 12 (Paley I, q = 11), 20 (Paley I,
    19), 28 (Paley II, 13) or 36 (Paley II, 17). 576 = 36 * 16, 1536 = 12 * 128, 64 = 2^6.

    Raises:
      UserError: no construction for this order; see `has_hadamard`.

    Reference: R. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933), lemmas 2 and 3.
    """
    match _core(order):
        case 1:
            h = np.ones((1, 1), np.int64)
        case 12 | 20 as core:
            h = _paley_one(core - 1)
        case 28 | 36 as core:
            h = _paley_two(core // 2 - 1)
        case _:
            raise UserError(
                f"Hadamard matrix of order {order}: expected 2^k or 12, 20, 28, 36 times 2^k;"
                " use `random_orthogonal`"
            )
    while len(h) < order:
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    return h


# --- random rotations ---


def random_hadamard(order: int, seed: Seed) -> Matrix64:
    """R = H diag(signs) / sqrt(order), signs drawn from the seed: the same on every platform."""
    signs = 2 * np.random.default_rng(seed).integers(0, 2, order) - 1
    return hadamard(order) * signs / np.sqrt(order)


def random_orthogonal(order: int, seed: Seed) -> Matrix64:
    """Q of a Gaussian matrix's QR, columns signed so that R's diagonal is positive: Haar's measure.

    Platforms agree up to the rounding of their LAPACK: merge one and the same array wherever bits
    must match.

    Reference: F. Mezzadri, How to generate random matrices from the classical compact groups
    (2007), section 5.
    """
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((order, order)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def random_rotation(config: ModelConfig, seed: int) -> Rotation:
    """R1 (D, D) and R2 (L, K, K), float64: random Hadamard, or orthogonal at orders without one.

    R1 depends on (seed, D) and R2_i on (seed, i, K) only.
    """

    def draw(order: int, index: int) -> Matrix64:
        make = random_hadamard if has_hadamard(order) else random_orthogonal
        return make(order, (seed, index))

    r2 = [draw(config.head_dim, 1 + i) for i in range(config.num_layers)]
    return Rotation(r1=draw(config.hidden_size, 0), r2=np.stack(r2))


# --- parameters: fold, then rotate ---


def by_layer(
    stack: Array | np.ndarray, merge: Callable[[int, np.ndarray], np.ndarray], dtype: DTypeLike
) -> np.ndarray:
    """merge(i, stack[i]) for every layer i, in float64, stored as `dtype`. Shapes do not change."""
    source = np.asarray(stack)
    out = np.empty(source.shape, dtype)
    for i, x in enumerate(source):
        out[i] = merge(i, x.astype(np.float64))
    return out


def _by_rows(
    table: Array | np.ndarray, merge: Callable[[np.ndarray], np.ndarray], dtype: DTypeLike
) -> np.ndarray:
    """merge(rows) for blocks of rows of a (V, D) table, in float64, stored as `dtype`."""
    source = np.asarray(table)
    out = np.empty(source.shape, dtype)
    for i in range(0, len(source), _ROWS):
        out[i : i + _ROWS] = merge(source[i : i + _ROWS].astype(np.float64))
    return out


def _check_names(params: Params, required: set[str], optional: set[str], way_out: str) -> None:
    """Raises UserError unless the merge knows every parameter: one left out changes the logits."""
    if missing := required - params.keys():
        raise UserError(f"{min(missing)}: missing; expected {sorted(required)}; {way_out}")
    if unknown := params.keys() - required - optional:
        raise UserError(
            f"{min(unknown)}: not expected; expected {sorted(required | optional)}; {way_out}"
        )


def check_folded(params: Params) -> None:
    """Raises UserError unless these are the parameters of `fold_norms`, with or without prefix
    K/V."""
    linears = {f"{name}.{suffix}" for name in _LINEARS for suffix in ("weight", "bias")}
    required = {*linears, *_TABLES, "head.bias"}
    _check_names(params, required, set(_PREFIX), "call `fold_norms` first")


def _check_checkpoint(config: ModelConfig, params: Params) -> None:
    required = {f"{name}.weight" for name in _LINEARS} | {f"{norm}.gamma" for norm in _NORMS}
    required |= {"embed.weight"} if config.tie_embeddings else {"embed.weight", "head.weight"}
    way_out = "this is no Llama checkpoint, or its loader misnames a tensor"
    _check_names(params, required, {f"{name}.bias" for name in _LINEARS}, way_out)


def fold_norms(
    config: ModelConfig, params: Params, dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """Parameters of the graph from a checkpoint's: W <- W diag(gamma sqrt(D)); q also times K^-1/2.

    The graph's norm is x / sqrt(sum(x^2) + D eps), which is RMSNorm without gamma divided by
    sqrt(D), and its scores are q k^T without the factor K^-1/2: both factors live in the weights.

    Args:
      params: a checkpoint: `embed.weight` (V, D), `layers.{attn,mlp}.norm.gamma` (L, D),
        `layers.attn.{q,k,v,o}.weight`, `layers.mlp.{gate,up,down}.weight` (L, out, in), any of
        their biases (L, out), `head.norm.gamma` (D,) and, where embeddings are not tied,
        `head.weight` (V, D).
      dtype: stored type; products are float64.

    Returns:
      No gammas; `head.weight` of its own; a bias for every linear and the head, zero where the
      checkpoint has none.

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
        scale = config.head_dim**-0.5 if name == "layers.attn.q" else 1.0
        columns = np.full(config.num_layers, scale) if norm is None else gamma[norm] * scale
        weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
        out[f"{name}.weight"] = by_layer(weight, lambda i, w, c=columns: w * c[i], dtype)
        bias = np.zeros(weight.shape[:2]) if bias is None else bias
        out[f"{name}.bias"] = by_layer(bias, lambda _, b, s=scale: b * s, dtype)
    head = params["embed.weight" if config.tie_embeddings else "head.weight"]
    out["head.weight"] = _by_rows(head, lambda w: w * gamma["head.norm"], dtype)
    out["head.bias"] = np.zeros(config.vocab_size, dtype)
    return out


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
def rotated(
    name: str, x: Float[A, "*out n"], r1: Float[A, "D D"], r2: Float[A, "K K"] | None = None
) -> Float[A, "*out n"]:
    """One parameter of the graph after the rotation, as `rotate` says: of one layer in `layers.*`.

    NumPy float64 or JAX float32, traced or not: arrays of one kind in, one of that kind out.

    Args:
      name: global, `layers.attn.q.weight`.
      x: a weight (out, in), a bias (out,), a block of rows of `embed.weight` or `head.weight`, or
        `layers.attn.prefix_k` (N, P, K) or `prefix_v` (N, K, P).
      r2: of this layer; `embed.*` and `head.*` have none.

    Raises:
      UserError: no parameter of the graph has this name.
    """
    match name:
        case "embed.weight" | "head.weight" | "layers.attn.q.weight" | "layers.attn.k.weight":
            return x @ r1
        case "layers.mlp.gate.weight" | "layers.mlp.up.weight":
            return x @ r1
        case "layers.mlp.down.weight" | "layers.attn.o.bias" | "layers.mlp.down.bias":
            return r1.T @ x
        case "layers.attn.q.bias" | "layers.attn.k.bias" | "layers.attn.prefix_k" | "head.bias":
            return x
        case "layers.mlp.gate.bias" | "layers.mlp.up.bias":
            return x
    if r2 is None:
        raise UserError(f"{name}: expected R2 of its layer, got None; pass `r2`")
    return _rotated_values(name, x, r1, r2)


def _rotated_values(
    name: str, x: Float[A, "*out n"], r1: Float[A, "D D"], r2: Float[A, "K K"]
) -> Float[A, "*out n"]:
    """`rotated` of what makes values or reads them."""
    k = len(r2)
    match name.removeprefix("layers.attn."):
        case "v.weight":
            return (r2.T @ (x @ r1).reshape(-1, k, len(r1))).reshape(x.shape)
        case "v.bias":
            return (x.reshape(-1, k) @ r2).reshape(x.shape)
        case "prefix_v":
            return r2.T @ x
        case "o.weight":
            return r1.T @ (x.reshape(len(r1), -1, k) @ r2).reshape(x.shape)
    raise UserError(f"{name}: not expected; expected a parameter of `fold_norms` or the prefix's")


def rotate(
    config: ModelConfig, params: Params, rotation: Rotation, dtype: DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    """The parameters of the same function with residual stream x R1 and values v R2_i.

    E <- E R1; q, k, gate, up, head: W <- W R1; v: W <- R2_i^T W R1, b <- R2_i^T b for each KV head;
    o: W <- R1^T W blockdiag(R2_i), b <- R1^T b; down: W <- R1^T W, b <- R1^T b; values of a prefix:
    V <- R2_i^T V.

    Args:
      params: the output of `fold_norms` (or of `rotate`: rotations compose), with the prefix's K
        and V or without.
      dtype: stored type; products are float64.

    Raises:
      UserError: R1 or an R2_i is not orthogonal or has the wrong shape; parameters are not those of
        `fold_norms`.

    Reference: SpinQuant (arXiv 2405.16406), figure 1 and section 3.1.
    """
    check_folded(params)
    r1 = _orthogonal("R1", np.asarray(rotation.r1), config.hidden_size)
    if len(rotation.r2) != config.num_layers:
        raise UserError(f"R2: expected one per layer, {config.num_layers}, got {len(rotation.r2)}")
    r2 = [
        _orthogonal(f"R2 of layer {i}", r, config.head_dim)
        for i, r in enumerate(np.asarray(rotation.r2))
    ]

    out = {"head.bias": np.asarray(params["head.bias"]).astype(dtype)}
    for name in _TABLES:
        out[name] = _by_rows(params[name], lambda rows, n=name: rotated(n, rows, r1), dtype)
    for name in (n for n in params if n.startswith("layers.")):
        out[name] = by_layer(params[name], lambda i, x, n=name: rotated(n, x, r1, r2[i]), dtype)
    return out
