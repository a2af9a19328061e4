"""A recipe's stages in order: each calibrates, rounds and learns on what the one before left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.calibrate import collect, gptq, initialize
from qnpu_jax.graph import Decoder, Params, Scales, decoder, is_rotated, resolve
from qnpu_jax.learn.parameters import Base, Theta, initial, merged, ranges, student_scales, units
from qnpu_jax.learn.teacher import check_room, keep
from qnpu_jax.learn.train import Cached, History, TrainState, ended, fit, nothing, start
from qnpu_jax.recipes import Effort, Recipe, Stage
from qnpu_jax.text import Windows

Report = Callable[[int, int, int, float, float], None]
"""Stage, step, steps of the stage, loss, best held-out KL so far."""


@dataclass(frozen=True)
class Learned:
    """Parameters and free scales after all stages, and how each stage went."""

    params: Params
    free: Scales
    histories: list[History] = field(default_factory=list)


def schedule(recipe: Recipe, effort: Effort) -> list[tuple[Stage, int]]:
    """The stages with the groups that learn at this effort, and steps of each."""
    out = []
    for stage in recipe.stages:
        learn = tuple((g, rate) for g, rate in stage.learn if g not in effort.without)
        steps = round(stage.share * effort.steps) if learn else 0
        out.append((replace(stage, learn=learn), steps))
    return out


def learns(recipe: Recipe, effort: Effort) -> bool:
    """Whether any stage takes a step at this effort."""
    return any(steps for _, steps in schedule(recipe, effort))


@runtime_checkable
class Store(Protocol):
    """Where the state of a stage is kept, so that a killed run can go on."""

    def load(self, stage: int, like: TrainState) -> tuple[TrainState, History] | None:
        """The last state saved of a stage, None where there is none."""
        ...

    def save(self, stage: int, state: TrainState, history: History) -> None:
        """Keeps a state."""
        ...


class Nowhere:
    """Keeps nothing."""

    def load(self, stage: int, like: TrainState) -> None:
        """Nothing was kept."""

    def save(self, stage: int, state: TrainState, history: History) -> None:
        """Keeps nothing."""


def learn(
    dec: Decoder,
    recipe: Recipe,
    effort: Effort,
    params: Params,
    free: Scales,
    text: Windows,
    tame: bool,
    store: Store | None = None,
    report: Report = lambda *_: None,
) -> Learned:
    """Runs the stages.

    Args:
      dec: staged for calibration windows.
      params, free: calibrated.
      tame: as in `ranges.initialize`.
      store: of checkpoints; by default nothing is kept.
      report: called after every step.

    Raises:
      UserError: a stage's teacher does not fit in `effort.teacher_bytes`, or as `train.fit`.
    """
    planned = schedule(recipe, effort)
    for stage, steps in planned:  # all of them now: the last may come hours after the first
        check_room(dec, stage, effort, steps, text.learning, recipe.seed)
    # On the device once: the first stage's student shares the arrays.
    params = teacher = jax.tree.map(jnp.asarray, dict(params))
    run = _Run(dec, effort, recipe.seed, text, teacher, store or Nowhere(), report)
    basis = np.eye(dec.config.hidden_size, dtype=np.float32)
    histories = []
    for i, (stage, steps) in enumerate(planned):
        params, free = _prepared(dec, stage, params, free, text, tame)
        if steps == 0:
            continue
        theta, history = run.fit(i, stage, steps, params, free, basis)
        histories.append(history)
        params, free = merged(dec, stage, params, free, theta)
        if "rotation/r1" in theta:
            basis = basis @ np.asarray(theta["rotation/r1"])
    return Learned(params, free, histories)


def _prepared(
    dec: Decoder, stage: Stage, params: Params, free: Scales, text: Windows, tame: bool
) -> tuple[Params, Scales]:
    """What the stage does before it learns: ranges, then rounding."""
    if stage.calibrate != "none":
        active = Stage(quantized="rotated") if stage.calibrate == "unrotated" else None
        scales = student_scales(dec, active, free, {}) if active else None
        stats = collect(dec, params, text.calibration, scales=scales)
        found, _ = initialize(dec, stats, stage.ranges, tame)
        chosen = {n: q for n, q in found.items() if active is None or not is_rotated(n)}
        free = {**free, **chosen}
    if stage.gptq:
        # What learns to round needs to know how near a code each weight is.
        exact = not stage.rate("rounding")
        fitted = gptq(dec, params, resolve(dec, free), text.calibration, exact=exact)
        params, free = fitted.params, {n: fitted.scales.get(n, q) for n, q in free.items()}
    return params, free


@dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    dec: Decoder
    effort: Effort
    seed: int
    text: Windows
    teacher: Params
    store: Store
    report: Report

    def fit(
        self,
        index: int,
        stage: Stage,
        steps: int,
        params: Params,
        free: Scales,
        basis: np.ndarray,
    ) -> tuple[Theta, History]:
        """The parameters that a stage learns, from its last checkpoint where there is one."""
        dec = decoder(self.dec.config, self.dec.plan, self.text.learning.shape[1], self.dec.prefix)
        base = Base(
            params=dict(params),
            free=free,
            ranges=ranges(dec),
            units=units(dec, free),
            teacher=self.teacher,
            basis=basis,
        )
        theta = initial(dec, free, [g for g, _ in stage.learn])
        state, history = start(stage, theta, steps), History()
        if kept := self.store.load(index, state):
            state, history = kept

        def save(state: TrainState, history: History) -> None:
            self.store.save(index, state, history)

        def report(step: int, loss: float, held_out: float) -> None:
            self.report(index, step, steps, loss, held_out)

        best = fit(
            dec, stage, self.effort, steps, jax.tree.map(jnp.asarray, base), state, history,
            self.text.learning, self.text.held_out, self.seed, save, report,
            cached=self.cached(dec, stage, steps, state),
        )  # fmt: skip
        return best, history

    def cached(self, dec: Decoder, stage: Stage, steps: int, state: TrainState) -> Cached:
        """What is kept of the teacher, unless no step would read it."""
        if ended(state, self.effort, steps):
            return nothing
        return keep(dec, stage, self.effort, steps, self.teacher, self.text.learning, self.seed)
