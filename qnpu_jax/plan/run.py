"""Plans: from a model to the widths of its tensors, and the front that they lie on.

The incumbent is the low plan at first. Its charges are measured, the program is solved, and the KL
of what it found is measured: that is the incumbent of the next round, in which it may change no
more than a tenth of the groups. Charges of raised groups stay those of the last round in which they
were low. The plan of least measured KL within the budget is kept, never one of least prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from qnpu_jax import artifacts, pipeline
from qnpu_jax.errors import UserError
from qnpu_jax.graph import decoder
from qnpu_jax.latency import roofline
from qnpu_jax.learn import learn
from qnpu_jax.measure import float_logits
from qnpu_jax.models import Checkpoint, load
from qnpu_jax.plan import policies
from qnpu_jax.plan.bench import Bench, Point, predicted, standard_error
from qnpu_jax.plan.charges import charges, mixed
from qnpu_jax.plan.costs import Cost, cost
from qnpu_jax.plan.groups import Choices, Group, choices
from qnpu_jax.plan.scores import Known
from qnpu_jax.plan.solver import Budget, Near, solve
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import EFFORTS, Recipe
from qnpu_jax.text import excerpts, files, starts_of

ROUNDS = 3
"""Times that the program is solved for what is asked for; for the front's other budgets once."""
CHANGES = 0.1
"""Share of the groups that may change in a round after the first."""
FRONT = (1.0, 1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3)
"""Budgets of the front: most that decode and prefill may take, by what the low plan takes."""


RECIPE, FIGURE = "plan.json", "plan.svg"
KIND = artifacts.Kind("qnpu plan", frozenset({RECIPE, "front.json", FIGURE}), "front.json")


