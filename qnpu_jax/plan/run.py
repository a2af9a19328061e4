"""Plans: from a model to the widths of its tensors, and the front that they lie on.

The incumbent is the low plan at first. Its charges are measured, the program is solved, and the KL
of what it found is measured: that is the incumbent of the next round, in which it may change no
more than a tenth of the groups. Charges of raised groups stay those of the last round in which they
were low. The plan of least measured KL within the budget is kept, never one of least prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from qnpu_jax import artifacts, pipeline
from qnpu_jax.errors import UserError
from qnpu_jax.graph import decoder
from qnpu_jax.latency import roofline
from qnpu_jax.learn import learn
from qnpu_jax.measure import float_logits
from qnpu_jax.models import Checkpoint, load
from qnpu_jax.plan import feasible, targets
from qnpu_jax.plan.charges import Mixed, charges, divergences, mixed
from qnpu_jax.plan.costs import Cost, cost
from qnpu_jax.plan.groups import Choices, choices
from qnpu_jax.plan.pairs import Losses, Pair, pair_terms, significant
from qnpu_jax.plan.solver import Budget, Near, solve
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import EFFORTS, Recipe
from qnpu_jax.text import excerpts, files, starts_of

ROUNDS = 3
"""Times that the program is solved for what is asked for; for the front's other budgets once."""
CHANGES = 0.1
"""Share of the groups that may change in a round after the first."""
FRONT = (1.0, 1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3)
"""Budgets of the front: most that decode and prefill may take, by what the low plan takes. Where
there are no seconds they stand for as many sizes, from the low plan's to the high one's."""


RECIPE, FIGURE = "plan.json", "plan.svg"
KIND = artifacts.Kind("qnpu plan", frozenset({RECIPE, "front.json", FIGURE}), "front.json")


@dataclass(frozen=True)
class PlanRequest:
    """Request of a plan.

    Attributes:
      model: name or path that `models.load` takes.
      soc: one of `targets.TARGETS`.
      low, high: recipes between whose bits the plan lies; it is the low one in all else.
      within: most that decode and prefill may take, by what the low recipe takes.
      kl: nats per position that the plan may lose; the fastest such plan is found.
      size: most bytes of weights.
      calibration: text to calibrate with and to measure on; None lets the model write its own.
      context: slots of the KV cache that decode reads.
      front: also find the plans of FRONT.
      pairs: pair terms that predictions have beside charges, at most; 0 measures none.
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
    pairs: int = 0


@dataclass(frozen=True)
class Point:
    """A plan with what it costs.

    Attributes:
      name: of the budget or recipe that it comes from.
      raised: groups at their high bits, by number.
      predicted, kl: nats per position: by the charges that found it, and measured.
      decode, prefill: estimated seconds of a token and of a chunk; NaN where the target has none.
      size: bytes of weights.
      casts: QUANTIZE ops that depend on the plan.
    """

    name: str
    raised: tuple[bool, ...]
    predicted: float
    kl: float
    decode: float
    prefill: float
    size: float
    casts: int


@dataclass(frozen=True)
class Plan:
    """Result of planning.

    Attributes:
      recipe: of the plan.
      chosen: the plan.
      low, high: the plans at either end.
      front: plans of other budgets, by rising decode.
      charges: of each group in the low plan, nats per position, and their standard errors.
      error: of the estimates of decode and prefill, relative; NaN where there are none.
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

    @property
    def timed(self) -> bool:
        """Whether seconds are estimated."""
        return not math.isnan(self.low.decode)


Draw = Callable[[Plan, Path], None]
"""Draws a plan into a file."""


@dataclass(frozen=True, eq=False)
class _Bench:
    """Everything that all rounds share."""

    model: Mixed
    cost: Cost
    windows: Int[np.ndarray, "n t"]
    references: Sequence[jax.Array]
    watch: Observer

    def point(self, name: str, raised: Sequence[bool], predicted: float, kl: float) -> Point:
        c = self.cost
        costs = (c.decode(raised), c.prefill(raised), c.bytes(raised), c.casting(raised))
        return Point(name, tuple(map(bool, raised)), predicted, kl, *costs)

    def measured(self, raised: Sequence[bool]) -> float:
        return float(divergences(self.model, self.windows, self.references, raised).mean())


def plan(asked: PlanRequest, watch: Observer) -> Plan:
    """Finds the plan that a request asks for.

    Raises:
      UserError: a budget that nothing meets, an SoC that is not known, a recipe or text that does
        not fit the model.
    """
    _check(asked)
    with watch.stage("load"):
        checkpoint = load(asked.model)
        its = targets.target(asked.soc)
        low, high = feasible.recipes(its, checkpoint.config, asked.low, asked.high)
        asked = replace(asked, low=low, high=high)
        _check_budget(asked, checkpoint)
    bench = _bench(asked, checkpoint, watch)
    found = bench.model.choices
    none, every = [False] * len(found.groups), [True] * len(found.groups)
    with watch.stage("charge"):
        first = charges(bench.model, bench.windows, bench.references, none)
    average, base = first.groups.mean(0), float(first.base.mean())
    spread = first.groups.std(0, ddof=1) / math.sqrt(len(first.groups))
    losses = _losses(asked, bench, average, base)
    low = bench.point(asked.low.name, none, float(first.kl.mean()), float(first.kl.mean()))
    high = bench.point(asked.high.name, every, base, bench.measured(every))
    if asked.kl < high.kl:
        raise UserError(
            f"budget: no plan meets it (KL {asked.kl:.4g} nats, at least {high.kl:.4g}, which"
            f" {asked.high.name} loses before anything is learned); allow more"
        )
    with watch.stage("plan"):
        chosen = _best(bench, _budget(asked, bench.cost), losses)
        if chosen.kl > asked.kl:
            chosen = replace(high, name=chosen.name)
        factors = FRONT if asked.front else ()
        front = tuple(
            _once(f"{f:.2f}", bench, _limit(bench.cost, f), losses)
            for f in watch.track(factors, len(factors), "plan")
        )
    bits = found.plan(chosen.raised)
    recipe = replace(asked.low, name=f"{asked.low.name}-plan", bits=bits)
    return Plan(recipe, found, chosen, low, high, front, average, spread, bench.cost.error)


