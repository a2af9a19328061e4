"""llama3 RoPE scaling from the factors per frequency that GGUF keeps in place of its parameters."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, Float64

from qnpu_jax.config import RopeScaling
from qnpu_jax.errors import UserError


def llama3_factors(
    scaling: RopeScaling, head_dim: int, theta: float
) -> Float64[np.ndarray, "half_dim"]:
    """What llama3 scaling divides each RoPE frequency f_i = theta^(-2i/K) by.

    1 for fast ones, `factor` for slow ones, in between 1 / ((1 - s) / factor + s) with
    s = (original f_i / 2 pi - low) / (high - low).

    Reference: llama.cpp convert_hf_to_gguf.py, `LlamaModel.generate_extra_tensors`.
    """
    turns = scaling.original_max_positions * _frequencies(head_dim, theta) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)


def llama3_from_factors(
    factors: Float32[np.ndarray, "..."], head_dim: int, theta: float, context: int, where: str
) -> RopeScaling | None:
    """The llama3 scaling that gives these factors; None if all are 1.

    s is a straight line in f_i, so two factors strictly between 1 and the largest give low and
    high. Only their ratio to the original context matters, so that is taken as `context`.

    Raises:
      UserError: no llama3 scaling gives these factors within 1e-4 (float32 rounding is 1e-6).
    """
    plausible = np.isfinite(factors) & (factors >= 1.0)
    if factors.shape == (head_dim // 2,) and plausible.all():
        if np.all(factors == 1.0):
            return None
        for scaling in _candidates(factors.astype(np.float64), head_dim, theta, context):
            if np.allclose(llama3_factors(scaling, head_dim, theta), factors, rtol=1e-4, atol=0):
                return scaling
    raise UserError(
        f"{where}: tensor rope_freqs.weight (shape {list(factors.shape)}) is no llama3 scaling;"
        f" expected one of {head_dim // 2} frequencies;"
        " use the Hugging Face folder of a Llama 3 model"
    )


def _candidates(
    factors: Float64[np.ndarray, "half_dim"], head_dim: int, theta: float, context: int
) -> list[RopeScaling]:
    factor = float(np.round(factors.max(), 4))
    # Meta's own parameters, for heads too small to have two factors in between.
    candidates = [RopeScaling("llama3", factor, 1.0, 4.0, context)]
    between = (factors > 1.0 + 1e-4) & (factors < factor * (1.0 - 1e-4))
    if between.sum() >= 2:
        turns = context * _frequencies(head_dim, theta)[between] / (2 * math.pi)
        smooth = (1.0 / factors[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, offset = np.polyfit(turns, smooth, 1)
        if slope > 0:
            low, high = (float(f"{(s - offset) / slope:.6g}") for s in (0.0, 1.0))
            candidates.append(RopeScaling("llama3", factor, low, high, context))
    return candidates


def _frequencies(head_dim: int, theta: float) -> Float64[np.ndarray, "half_dim"]:
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