@dataclass(frozen=True)
class PlanRequest:
    """Request of a plan.

    Attributes:
      model: name or path that `models.load` takes.
      soc: one of `roofline.SOCS`.
      low, high: recipes between whose bits the plan lies; it is the low one in all else.
      within: most that decode and prefill may take, by what the low recipe takes.
      kl: nats per position that the plan may lose; the fastest such plan is found.
      size: most bytes of weights.
      calibration: text to calibrate with and to measure on; None lets the model write its own.
      context: slots of the KV cache that decode reads.
      front: also find the plans of FRONT.
      baselines: names of `policies.POLICIES` whose plans are found for the budgets of FRONT too.
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


@dataclass(frozen=True)
class Plan:
    """Result of planning.

    Attributes:
      recipe: of the plan.
      chosen: the plan.
      low, high: the plans at either end.
      front: plans of other budgets, by rising decode.
      charges: of each group in the low plan, nats per position, and their standard errors.
      error: of the estimates of decode and prefill, relative.
      baselines: plans of other planners by the name of their policy, one a budget of the front.
    """

    recipe: Recipe
    choices: Choices
    chosen: Point
    low: Point
    high: Point
    front: tuple[Point, ...]
    charges: Float64[np.ndarray, " g"]
    errors: Float64[np.ndarray, " g"]
    error: tuple[float, float]
    baselines: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)


Draw = Callable[[Plan, Path], None]
"""Draws a plan into a file."""


def plan(asked: PlanRequest, watch: Observer) -> Plan:
    """Finds the plan that a request asks for.

    Raises:
      UserError: a budget that nothing meets, an SoC that is not known, a recipe or text that does
        not fit the model.
    """
    _check(asked)
    with watch.stage("load"):
        checkpoint = load(asked.model)
        _check_budget(asked, checkpoint)
    bench = _bench(asked, checkpoint, watch)
    found = bench.model.choices
    none, every = [False] * len(found.groups), [True] * len(found.groups)
    with watch.stage("charge"):
        first = charges(bench.model, bench.windows, bench.references, none)
    average, base = first.groups.mean(0), float(first.base.mean())
    spread = first.groups.std(0, ddof=1) / math.sqrt(len(first.groups))
    low = bench.point(asked.low.name, none, float(first.kl.mean()), first.kl)
    high = bench.point(asked.high.name, every, base)
    if asked.kl < high.kl:
        raise UserError(
            f"budget: no plan meets it (KL {asked.kl:.4g} nats, at least {high.kl:.4g}, which"
            f" {asked.high.name} loses before anything is learned); allow more"
        )
    with watch.stage("plan"):
        chosen = _best(bench, _budget(asked, bench.cost), average, base)
        if chosen.kl > asked.kl:
            chosen = replace(high, name=chosen.name)
        limits = _limits(low) if asked.front else {}
        front = tuple(
            _once(name, bench, budget, average, base)
            for name, budget in watch.track(limits.items(), len(limits), "plan")
        )
    others = policies.baselines(
        Known(bench, average, base), asked.baselines, limits, (low, high, *front)
    )
    bits = found.plan(chosen.raised)
    recipe = replace(asked.low, name=f"{asked.low.name}-plan", bits=bits)
    return Plan(recipe, found, chosen, low, high, front, average, spread, bench.cost.error, others)


def _limits(low: Point) -> dict[str, Budget]:
    """The budgets of FRONT by name."""
    return {f"{f:.2f}": Budget(f * low.decode, f * low.prefill) for f in FRONT}


def _check(asked: PlanRequest) -> None:
    """Refuses what can be known to be wrong before the model is read, which takes a while."""
    roofline.soc(asked.soc)
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


def _check_budget(asked: PlanRequest, checkpoint: Checkpoint) -> None:
    """Refuses recipes that do not fit the model, and what no plan can cost, before minutes pass."""
    staged = (decoder(checkpoint.config, r.bits, 1) for r in (asked.low, asked.high))
    found = choices(*staged)
    if not found.groups:
        raise UserError(
            f"plan: {asked.low.name} and {asked.high.name} give every tensor the same bits;"
            " expected two that differ; choose another --low or --high"
        )
    costs = cost(found, asked.soc, asked.context)
    none = np.zeros(len(found.groups))
    solve(found, costs, none, replace(_budget(asked, costs), kl=math.inf))


def _budget(asked: PlanRequest, cost: Cost) -> Budget:
    low = [False] * len(cost.more_size)
    return Budget(
        decode=asked.within * cost.decode(low),
        prefill=asked.within * cost.prefill(low),
        size=asked.size,
        kl=asked.kl,
    )


def _bench(asked: PlanRequest, checkpoint: Checkpoint, watch: Observer) -> Bench:
    """Prepares, calibrates and rounds the low plan, and gets the float model's logits."""
    effort, recipe = EFFORTS["fast"], asked.low
    with watch.stage("fold, rotate"):
        params = pipeline.prepare(checkpoint.config, checkpoint.params, recipe)
    judges = excerpts.judged(checkpoint, effort)
    with watch.stage("calibration text"):
        if asked.calibration is None:
            steps = lambda steps, n: watch.track(steps, n, "calibration text")  # noqa: E731
            read = excerpts.written(checkpoint, params, recipe, effort, steps)
        else:
            read = excerpts.given(asked.calibration, checkpoint, recipe, effort)
    text = excerpts.windows_of(*read, judges)
    begun = pipeline.with_prefix(
        checkpoint.config, params, recipe, text, starts_of(checkpoint.tokenizer), watch
    )
    calibrated = pipeline.calibrated(begun, recipe, text, watch)
    with watch.stage("round"):
        rounded = learn(calibrated, recipe, EFFORTS["none"], text)
    windows = text.held_out
    ends = (asked.low.bits, asked.high.bits)
    staged = [decoder(begun.config, bits, windows.shape[1], len(begun.tokens)) for bits in ends]
    found = choices(*staged)
    model = mixed(found, calibrated.params, rounded.params, rounded.free, recipe.weight_init)
    floats = {n: jnp.asarray(x) for n, x in calibrated.params.items()}
    logits = float_logits(begun.config, recipe.bits, floats)
    references = [jnp.asarray(logits(ids)) for ids in windows]
    return Bench(model, cost(found, asked.soc, asked.context), windows, references, watch)


