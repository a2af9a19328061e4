"""The proof of a written model: every tensor of the file, run by LiteRT, equals the simulator's,
and no accumulator can overflow.

The simulator comes in as an argument (`Simulate`): this package never imports it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.graph import Positions
from qnpu_jax.integer import Bound, IntegerModel, Simulator, check_accumulators, proved_bounds
from qnpu_jax.progress import Clock
from qnpu_jax.proof.comparison import compare, op_names
from qnpu_jax.tflite import LiteRT


def bound(model: IntegerModel, tokens: int, logits: Positions) -> list[Bound]:
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
) -> dict[str, Any]:
    """Compares every tensor of a file, in LiteRT's reference kernels, with the simulator's.

    Args:
      runner: of the file, with its tensors kept.
      simulator: of the same length and positions.
      ids: (T,) real text.

    Returns:
      Report entries `verify` (tensors, elements, differing, differences) and `accumulators`: proved
      bounds (codes, bits) and the largest that this run saw.

    Raises:
      UserError: an accumulator can overflow at this length.
    """
    with clock.stage("verify"):
        runner.run(ids)
        tensors = simulator.tensors(ids)
        ops = op_names(model.decoder(len(ids), logits=runner.logits))
        comparison = compare(runner.tensors(), tensors, ops)
    with clock.stage("accumulators"):
        bounds = bound(model, len(ids), runner.logits)
        seen = simulator.accumulators(tensors)
    rows = [dataclasses.asdict(b) | {"needed": b.needed, "seen": seen[b.tensor]} for b in bounds]
    closest = min(rows, key=lambda row: row["available"] - row["needed"])
    return {
        "verify": {
            "tensors": comparison.tensors,
            "elements": comparison.elements,
            "differing": comparison.differing,
            "differences": [str(d) for d in comparison.differences],
        },
        "accumulators": {"closest": closest, "all": artifacts.columns(rows)},
    }
