"""The one-step version of a plan: which activations of a model that is there should have 16 bits.

Charges are those of its diagnosis, measured in the simulator; seconds are those of `plan.costs`. A
group is priced with all that must follow it and with its casts. What KL falls by is a prediction:
raised tensors count as exact, and nothing is measured or learned again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from qnpu_jax.diagnose import Diagnosis
from qnpu_jax.errors import UserError
from qnpu_jax.graph import decoder
from qnpu_jax.output import OutputFolder
from qnpu_jax.plan.costs import Cost, cost
from qnpu_jax.plan.groups import Choices, choices
from qnpu_jax.plan.model_ties import ties
from qnpu_jax.plan.pairs import Losses
from qnpu_jax.plan.picks import fits
from qnpu_jax.plan.solver import Budget, solve
from qnpu_jax.recipes import Recipe
from qnpu_jax.width_ties import Ties

HIGH = 16
"""Bits of a raised activation."""


@dataclass(frozen=True)
class Priced:
    """Activations of a folder's model that could have 16 bits, and what that costs on an SoC.

    Attributes:
      recipe: what the folder was made by.
      ties: of the folder's model.
      choices: groups between the recipe's plan and that with all activations at 16 bits.
      budget: most that a suggested plan may cost.
    """

    recipe: Recipe
    ties: Ties
    choices: Choices
    cost: Cost
    budget: Budget


@dataclass(frozen=True)
class Suggestion:
    """A group of activations at 16 bits.

    Attributes:
      tensor: global name of its first tensor.
      along: names and patterns of what must have 16 bits with it.
      kl: predicted change of the KL, nats per position: what it and those are charged, negative.
      decode, prefill: change of a token's and a chunk's estimated time, relative to the folder's.
      taken: whether the suggested recipe has it.
    """

    tensor: str
    along: tuple[str, ...]
    kl: float
    decode: float
    prefill: float
    taken: bool


@dataclass(frozen=True)
class Suggested:
    """What a diagnosis suggests.

    Attributes:
      recipe: the folder's with the bits of all that is taken; None where nothing is.
      groups: by falling charge, those that are charged anything.
      lost: what all activations lose, nats per position: more cannot be won.
      kl: predicted change with all that is taken, nats per position.
      decode, prefill: relative change of the estimates with all that is taken.
      error: of the estimates of a token and of a chunk, relative.
    """

    recipe: Recipe | None
    groups: tuple[Suggestion, ...]
    lost: float
    kl: float
    decode: float
    prefill: float
    error: tuple[float, float]


def priced(folder: OutputFolder, soc: str, within: float = 1.01, context: int = 512) -> Priced:
    """Prices 16 bits for the activations of a folder's model.

    Args:
      within: most that a token and a chunk may take, by what the folder's model takes.
      context: slots of the KV cache that a token reads.

    Raises:
      UserError: an unknown SoC, or one without seconds; a limit that nothing meets, a context that
        does not fit, or a model whose activations all have 16 bits.
    """
    if not within > 0:
        raise UserError(f"suggest: --within {within:g}; expected a number above 0; correct it")
    recipe = folder.recipe
    config, prefix = folder.model.config, len(folder.model.prefix)
    known = ties(config)
    wide = [n for n in known.names if HIGH in known.widths[n]]
    if all(recipe.bits.bits(n) == HIGH for n in wide):
        raise UserError(
            f"suggest: every activation of {folder.path} has {HIGH} bits; expected some that have"
            " fewer; leave --suggest out"
        )
    high = recipe.bits.set_all(dict.fromkeys(wide, HIGH), known)
    found = choices(*(decoder(config, bits, 1, prefix) for bits in (recipe.bits, high)))
    prices = cost(found, soc, context)
    if not prices.timed:
        raise UserError(
            f"suggest: --soc {soc}: its seconds are not estimated; expected a target with seconds;"
            " choose one, or `qnpu plan` with --size"
        )
    none = [False] * len(found.groups)
    budget = Budget(within * prices.decode(none), within * prices.prefill(none))
    solve(found, prices, Losses(0.0, np.zeros(len(none))), budget)  # says what cannot be met
    return Priced(recipe, known, found, prices, budget)


def suggested(asked: Priced, found: Diagnosis) -> Suggested:
    """Chooses among the groups of a folder's model by its diagnosis."""
    charges = _charges(asked.choices, found)
    raised = solve(asked.choices, asked.cost, Losses(0.0, charges), asked.budget)
    raised = _needed(asked, charges, raised)
    order = [int(i) for i in np.argsort(-charges, kind="stable") if charges[i] > 0]
    groups = tuple(_suggestion(asked, charges, i, raised[i]) for i in order)
    recipe = None
    if any(raised):
        bits = dict.fromkeys(_names(asked, raised), HIGH)
        plan = asked.recipe.bits.set_all(bits, asked.ties)
        recipe = replace(asked.recipe, name=f"{asked.recipe.name}-suggested", bits=plan)
    lost = found.kl["simulator"] - found.kl["constants"]
    return Suggested(recipe, groups, lost, *_changes(asked, charges, raised), asked.cost.error)


