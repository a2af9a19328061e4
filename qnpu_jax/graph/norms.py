"""RMS norms as ops: before a block, after it, and of queries and keys."""

from __future__ import annotations

import math

from qnpu_jax.config import ModelConfig
from qnpu_jax.graph.builder import Builder
from qnpu_jax.graph.graph import TensorSpec
from qnpu_jax.graph.ops import Add, BatchMatmul, Mul, Reshape, Rsqrt, Sqrt


def rms_norm(g: Builder, x: TensorSpec, eps: TensorSpec, twice: bool = False) -> TensorSpec:
    """Stages x / sqrt(sum(x^2) + D eps), rows of unit length.

    The factor sqrt(D) is in what follows: weights, or the gamma of `scaled_norm`.

    A BATCH_MATMUL sums the squares in 64 bits and rounds once. SQRT before RSQRT halves the dynamic
    range that the RSQRT table must cover. Sums have 16 bits: of a row R times shorter than the
    longest 32767 / R^2 codes are left, 2 where R is 128, and its length is wrong by a quarter.

    Args:
      x: (.., D); every row along the last axis is normed by itself.
      eps: D eps, (1, 1, 1).
      twice: norm the result again: after the first norm all rows are of nearly one length, and
        whatever the first lost, the second has 16 bits for. The same function.
    """
    width = x.shape[-1]
    with g.scope("norm"):
        rows = g.add("rows", Reshape((math.prod(x.shape[:-1]), 1, width)), x)
        total = g.add("squares", BatchMatmul(adj_y=True), rows, rows)
        total = g.add("sum", Add(), total, eps)
        quarter = g.add("inv_root", Rsqrt(), g.add("root", Sqrt(), total))
        inverse = g.add("inv", Mul(), quarter, quarter)
        if twice:
            rows, inverse = _again(g, rows, inverse, eps)
        out = g.add("out", Mul(), rows, inverse)
        return g.add("flat", Reshape(x.shape), out)


def _again(
    g: Builder, x: TensorSpec, inverse: TensorSpec, eps: TensorSpec
) -> tuple[TensorSpec, TensorSpec]:
    """Stages rows y = x g, g what `inverse` holds of 1 / sqrt(sum(x^2) + D eps), and their inverse
    length in

        x / sqrt(sum(x^2) + D eps) = y / sqrt(sum(y^2) + D eps g^2)
    """
    with g.scope("again"):
        y = g.add("rows", Mul(), x, inverse)
        left = g.add("eps", Mul(), g.add("inv_squared", Mul(), inverse, inverse), eps)
        total = g.add("squares", BatchMatmul(adj_y=True), y, y)
        return y, g.add("inv", Rsqrt(), g.add("sum", Add(), total, left))


def scaled_norm(g: Builder, name: str, x: TensorSpec, eps: TensorSpec) -> TensorSpec:
    """Stages gamma x / sqrt(sum(x^2) + D eps), gamma (1, .., D) the constant `<name>.gamma`, which
    holds sqrt(D) too.

    No linear follows that gamma could fold into: RoPE, which mixes channels, or the residual sum.
    """
    with g.scope(name):
        unit = rms_norm(g, x, eps)
        gamma = g.param("gamma", (*(1,) * (len(x.shape) - 1), x.shape[-1]))
        return g.add("out", Mul(), unit, gamma)


def stream_norm(g: Builder, cfg: ModelConfig, x: TensorSpec, eps: TensorSpec) -> TensorSpec:
    """Stages the norm of the residual stream x (T, D) for a linear that reads it.

    Its gamma is in that linear's weights. Where no rotation can spread the stream's large channels
    it stays an op: the model itself tames them by it, and in the weights it would leave them to the
    linear's 8-bit input.
    """
    unit = rms_norm(g, x, eps, cfg.double_norms)
    if cfg.merges_r1:
        return unit
    with g.scope("norm"):
        return g.add("scaled", Mul(), unit, g.param("gamma", (1, x.shape[-1])))


def norm_before(g: Builder, cfg: ModelConfig, x: TensorSpec, eps: TensorSpec) -> TensorSpec:
    """Stages what a block reads: the normed residual stream, or the stream itself."""
    return x if cfg.norms == "after" else stream_norm(g, cfg, x, eps)


def norm_after(g: Builder, cfg: ModelConfig, x: TensorSpec, eps: TensorSpec) -> TensorSpec:
    """Stages what a block adds to the residual stream: its output, normed or as it is.

    What a norm follows is in no rotated basis: a few channels would have most of the 8-bit range of
    `o` or `down`. A constant factor for each, 1/factor in the rows of the linear, equals them out
    (`transform.scale_channels`).
    """
    if cfg.norms == "before":
        return x
    with g.scope("post_norm"):
        x = g.add("input", Mul(), x, g.param("factor", (1, x.shape[-1])))
    return scaled_norm(g, "post_norm", x, eps)
