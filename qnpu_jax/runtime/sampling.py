"""Drawing of the next token from integer logits, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer

from qnpu_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of the draw of a token.

    Attributes:
      temperature: divides the logits. 0 takes the likeliest token, and of equal ones that with the
        lowest id.
      top_k: draws from the k likeliest tokens; 0 from all.
      top_p: draws from the fewest likeliest tokens whose probabilities add up to this, above 0 to
        1; at least one.
      seed: seed of the random numbers.

    Raises:
      UserError: a value outside its range.
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
    """Draws a token id.

    Args:
      codes: integer logits. Their zero point shifts all alike and changes no probability.
      scale: real value of one code.

    Example:
      >>> sample(np.array([3, 9, 9]), 0.1, Sampling(), np.random.default_rng(0))
      1
    """
    if sampling.temperature == 0:
        return int(np.argmax(codes))
    return int(rng.choice(len(codes), p=probabilities(codes, scale, sampling)))


def probabilities(
    codes: Integer[np.ndarray, " v"], scale: float, sampling: Sampling
) -> Float64[np.ndarray, " v"]:
    """Returns p = softmax(codes scale / temperature), restricted to top-k and top-p.

    Of the k likeliest tokens, the fewest whose probabilities reach top_p of the sum over all k are
    kept. The others get 0, and the rest is scaled to a sum of 1. Integer logits often tie: among
    equals the lower id counts as likelier.

    Args:
      codes, scale: as `sample`.
      sampling: with a temperature above 0.

    Returns:
      (V,) float64.

    Example:
      >>> probabilities(np.array([0, 0, -1000]), 1.0, Sampling(temperature=1.0, top_k=2)).tolist()
      [0.5, 0.5, 0.0]
    """
    z = (codes.astype(np.float64) - codes.max()) * (scale / sampling.temperature)
    p = np.exp(z)
    order = np.argsort(-z, kind="stable")
    p /= p.sum()
    kept = len(p) if sampling.top_k == 0 else min(sampling.top_k, len(p))
    sums = np.cumsum(p[order[:kept]])
    # Tokens before the sum reaches top_p, and the one with which it does.
    kept = 1 + int(np.searchsorted(sums[:-1], sampling.top_p * sums[-1] - 1e-12))
    chosen = np.zeros_like(p)
    chosen[order[:kept]] = p[order[:kept]]
    return chosen / chosen.sum()