def _limit(cost: Cost, factor: float) -> Budget:
    """So many times the low plan's seconds; its share of the bytes between low and high where there
    are none."""
    low = [False] * len(cost.more_size)
    if cost.timed:
        return Budget(factor * cost.decode(low), factor * cost.prefill(low))
    share = (factor - FRONT[0]) / (FRONT[-1] - FRONT[0])
    return Budget(size=cost.size + share * float(cost.more_size.sum()))


def _check(asked: PlanRequest) -> None:
    """Refuses what can be known to be wrong before the model is read, which takes a while."""
    its = targets.target(asked.soc)
    if its.rates is None and math.isfinite(asked.within):
        raise UserError(
            f"plan: --within for {its.name}, whose seconds are not estimated ({its.seconds});"
            " expected --size or --kl; give one of them"
        )
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
    """Refuses what no plan can cost, before minutes pass."""
    staged = (decoder(checkpoint.config, r.bits, 1) for r in (asked.low, asked.high))
    found = choices(*staged)
    costs = cost(found, asked.soc, asked.context)
    nothing = Losses(0.0, np.zeros(len(found.groups)))
    solve(found, costs, nothing, replace(_budget(asked, costs), kl=math.inf))


def _budget(asked: PlanRequest, cost: Cost) -> Budget:
    low = [False] * len(cost.more_size)
    return Budget(
        decode=asked.within * cost.decode(low),
        prefill=asked.within * cost.prefill(low),
        size=asked.size,
        kl=asked.kl,
    )


def _bench(asked: PlanRequest, checkpoint: Checkpoint, watch: Observer) -> _Bench:
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
    return _Bench(model, cost(found, asked.soc, asked.context), windows, references, watch)


def _losses(
    asked: PlanRequest, bench: _Bench, charged: Float64[np.ndarray, " g"], base: float
) -> Losses:
    """Predicts by the charges of the low plan, and by its pair terms where they are asked for."""
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


def _once(name: str, bench: _Bench, budget: Budget, losses: Losses) -> Point:
    """Solves and measures."""
    raised = solve(bench.model.choices, bench.cost, losses, budget)
    return bench.point(name, raised, losses.predicted(raised), bench.measured(raised))


def _best(bench: _Bench, budget: Budget, losses: Losses) -> Point:
    """Solves, measures, and solves again from there.

    Where a KL is asked for, what is predicted may lose as much less as the last plan lost more.
    """
    found, near, aimed = bench.model.choices, None, budget
    best: Point | None = None
    for left in reversed(range(ROUNDS)):
        raised = solve(found, bench.cost, losses, aimed, near)
        predicted = losses.predicted(raised)
        if left:
            now = charges(bench.model, bench.windows, bench.references, raised)
            kl, losses = float(now.kl.mean()), losses.charged(now.groups.mean(0), raised)
        else:
            kl = bench.measured(raised)
        point = bench.point("plan", raised, predicted, kl)
        if best is None or _rank(point, budget) < _rank(best, budget):
            best = point
        near = Near(raised, max(1, round(CHANGES * len(raised))))
        if math.isfinite(budget.kl):
            # Not below what raising all is predicted to lose: that always is a plan.
            more = max(0.0, kl - losses.predicted(raised))
            aimed = replace(budget, kl=max(losses.base, budget.kl - more))
            near = None
    assert best is not None
    return best


def _rank(point: Point, budget: Budget) -> tuple[bool, float]:
    """Order of plans: the least KL; where a KL is asked for, the fastest that keeps it, or the
    smallest."""
    if math.isinf(budget.kl):
        return False, point.kl
    missed, seconds = point.kl > budget.kl, point.decode + point.prefill
    return missed, point.kl if missed else point.size if math.isnan(seconds) else seconds


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


def _or_null(x: float) -> float | None:
    return None if math.isnan(x) else x


def to_json(made: Plan) -> dict[str, Any]:
    """The contents of front.json."""
    groups = made.choices.groups
    return {
        "format": 1,
        "recipe": made.recipe.name,
        "seconds": roofline.LABEL if made.timed else None,
        "errors": {"decode": _or_null(made.error[0]), "prefill": _or_null(made.error[1])},
        "points": [
            {
                "name": p.name, "predicted": p.predicted, "kl": p.kl, "decode": _or_null(p.decode),
                "prefill": _or_null(p.prefill), "size": p.size, "casts": p.casts,
                "raised": [g.name for g, up in zip(groups, p.raised, strict=True) if up],
            }
            for p in (made.chosen, made.low, made.high, *made.front)
        ],
        "groups": [
            {"name": g.name, "bits": [g.low, g.high], "charge": float(a), "error": float(e)}
            for g, a, e in zip(groups, made.charges, made.errors, strict=True)
        ],
    }  # fmt: skip
