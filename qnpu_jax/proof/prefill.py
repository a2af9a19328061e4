"""The proof of a written model: every tensor of the file, run by LiteRT, equals the simulator's,
and no accumulator can overflow.

The simulator comes in as an argument (`Simulate`): this package never imports it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.graph import Positions
from qnpu_jax.integer import Bound, IntegerModel, Simulator, check_accumulators, proved_bounds
from qnpu_jax.progress import Clock
from qnpu_jax.proof.comparison import Comparison, compare_tensors, op_names
from qnpu_jax.tflite import LiteRT


@dataclass(frozen=True)
class ProvedAccumulator:
    """An op's accumulator: what is proved of it, and what one run used.

    Attributes:
      bound: largest and smallest sum that the weights allow.
      seen: bits that the run used.
    """

    bound: Bound
    seen: int

    def to_json(self) -> dict[str, Any]:
        """The fields of the bound, `needed` and `seen`, in bits."""
        return dataclasses.asdict(self.bound) | {"needed": self.bound.needed, "seen": self.seen}


@dataclass(frozen=True)
class PrefillProof:
    """A file of one prefill compared with the simulator, and its accumulators.

    Attributes:
      comparison: of every tensor that LiteRT computes.
      accumulators: of every op that sums products, in the order of the graph.
    """

    comparison: Comparison
    accumulators: tuple[ProvedAccumulator, ...]

    @property
    def closest(self) -> ProvedAccumulator:
        """The accumulator with the fewest bits to spare."""
        return min(self.accumulators, key=lambda a: a.bound.available - a.bound.needed)

    def to_json(self) -> dict[str, Any]:
        """The entries `verify` and `accumulators` of report.json."""
        rows = artifacts.columns(a.to_json() for a in self.accumulators)
        return {
            "verify": self.comparison.to_json(),
            "accumulators": {"closest": self.closest.to_json(), "all": rows},
        }


def bound_accumulators(model: IntegerModel, tokens: int, logits: Positions) -> list[Bound]:
    """What the accumulators of a signature can reach, from the actual weights.

    Raises:
      UserError: one can overflow, which depends on the length.
    """
    dec = model.decoder(tokens, logits=logits)
    bounds = proved_bounds(dec, model.tensors)
    check_accumulators(bounds)
    return bounds


def prove_prefill(
    model: IntegerModel, runner: LiteRT, simulator: Simulator, ids: np.ndarray, clock: Clock
) -> PrefillProof:
    """Compares every tensor of a file, in LiteRT's reference kernels, with the simulator's.

    Args:
      runner: of the file, with its tensors kept.
      simulator: of the same length and positions.
      ids: (T,) real text.

    Raises:
      UserError: an accumulator can overflow at this length.
    """
    with clock.stage("verify"):
        runner.run(ids)
        tensors = simulator.tensors(ids)
        ops = op_names(model.decoder(len(ids), logits=runner.logits))
        comparison = compare_tensors(runner.tensors(), tensors, ops)
    with clock.stage("accumulators"):
        bounds = bound_accumulators(model, len(ids), runner.logits)
        seen = simulator.accumulators(tensors)
    accumulators = tuple(ProvedAccumulator(b, seen[b.tensor]) for b in bounds)
    return PrefillProof(comparison, accumulators)
