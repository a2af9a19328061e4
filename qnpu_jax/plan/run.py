"""Plans: from a model to the widths of its tensors, and the front that they lie on.

The incumbent is the plan of the fewest bits at first. Its charges are measured, the program is
solved, and the KL of what it found is measured: that is the incumbent of the next round, in which
it may change no more than a tenth of the groups. Charges of raised groups stay those of the last
round in which they were low. The plan of least measured KL within the budget is kept, never one of
least prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from qnpu_jax import artifacts
from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph import decoder
from qnpu_jax.latency import roofline
from qnpu_jax.learn import learns
from qnpu_jax.models import load
from qnpu_jax.plan import feasible, policies, targets
from qnpu_jax.plan.bench import Bench, Point, standard_error
from qnpu_jax.plan.charges import charges
from qnpu_jax.plan.groups import Choices, Group, choices
from qnpu_jax.plan.pairs import Losses, Pair, pair_terms, significant
from qnpu_jax.plan.policies import UNIFORM
from qnpu_jax.plan.prepared import Prepared, planned, prepared, relearned
from qnpu_jax.plan.request import FRONT, PlanRequest, budget, check, check_budget, limit, reference
from qnpu_jax.plan.scores import Known
from qnpu_jax.plan.solver import Budget, Near, solve
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import Recipe

ROUNDS = 3
"""Times that the program is solved for what is asked for."""
CHANGES = 0.1
"""Share of the groups that may change in a round after the first."""
RECIPE, FIGURE, RECIPES = "plan.json", "plan.svg", "front"
KIND = artifacts.Kind("qnpu plan", frozenset({RECIPE, "front.json", FIGURE, RECIPES}), "front.json")


@dataclass(frozen=True)
class Plan:
    """Result of planning.

    Attributes:
      recipe: of the plan.
      chosen: the plan.
      least, low, high: the plans of the recipes of the fewest bits, that the plan is compared with,
        and of the most bits; the first two may be one.
      front: plans of other budgets, by rising decode.
      charges: of each group in the least plan, nats per position, and their standard errors.
      error: of the estimates of decode and prefill, relative; NaN where there are none.
      baselines: plans of other planners by the name of their policy, one a budget of the front.
      beside: plans that cost no more than the uniform ones of `baselines`.
      learned: the plan that something was learned from, measured after that, and the plan that is
        best then; none where nothing learns.
    """

    recipe: Recipe
    choices: Choices
    chosen: Point
    least: Point
    low: Point
    high: Point
    front: tuple[Point, ...]
    charges: Float64[np.ndarray, " g"]
    errors: Float64[np.ndarray, " g"]
    error: tuple[float, float]
    baselines: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    beside: tuple[Point, ...] = ()
    learned: tuple[Point, ...] = ()

    @property
    def timed(self) -> bool:
        """Whether seconds are estimated."""
        return not math.isnan(self.low.decode)


Draw = Callable[[Plan, Path], None]
"""Draws a plan into a file."""


def plan(asked: PlanRequest, watch: Observer) -> Plan:
    """Finds the plan that a request asks for.

    Raises:
      UserError: a budget that nothing meets, an SoC that is not known, a recipe or text that does
        not fit the model.
    """
    check(asked)
    with watch.stage("load"):
        checkpoint = load(asked.model)
        its = targets.target(asked.soc)
        asked = _feasible(its, checkpoint.config, asked)
        check_budget(asked, checkpoint)
    ready = prepared(asked, checkpoint, watch)
    bench, found = ready.bench, ready.bench.model.choices
    none, every = [False] * len(found.groups), [True] * len(found.groups)
    with watch.stage("charge"):
        first = charges(bench.model, bench.windows, bench.references, none)
    average, base = first.groups.mean(0), float(first.base.mean())
    spread = first.groups.std(0, ddof=1) / math.sqrt(len(first.groups))
    losses = _losses(asked, bench, average, base)
    least = bench.point(asked.lowest.name, none, float(first.kl.mean()), first.kl)
    same = reference(found, asked.low.bits)
    low = bench.point(asked.low.name, same, losses.predicted(same)) if any(same) else least
    high = bench.point(asked.high.name, every, base)
    if asked.kl < high.kl:
        raise UserError(
            f"budget: no plan meets it (KL {asked.kl:.4g} nats, at least {high.kl:.4g}, which"
            f" {asked.high.name} loses before anything is learned); allow more"
        )
    with watch.stage("plan"):
        chosen = _best(bench, budget(asked, bench.cost, same), losses)
        if chosen.kl > asked.kl:
            chosen = replace(high, name=chosen.name)
    limits = {f"{f:.2f}": limit(bench.cost, f, same) for f in FRONT} if asked.front else {}
    front = _front(bench, limits, losses)
    chosen, learned = _learned(asked, ready, chosen, losses, watch)
    known = Known(bench, average, base)
    others = policies.baselines(known, asked.baselines, limits, (least, low, high, *front))
    uniform = {f"at {p.name}": _cost_of(p) for p in others.get(UNIFORM, ())}
    beside = _front(bench, uniform, losses)
    recipe = planned(ready.recipe, found, chosen.raised, f"{asked.low.name}-plan")
    return Plan(
        recipe, found, chosen, least, low, high, front, average, spread, bench.cost.error, others,
        beside, learned,
    )  # fmt: skip


def _feasible(its: targets.Target, config: ModelConfig, asked: PlanRequest) -> PlanRequest:
    """Narrows the recipes of a request to what a target has kernels for."""
    low, high = feasible.recipes(its, config, asked.low, asked.high)
    fewest = asked.lowest
    if fewest is asked.low:
        return replace(asked, low=low, high=high, least=low)
    try:
        choices(*(decoder(config, r.bits, 1) for r in (fewest, asked.low)))
    except UserError as error:
        raise UserError(f"--least {fewest.name}, as low, and {low.name}: {error}") from None
    least, high = feasible.recipes(its, config, fewest, asked.high)
    return replace(asked, low=low, high=high, least=least)


def _cost_of(p: Point) -> Budget:
    """A budget that a plan keeps exactly."""
    if math.isnan(p.decode):
        return Budget(size=p.size)
    return Budget(p.decode, p.prefill)


def _losses(
    asked: PlanRequest, bench: Bench, charged: Float64[np.ndarray, " g"], base: float
) -> Losses:
    """Predicts by the charges of the least plan, and by its pair terms where they are asked for."""
    found, none = bench.model.choices, [False] * len(charged)
    pairs: tuple[Pair, ...] = ()
    if asked.pairs:
        with bench.watch.stage("pairs"):
            count = bench.watch.track(range(len(bench.windows)), len(bench.windows), "pairs")
            rows = [
                pair_terms(bench.model, bench.windows[[i]], [bench.references[i]], none)
                for i in count
            ]
        pairs = significant(found, np.concatenate(rows), asked.pairs)
    return Losses(base, charged, pairs).charged(charged, none)


def _front(bench: Bench, limits: Mapping[str, Budget], losses: Losses) -> tuple[Point, ...]:
    """Solves for each budget in turn, and measures.

    A charge falls where others do: what a plan leaves low is charged anew for the next one. After
    the last there is none.
    """
    points: list[Point] = []
    watch = bench.watch
    if not limits:
        return ()
    with watch.stage("front"):
        for name, most in watch.track(limits.items(), len(limits), "front"):
            raised = solve(bench.model.choices, bench.cost, losses, most)
            predicted, kls = losses.predicted(raised), None
            if len(points) < len(limits) - 1:
                now = charges(bench.model, bench.windows, bench.references, raised)
                kls, losses = now.kl, losses.charged(now.groups.mean(0), raised)
            points.append(bench.point(name, raised, predicted, kls))
    return tuple(points)


def _best(bench: Bench, most: Budget, losses: Losses) -> Point:
    """Solves, measures, and solves again from there.

    Where a KL is asked for, what is predicted may lose as much less as the last plan lost more.
    """
    found, near, aimed = bench.model.choices, None, most
    best: Point | None = None
    for left in reversed(range(ROUNDS)):
        raised = solve(found, bench.cost, losses, aimed, near)
        predicted, kls = losses.predicted(raised), None
        if left:
            now = charges(bench.model, bench.windows, bench.references, raised)
            kls, losses = now.kl, losses.charged(now.groups.mean(0), raised)
        point = bench.point("plan", raised, predicted, kls)
        if best is None or _rank(point, most) < _rank(best, most):
            best = point
        near = Near(raised, max(1, round(CHANGES * len(raised))))
        if math.isfinite(most.kl):
            # Not below what raising all is predicted to lose: that always is a plan.
            more = max(0.0, point.kl - losses.predicted(raised))
            aimed = replace(most, kl=max(losses.base, most.kl - more))
            near = None
    assert best is not None
    return best


def _learned(
    asked: PlanRequest, ready: Prepared, chosen: Point, losses: Losses, watch: Observer
) -> tuple[Point, tuple[Point, ...]]:
    """Learns from a plan, charges it anew, and solves again from there.

    What learning mends needs no bits: groups that are low have errors as learned, those that are
    high and are lowered have them as rounded.

    Returns:
      The plan that is measured best after that, with the KL that it had before, and both plans as
      measured after it.
    """
    if not learns(asked.lowest, asked.effort):
        return chosen, ()
    with watch.stage("learn"):
        bench = relearned(ready, chosen.raised, asked.effort, watch)
    with watch.stage("plan"):
        now = charges(bench.model, bench.windows, bench.references, chosen.raised)
        first = bench.point("plan, learned", chosen.raised, chosen.predicted, now.kl)
        losses = replace(losses, base=float(now.base.mean()))
        losses = losses.charged(now.groups.mean(0), chosen.raised)
        near = Near(chosen.raised, max(1, round(CHANGES * len(chosen.raised))))
        most = budget(asked, bench.cost, reference(bench.model.choices, asked.low.bits))
        if losses.base > most.kl:
            return chosen, (first,)
        raised = solve(bench.model.choices, bench.cost, losses, most, near)
        again = bench.point("solved again", raised, losses.predicted(raised))
        if _rank(again, most) < _rank(first, most):
            chosen = ready.bench.point(chosen.name, raised, again.predicted)
    return chosen, (first, again)


def _rank(point: Point, most: Budget) -> tuple[bool, float]:
    """Order of plans: the least KL; where a KL is asked for, the fastest that keeps it, or the
    smallest."""
    if math.isinf(most.kl):
        return False, point.kl
    missed, seconds = point.kl > most.kl, point.decode + point.prefill
    return missed, point.kl if missed else point.size if math.isnan(seconds) else seconds


def write_plan(made: Plan, out: Path, overwrite: bool, draw: Draw | None = None) -> None:
    """Writes the folder of a plan, whole or not at all; in its folder RECIPES one recipe for each
    plan of the front.

    Args:
      out: new, empty, or of an earlier plan with `overwrite`.
      draw: draws the front; None leaves it out.

    Raises:
      UserError: `out` holds other files, or cannot be written.
    """
    with artifacts.writing(out, overwrite, KIND) as folder:
        artifacts.write_json(folder / RECIPE, made.recipe.to_json())
        artifacts.write_json(folder / KIND.mark, to_json(made))
        for point in made.front:
            (folder / RECIPES).mkdir(exist_ok=True)
            name = f"{made.recipe.name}-{point.name}"
            recipe = planned(made.recipe, made.choices, point.raised, name)
            artifacts.write_json(folder / RECIPES / f"{point.name}.json", recipe.to_json())
        if draw is not None:
            draw(made, folder / FIGURE)


def _or_null(x: float) -> float | None:
    return x if math.isfinite(x) else None


def to_json(made: Plan) -> dict[str, Any]:
    """The contents of front.json."""
    groups = made.choices.groups
    return {
        "format": 1,
        "recipe": made.recipe.name,
        "seconds": roofline.LABEL if made.timed else None,
        "errors": {"decode": _or_null(made.error[0]), "prefill": _or_null(made.error[1])},
        "points": [
            _row(p, groups)
            for p in (made.chosen, *ends(made), *made.front, *made.beside, *made.learned)
        ],
        "baselines": [
            {
                "policy": name, "about": policies.POLICIES[name].about,
                "source": policies.POLICIES[name].source,
                "points": [_row(p, groups) for p in points],
            }
            for name, points in made.baselines.items()
        ],
        "exceptions": [
            {k: x if isinstance(x, str) else _or_null(x) for k, x in e._asdict().items()}
            for e in exceptions(made)
        ],
        "groups": [
            {"name": g.name, "bits": [g.low, g.high], "charge": float(a), "error": float(e)}
            for g, a, e in zip(groups, made.charges, made.errors, strict=True)
        ],
    }  # fmt: skip


def ends(made: Plan) -> tuple[Point, ...]:
    """The plans of the recipes, from the fewest bits to the most, each once."""
    least = () if made.least.raised == made.low.raised else (made.least,)
    return (*least, made.low, made.high)


def exceptions(made: Plan) -> tuple[policies.Exceeded, ...]:
    """Finds the points of other planners that the front does not dominate."""
    ours = (*ends(made), *made.front, *made.beside)
    return policies.exceptions(ours, made.baselines)


def _row(p: Point, groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "name": p.name, "predicted": _or_null(p.predicted), "kl": p.kl,
        "error": _or_null(standard_error(p.kls)), "decode": _or_null(p.decode),
        "prefill": _or_null(p.prefill), "size": p.size, "casts": p.casts,
        "raised": [g.name for g, up in zip(groups, p.raised, strict=True) if up],
    }  # fmt: skip
