"""A calibrated model with the windows and costs by which all plans of it are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import jax
import numpy as np
from jaxtyping import Float64, Int

from qnpu_jax.plan.charges import Mixed, divergences
from qnpu_jax.plan.costs import Cost
from qnpu_jax.progress import Observer


@dataclass(frozen=True)
class Point:
    """A plan with what it costs.

    Attributes:
      name: of the budget or recipe that it comes from.
      raised: groups at their high bits, by number.
      predicted: nats per position by the charges that found it; NaN where none did.
      kls: nats per position, measured, by window.
      decode, prefill: estimated seconds of a token and of a chunk; NaN where the target has none.
      size: bytes of weights.
      casts: QUANTIZE ops that depend on the plan.
    """

    name: str
    raised: tuple[bool, ...]
    predicted: float
    kls: tuple[float, ...]
    decode: float
    prefill: float
    size: float
    casts: int

    @property
    def kl(self) -> float:
        """Nats per position, measured: the mean over windows."""
        return fmean(self.kls)


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything that all plans of a model share.

    Attributes:
      model: the decoder between its low and its high plan.
      cost: of its groups.
      windows: token ids that the KL is measured on.
      references: logits of the float model after its prefix, for each window.
      watch: hears of progress.
    """

    model: Mixed
    cost: Cost
    windows: Int[np.ndarray, "n t"]
    references: Sequence[jax.Array]
    watch: Observer

    def point(
        self,
        name: str,
        raised: Sequence[bool],
        predicted: float,
        kls: Float64[np.ndarray, " n"] | None = None,
    ) -> Point:
        """Costs a plan, and measures its KL where that is not given by window."""
        c = self.cost
        kls = self.measured(raised) if kls is None else kls
        costs = (c.decode(raised), c.prefill(raised), c.bytes(raised), c.casting(raised))
        return Point(name, tuple(map(bool, raised)), predicted, tuple(map(float, kls)), *costs)

    def measured(self, raised: Sequence[bool]) -> Float64[np.ndarray, " n"]:
        """Measures the KL of a plan, by window."""
        return divergences(self.model, self.windows, self.references, raised)


def standard_error(x: Sequence[float] | Float64[np.ndarray, " n"]) -> float:
    """Computes std(x) / sqrt(n), with n - 1 degrees of freedom; NaN of fewer than two values.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