def _charges(between: Choices, found: Diagnosis) -> Float64[np.ndarray, " g"]:
    """Sums the diagnosis's charges of the KL by group, nats per position.

    A charge that is no larger than its standard error over windows counts as 0: the best of many
    such are large by chance, and promise more than all activations lose.
    """
    rows = {row.tensor: row for row in found.rows}
    graphs = {g.prefix: g for g in between.low.graphs}
    charges = []
    for group in between.groups:
        names = [graphs[m.prefix].global_name(m.layer, m.name) for m in group.members]
        mine = [rows[n] for n in names if n in rows]
        nats = sum(row.kl or 0.0 for row in mine)
        error = math.sqrt(sum((row.error or 0.0) ** 2 for row in mine))
        charges.append(nats if nats > error else 0.0)
    return np.array(charges, np.float64)


def _needed(
    asked: Priced, charges: Float64[np.ndarray, " g"], raised: Sequence[bool]
) -> list[bool]:
    """Leaves low what is charged nothing, nothing raised needs, and saves no time by being high:
    to the solver both are one."""
    up, before = list(raised), None
    while up != before:
        before = list(up)
        for j in reversed(range(len(up))):
            without = [x and k != j for k, x in enumerate(up)]
            needed = any(up[i] for i, other in asked.choices.above if other == j)
            idle = up[j] and charges[j] == 0 and not needed
            if idle and fits(asked.cost, asked.budget, without):
                up = without
    return up


def _suggestion(
    asked: Priced, charges: Float64[np.ndarray, " g"], group: int, taken: bool
) -> Suggestion:
    up = asked.choices.closed([False] * len(charges), (group,))
    first = asked.choices.groups[group].name
    others = [n for n in _names(asked, up) if n != first]
    along = asked.ties.patterns(others, [first])
    return Suggestion(first, tuple(along), *_changes(asked, charges, up), taken)


def _changes(
    asked: Priced, charges: Float64[np.ndarray, " g"], raised: Sequence[bool]
) -> tuple[float, float, float]:
    """Changes of the KL, and relative ones of a token's and a chunk's time."""
    low, cost = [False] * len(raised), asked.cost
    decode, prefill = cost.decode(low), cost.prefill(low)
    kl = -float(charges @ np.asarray(raised, float))
    return kl, cost.decode(raised) / decode - 1, cost.prefill(raised) / prefill - 1


def _names(asked: Priced, raised: Sequence[bool]) -> list[str]:
    """Global names of raised tensors that a plan decides."""
    graphs = {g.prefix: g for g in asked.choices.low.graphs}
    names = {
        graphs[m.prefix].global_name(m.layer, m.name)
        for group, up in zip(asked.choices.groups, raised, strict=True)
        if up
        for m in group.members
    }
    return [n for n in asked.ties.names if n in names]
