"""How a planner turns scores of groups into a plan within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from qnpu_jax.plan.bench import Bench
from qnpu_jax.plan.costs import Cost
from qnpu_jax.plan.pairs import Losses
from qnpu_jax.plan.solver import Budget, solve

ATTEMPTS = 8
"""Times that a program without casts is solved for a budget that its plan keeps with them."""

Pick = Callable[[Bench, Float64[np.ndarray, " g"], Budget], list[bool]]
"""Chooses the groups to raise by their scores; a group of score -inf is not asked for."""


def fits(cost: Cost, budget: Budget, raised: Sequence[bool]) -> bool:
    """Tells whether a plan keeps a budget of time and size, casts included."""
    if not cost.timed:
        return cost.bytes(raised) <= budget.size * (1 + 1e-9)
    spent = (cost.decode(raised), cost.prefill(raised), cost.bytes(raised))
    most = (budget.decode, budget.prefill, budget.size)
    # Sums of floats in another order: the low plan is within 1.00 of itself.
    return all(a <= b * (1 + 1e-9) for a, b in zip(spent, most, strict=True))


def greedy(bench: Bench, scores: Float64[np.ndarray, " g"], budget: Budget) -> list[bool]:
    """Raises groups by falling score with what must follow them, and skips what does not fit."""
    up = [False] * len(scores)
    for i in _order(scores):
        more = bench.model.choices.closed(up, (i,))
        if not up[i] and fits(bench.cost, budget, more):
            up = more
    return up


def threshold(bench: Bench, scores: Float64[np.ndarray, " g"], budget: Budget) -> list[bool]:
    """Raises all groups above the lowest score for which the plan keeps the budget.

    The cost may fall on the way, where casts go: the longest prefix that fits is taken.
    """
    none = [False] * len(scores)
    kept = up = none
    for i in _order(scores):
        up = bench.model.choices.closed(up, (i,))
        if fits(bench.cost, budget, up):
            kept = up
    return kept


def program(bench: Bench, scores: Float64[np.ndarray, " g"], budget: Budget) -> list[bool]:
    """Solves our program with scores in place of charges."""
    return solve(bench.model.choices, bench.cost, _losses(scores), budget)


def program_without_casts(
    bench: Bench, scores: Float64[np.ndarray, " g"], budget: Budget
) -> list[bool]:
    """Solves our program as if casts took no time, for a budget that the plan keeps with them.

    From the budget goes the time of the casts of the last plan that broke it, at first of the low
    plan. Where no attempt keeps the budget, nothing is raised.
    """
    cost, none = bench.cost, [False] * len(scores)
    if not cost.timed:
        return program(bench, scores, budget)
    free, casts = replace(cost, casts=()), cost.casting(none)
    for _ in range(ATTEMPTS):
        left = replace(
            budget, decode=budget.decode - casts * cost.op, prefill=budget.prefill - casts * cost.op
        )
        if not fits(free, left, none):
            break
        up = solve(bench.model.choices, free, _losses(scores), left)
        if fits(cost, budget, up):
            return up
        casts = max(casts + 1, cost.casting(up))
    return none


PICKS: dict[str, Pick] = {
    "greedy": greedy,
    "threshold": threshold,
    "program": program,
    "program without casts": program_without_casts,
}
"""Picks by name."""


def _order(scores: Float64[np.ndarray, " g"]) -> Iterator[int]:
    """Groups by falling score, those of -inf left out; ties in the order of the graph."""
    order = np.argsort(-scores, kind="stable")
    return (int(i) for i in order if scores[i] > -np.inf)


def _losses(scores: Float64[np.ndarray, " g"]) -> Losses:
    """Scores in place of charges; below 0 they count as 0."""
    return Losses(0.0, np.maximum(scores, 0.0))