def _once(
    name: str, bench: Bench, budget: Budget, charged: Float64[np.ndarray, " g"], base: float
) -> Point:
    """Solves and measures."""
    raised = solve(bench.model.choices, bench.cost, charged, budget, base)
    return bench.point(name, raised, predicted(charged, raised, base))


def _best(bench: Bench, budget: Budget, charged: Float64[np.ndarray, " g"], base: float) -> Point:
    """Solves, measures, and solves again from there.

    Where a KL is asked for, what is predicted may lose as much less as the last plan lost more.
    """
    found, near, aimed = bench.model.choices, None, budget
    best: Point | None = None
    for left in reversed(range(ROUNDS)):
        raised = solve(found, bench.cost, charged, aimed, base, near)
        expected, kls = predicted(charged, raised, base), None
        if left:
            now = charges(bench.model, bench.windows, bench.references, raised)
            kls, charged = now.kl, np.where(raised, charged, now.groups.mean(0))
        point = bench.point("plan", raised, expected, kls)
        if best is None or _rank(point, budget) < _rank(best, budget):
            best = point
        near = Near(raised, max(1, round(CHANGES * len(raised))))
        if math.isfinite(budget.kl):
            expected = predicted(charged, raised, base)
            # Not below what raising all is predicted to lose: that always is a plan.
            aimed = replace(budget, kl=max(base, budget.kl - max(0.0, point.kl - expected)))
            near = None
    assert best is not None
    return best


def _rank(point: Point, budget: Budget) -> tuple[bool, float]:
    """Order of plans: the least KL; where a KL is asked for, the fastest that keeps it."""
    if math.isinf(budget.kl):
        return False, point.kl
    missed = point.kl > budget.kl
    return missed, point.kl if missed else point.decode + point.prefill


def write_plan(made: Plan, out: Path, overwrite: bool, draw: Draw | None = None) -> None:
    """Writes the folder of a plan, whole or not at all.

    Args:
      out: new, empty, or of an earlier plan with `overwrite`.
      draw: draws the front; None leaves it out.

    Raises:
      UserError: `out` holds other files, or cannot be written.
    """
    with artifacts.writing(out, overwrite, KIND) as folder:
        artifacts.write_json(folder / RECIPE, made.recipe.to_json())
        artifacts.write_json(folder / KIND.mark, to_json(made))
        if draw is not None:
            draw(made, folder / FIGURE)


def to_json(made: Plan) -> dict[str, Any]:
    """The contents of front.json."""
    groups = made.choices.groups
    return {
        "format": 1,
        "recipe": made.recipe.name,
        "seconds": roofline.LABEL,
        "errors": {"decode": made.error[0], "prefill": made.error[1]},
        "points": [_row(p, groups) for p in (made.chosen, made.low, made.high, *made.front)],
        "baselines": [
            {
                "policy": name, "about": policies.POLICIES[name].about,
                "source": policies.POLICIES[name].source,
                "points": [_row(p, groups) for p in points],
            }
            for name, points in made.baselines.items()
        ],
        "exceptions": [e._asdict() for e in exceptions(made)],
        "groups": [
            {"name": g.name, "bits": [g.low, g.high], "charge": float(a), "error": float(e)}
            for g, a, e in zip(groups, made.charges, made.errors, strict=True)
        ],
    }  # fmt: skip


def exceptions(made: Plan) -> tuple[policies.Exceeded, ...]:
    """Finds the points of other planners that the front does not dominate."""
    return policies.exceptions((made.low, made.high, *made.front), made.baselines)


def _row(p: Point, groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "name": p.name, "predicted": p.predicted, "kl": p.kl, "error": standard_error(p.kls),
        "decode": p.decode, "prefill": p.prefill, "size": p.size, "casts": p.casts,
        "raised": [g.name for g, up in zip(groups, p.raised, strict=True) if up],
    }  # fmt: skip
