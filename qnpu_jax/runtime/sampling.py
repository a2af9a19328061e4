"""The next token from integer logits, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer

from qnpu_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token, of equal ones the first.
      top_k: only the k likeliest tokens; 0 for all.
      top_p: only the likeliest tokens whose probabilities reach this sum, at least one.
      seed: of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf") and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UserError(
                f"sampling: temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p};"
                " expected at least 0, at least 0, above 0 to 1; correct them"
            )


def sample(
    codes: Integer[np.ndarray, " v"],
    scale: float,
    sampling: Sampling,
    rng: np.random.Generator,
) -> int:
    """A token id.

    Args:
      codes: integer logits.
      scale: real value of one code.
    """
    if sampling.temperature == 0:
        return int(np.argmax(codes))
    return int(rng.choice(len(codes), p=probabilities(codes, scale, sampling)))


def probabilities(
    codes: Integer[np.ndarray, " v"], scale: float, sampling: Sampling
) -> Float64[np.ndarray, " v"]:
    """softmax(codes scale / temperature) over the tokens that top-k and top-p leave.

    Integer logits often tie: the order among equals is that of their ids.
    """
    z = (codes.astype(np.float64) - codes.max()) * (scale / sampling.temperature)
    p = np.exp(z)
    order = np.argsort(-z, kind="stable")
    p /= p.sum()
    kept = len(p) if sampling.top_k == 0 else min(sampling.top_k, len(p))
    sums = np.cumsum(p[order[:kept]])
    # The tokens before the sum reaches top_p of what top-k left, and the one that reaches it.
    kept = 1 + int(np.searchsorted(sums[:-1], sampling.top_p * sums[-1] - 1e-12))
    chosen = np.zeros_like(p)
    chosen[order[:kept]] = p[order[:kept]]
    return chosen / chosen.sum()
