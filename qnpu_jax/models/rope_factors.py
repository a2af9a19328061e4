"""Recovers llama3 RoPE scaling from the divisor of each frequency, which is all that GGUF keeps."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, Float64

from qnpu_jax.config import RopeScaling
from qnpu_jax.errors import UserError


def llama3_factors(
    scaling: RopeScaling, head_dim: int, theta: float
) -> Float64[np.ndarray, "half_dim"]:
    """Computes the divisor of each RoPE frequency f_i = theta^(-2i/K) in llama3 scaling.

    With s = (original f_i / 2 pi - low) / (high - low), kept between 0 and 1, the divisor is
    1 / ((1 - s) / factor + s): 1 for fast frequencies, `factor` for slow ones.

    Args:
      scaling: of kind llama3.
      head_dim: K.
      theta: base of the frequencies.

    Returns:
      K/2 divisors, 1 or more.

    Reference: llama.cpp convert_hf_to_gguf.py, `LlamaModel.generate_extra_tensors`.
    """
    turns = scaling.original_max_positions * _frequencies(head_dim, theta) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)


def llama3_from_factors(
    factors: Float32[np.ndarray, "..."], head_dim: int, theta: float, context: int, where: str
) -> RopeScaling | None:
    """Finds the llama3 scaling that gives these divisors.

    s of `llama3_factors` is a straight line in f_i, so two divisors strictly between 1 and the
    largest give low and high. Only the ratio of these two to the original context matters, so that
    context is taken as `context`.

    Args:
      factors: K/2 divisors.
      where: the file, for messages.

    Returns:
      The scaling; None if all divisors are 1.

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
    # Meta's own parameters, for heads too small to have two divisors in between.
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
