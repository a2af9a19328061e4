"""What a plan is asked for: the model, the machine, the limits; and what of it makes no sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph import decoder
from qnpu_jax.models import EMBEDDED, Checkpoint
from qnpu_jax.output import OutputFolder
from qnpu_jax.plan import policies, targets
from qnpu_jax.plan.costs import Cost, cost
from qnpu_jax.plan.groups import Choices, choices
from qnpu_jax.plan.pairs import Losses
from qnpu_jax.plan.solver import Budget, solve
from qnpu_jax.recipes import EFFORTS, RECIPES, Effort, Recipe
from qnpu_jax.text import files

FRONT = (1.0, 1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3)
"""Budgets of the front: most that decode and prefill may take, by what the low plan takes. Where
there are no seconds they stand for as many sizes, from the low plan's to the high one's."""


@dataclass(frozen=True)
class PlanRequest:
    """Request of a plan.

    Attributes:
      model: name or path that `models.load` takes.
      soc: one of `targets.TARGETS`.
      low: recipe whose time is the measure of budgets, and that the plan is compared with.
      high: recipe of the most bits.
      within: most that decode and prefill may take, by what the low recipe takes.
      kl: nats per position that the plan may lose, before anything is learned or, where `effort`
        learns, after it; the fastest such plan is found.
      size: most bytes of weights.
      calibration: text to calibrate with and to measure on; None lets the model write its own.
      context: slots of the KV cache that decode reads.
      front: also find the plans of FRONT.
      baselines: names of `policies.POLICIES` whose plans are found for the budgets of FRONT too.
      effort: how much is learned from the plan before it is charged and solved a last time.
      pairs: pair terms that predictions have beside charges, at most; 0 measures none.
      sha256: of the model's weights, where it must be that one.
      least: recipe of the fewest bits; the plan is it in all else. None takes `narrow_scores` of
        the low one.
      windows: of each text, its end and that of Python's documentation, that charges and KL are
        measured on, at most; no fewer than `effort` keeps steps by, where it learns.
    """

    model: str
    soc: str
    low: Recipe
    high: Recipe
    within: float = math.inf
    kl: float = math.inf
    size: float = math.inf
    calibration: Path | None = None
    context: int = 512
    front: bool = True
    baselines: tuple[str, ...] = ()
    effort: Effort = EFFORTS["none"]
    pairs: int = 0
    sha256: str | None = None
    least: Recipe | None = None
    windows: int = EFFORTS["fast"].held_out

    @property
    def lowest(self) -> Recipe:
        """The recipe of the fewest bits."""
        return narrow_scores(self.low) if self.least is None else self.least


def narrow_scores(low: Recipe) -> Recipe:
    """Returns a recipe of the bits of w4a8 or w8a8 with scores and softmax of 8 bits, any other one
    as it is.

    8-bit ones save casts in every layer, which pay for more bits elsewhere; a plan gives 16 to
    those layers that need them (benchmarks/README.md, "Plans").
    """
    for name in ("w4a8", "w8a8"):
        if low.bits == RECIPES[name].bits:
            return replace(low, name=f"{low.name}s8", bits=RECIPES[f"{name}s8"].bits)
    return low


class Origin(NamedTuple):
    """What a folder of `quantize` was made of.

    Attributes:
      model: the float model, as `models.load` takes it.
      recipe: the recipe.
      sha256: of the model's weights; None where the folder does not say.
    """

    model: str
    recipe: Recipe
    sha256: str | None


def origin(folder: OutputFolder, model: str | None) -> Origin:
    """Reads what a folder was made of, to plan from its recipe.

    Args:
      model: where the float model is; None takes the one that the report names, if a package holds
        it.

    Raises:
      UserError: no model is named that is at hand.
    """
    source = folder.report.get("model") if model is None else model
    if model is None and source not in EMBEDDED:
        raise UserError(
            f"{folder.path}: made from {source}, which no package holds; expected the float model"
            " too; name it by --model"
        )
    return Origin(str(source), folder.recipe, folder.original_sha256)


def check(asked: PlanRequest) -> None:
    """Refuses what can be known to be wrong before the model is read, which takes a while."""
    its = targets.target(asked.soc)
    if its.rates is None and math.isfinite(asked.within):
        raise UserError(
            f"plan: --within for {its.name}, whose seconds are not estimated ({its.seconds});"
            " expected --size or --kl; give one of them"
        )
    policies.check(asked.baselines)
    if asked.baselines and not asked.front:
        raise UserError("plan: --baseline without a front to compare with; leave out --no-front")
    limits = (("within", asked.within), ("kl", asked.kl), ("size", asked.size / 1e6))
    for name, limit in limits:
        if not limit > 0:
            raise UserError(f"plan: --{name} {limit:g}; expected a number above 0; correct it")
    if all(math.isinf(limit) for _, limit in limits):
        raise UserError("plan: no budget; expected --within, --kl or --size; give one of them")
    if asked.calibration is not None:
        files.read_text(asked.calibration)
    if math.isfinite(asked.kl) and math.isfinite(asked.within):
        raise UserError(
            "plan: both --within and --kl; expected one: the first asks for the least KL in a"
            " time, the second for the least time at a KL; leave one out"
        )


def check_budget(asked: PlanRequest, checkpoint: Checkpoint) -> None:
    """Refuses another model, and what no plan can cost, before minutes pass."""
    if asked.sha256 not in (None, checkpoint.sha256):
        raise UserError(
            f"{asked.model}: not the model that the folder was quantized from, by its SHA-256;"
            " expected that one; correct --model"
        )
    staged = (decoder(checkpoint.config, r.bits, 1) for r in (asked.lowest, asked.high))
    found = choices(*staged)
    costs = cost(found, asked.soc, asked.context)
    nothing = Losses(0.0, np.zeros(len(found.groups)))
    most = budget(asked, costs, reference(found, asked.low.bits))
    solve(found, costs, nothing, replace(most, kl=math.inf))


def reference(found: Choices, low: BitPlan) -> list[bool]:
    """Finds the plan of the low recipe: which groups have more bits in it than in the lowest."""
    dec = decoder(found.low.config, low, found.low.tokens, found.low.prefix)
    graphs = {g.prefix: g for g in dec.graphs}
    more = [
        i
        for i, group in enumerate(found.groups)
        for m in group.members[:1]
        if graphs[m.prefix][m.name].quant.bits[m.layer] > group.low
    ]
    return found.closed([False] * len(found.groups), more)


def budget(asked: PlanRequest, cost: Cost, low: Sequence[bool]) -> Budget:
    """Returns the budget of a request.

    Args:
      low: the plan of the low recipe, by group.
    """
    return Budget(
        decode=asked.within * cost.decode(low),
        prefill=asked.within * cost.prefill(low),
        size=asked.size,
        kl=asked.kl,
    )


def limit(cost: Cost, factor: float, low: Sequence[bool]) -> Budget:
    """Returns a budget of `factor` times the low plan's seconds; where there are none, the size at
    the same place between the low and the high plan's as the factor has in FRONT."""
    if cost.timed:
        return Budget(factor * cost.decode(low), factor * cost.prefill(low))
    share = (factor - FRONT[0]) / (FRONT[-1] - FRONT[0])
    ends = cost.bytes(low), cost.bytes([True] * len(low))
    return Budget(size=ends[0] + share * (ends[1] - ends[0]))
