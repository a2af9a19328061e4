"""Proof of a file with one prefill: every tensor, run by LiteRT, equals the simulator's, and no
accumulator can overflow.
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
    """Accumulator of an op: its proved bound, and the bits that one run used.

    Attributes:
      bound: smallest and largest sum that the weights allow.
      seen: bits that the run used.
    """

    bound: Bound
    seen: int

    def to_json(self) -> dict[str, Any]:
        """Returns the fields of the bound, and `needed` and `seen` in bits."""
        return dataclasses.asdict(self.bound) | {"needed": self.bound.needed, "seen": self.seen}


@dataclass(frozen=True)
class PrefillProof:
    """Result of `prove_prefill`.

    Attributes:
      comparison: every tensor that LiteRT computes against the simulator's.
      accumulators: one for each op that sums products, in the order of the graph.
    """

    comparison: Comparison
    accumulators: tuple[ProvedAccumulator, ...]

    @property
    def closest(self) -> ProvedAccumulator:
        """Accumulator with the fewest bits to spare."""
        return min(self.accumulators, key=lambda a: a.bound.available - a.bound.needed)

    def to_json(self) -> dict[str, Any]:
        """Returns the entries `verify` and `accumulators` of report.json."""
        rows = artifacts.columns(a.to_json() for a in self.accumulators)
        return {
            "verify": self.comparison.to_json(),
            "accumulators": {"closest": self.closest.to_json(), "all": rows},
        }


def bound_accumulators(model: IntegerModel, tokens: int, logits: Positions) -> list[Bound]:
    """Bounds the accumulators of a signature by the model's weights.

    Args:
      tokens: of the signature, on which sums over keys depend.

    Returns:
      One bound for each op that sums products, in the order of the graph.

    Raises:
      UserError: an accumulator can overflow at this length.
    """
    dec = model.decoder(tokens, logits=logits)
    bounds = proved_bounds(dec, model.tensors)
    check_accumulators(bounds)
    return bounds


def prove_prefill(
    model: IntegerModel, runner: LiteRT, simulator: Simulator, ids: np.ndarray, clock: Clock
) -> PrefillProof:
    """Compares every tensor of a file, run by LiteRT, with the simulator's; bounds accumulators.

    Args:
      runner: opened on the file, with its tensors kept.
      simulator: of the same length, positions and kernels.
      ids: (T,) token ids of some text.
      clock: takes down the seconds of the stages `verify` and `accumulators`.

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
