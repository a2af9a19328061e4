"""A recipe's stages in order: each calibrates, rounds and learns on what the one before left."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.calibrate import GptqSettings, calibrate_activations, collect_statistics, gptq
from qnpu_jax.graph import Decoder, Params, Scales, decoder, is_rotated, resolve
from qnpu_jax.learn.parameters import (
    R1,
    Base,
    Theta,
    initial_theta,
    merge_theta,
    student_scales,
    theta_units,
)
from qnpu_jax.learn.teacher import cache_teacher, check_teacher_bytes
from qnpu_jax.learn.train import (
    Callbacks,
    Diverged,
    History,
    Progress,
    TrainSettings,
    TrainState,
    fit,
    has_ended,
    initial_state,
    uncached,
)
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import Effort, Ranges, Recipe, Stage
from qnpu_jax.text import Windows

MOST_RETREATS = 2
"""Times that a stage which diverges is begun anew."""


@dataclass(frozen=True)
class Calibrated:
    """A decoder whose every range is set.

    Attributes:
      dec: staged for calibration windows.
      params: folded float parameters, prefix K/V included.
      free: QParams of every free tensor, by global name.
      tame: a prefix keeps massive tokens out of the graph, so that ranges may clip.
      teacher: folded parameters of the original: with its own BOS as prefix K/V, or with none. None
        takes the model itself, in float.
    """

    dec: Decoder
    params: Params
    free: Scales
    tame: bool
    teacher: Params | None = None


@dataclass(frozen=True)
class Learned:
    """Parameters and free scales after all stages, and the record of each stage that learned."""

    params: Params
    free: Scales
    histories: list[History] = field(default_factory=list)


def schedule(recipe: Recipe, effort: Effort) -> list[tuple[Stage, int]]:
    """Plans the stages: each with the groups that learn at this effort, and its number of steps.

    >>> from qnpu_jax import EFFORTS, RECIPES
    >>> [steps for _, steps in schedule(RECIPES["w4a8"], EFFORTS["full"])]
    [600]
    """
    out = []
    for stage in recipe.stages:
        learn = tuple((g, rate) for g, rate in stage.learn if g not in effort.without)
        steps = round(stage.share * effort.steps) if learn else 0
        out.append((replace(stage, learn=learn), steps))
    return out


def slowed(stage: Stage, retreats: int) -> Stage:
    """Lowers the rates of a stage to a quarter for each time that it diverged.

    A model that is near its original before it learns has little to win and much to lose: rates
    that serve another bit plan may be far too high for it.

    >>> slowed(Stage(learn=(("biases", 0.25),)), retreats=1).learn
    (('biases', 0.0625),)
    """
    return replace(stage, learn=tuple((g, rate / 4**retreats) for g, rate in stage.learn))


def learns(recipe: Recipe, effort: Effort) -> bool:
    """Tells whether any stage takes a step at this effort."""
    return any(steps for _, steps in schedule(recipe, effort))


@runtime_checkable
class Store(Protocol):
    """Storage of each stage's state, so that a killed run can go on."""

    def load(self, stage: int, like: TrainState) -> Progress | None:
        """Returns the last state saved of a stage; None where there is none.

        Args:
          stage: its number, from 0.
          like: a state of equal structure, shapes and dtypes.
        """
        ...

    def save(self, stage: int, state: TrainState, history: History) -> None:
        """Stores a copy of a state."""
        ...

    def forget(self, stage: int) -> None:
        """Removes all states of a stage."""
        ...


class Nowhere:
    """A `Store` that stores nothing."""

    def load(self, stage: int, like: TrainState) -> Progress | None:
        """Returns None."""

    def save(self, stage: int, state: TrainState, history: History) -> None:
        """Does nothing."""

    def forget(self, stage: int) -> None:
        """Does nothing."""


def learn(
    model: Calibrated,
    recipe: Recipe,
    effort: Effort,
    text: Windows,
    store: Store | None = None,
    watch: Observer | None = None,
) -> Learned:
    """Runs a recipe's stages.

    Args:
      effort: how much is learned; with 0 steps the stages calibrate and round only.
      store: where checkpoints go, and what a killed run goes on from; by default nowhere.
      watch: hears of every step (`Observer.learned`).

    Raises:
      UserError: a stage's teacher does not fit in `effort.teacher_bytes`, or as `train.fit`.
      Diverged: a stage did at the lowest of its rates (`slowed`) too.
    """
    planned = schedule(recipe, effort)
    # On the device once: the first stage's student shares the arrays.
    given = dict(model.params)
    model = replace(model, params=jax.tree.map(jnp.asarray, given))
    teacher = model.params
    if model.teacher is not None:  # what the two have in common is there once
        shared = {n: model.params[n] for n, x in model.teacher.items() if x is given.get(n)}
        teacher = {n: shared.get(n, jnp.asarray(x)) for n, x in model.teacher.items()}
    run = _Run(effort, recipe.seed, text, teacher, store or Nowhere(), watch or Observer())
    for stage, steps in planned:  # all of them now: the last may come hours after the first
        check_teacher_bytes(run.settings(model.dec, stage, steps), text.learning)
    basis = np.eye(model.dec.config.hidden_size, dtype=np.float32)
    histories = []
    for i, (stage, steps) in enumerate(planned):
        model = _calibrate(model, stage, text)
        if stage.gptq:
            model = _round(model, stage, recipe.activation_init, text)
        if steps == 0:
            continue
        theta, history = run.fit(i, stage, steps, model, basis)
        histories.append(history)
        params, free = merge_theta(model.dec, stage, model.params, model.free, theta)
        model = replace(model, params=params, free=free)
        if R1 in theta:
            basis = basis @ np.asarray(theta[R1])
    return Learned(model.params, model.free, histories)


def _calibrate(model: Calibrated, stage: Stage, text: Windows) -> Calibrated:
    """Sets ranges where the stage asks for it."""
    if stage.calibrate == "none":
        return model
    dec = model.dec
    active = Stage(quantized="rotated") if stage.calibrate == "unrotated" else None
    scales = student_scales(dec, active, model.free, {}) if active else None
    stats = collect_statistics(dec, model.params, text.calibration, scales=scales)
    found, _ = calibrate_activations(dec, stats, stage.ranges, model.tame)
    chosen = {n: q for n, q in found.items() if active is None or not is_rotated(n)}
    return replace(model, free={**model.free, **chosen})


def _round(model: Calibrated, stage: Stage, ranges: Ranges, text: Windows) -> Calibrated:
    """Rounds weights by GPTQ, and sets the ranges of what the rounded ones make."""
    dec = model.dec
    # What learns to round needs to know how near a code each weight is.
    settings = GptqSettings(
        exact=not stage.rate("rounding"), asymmetric=stage.gptaq, damping=stage.damping
    )
    windows = text.pool if len(text.pool) else text.calibration
    count = max(1, stage.gptq_tokens // windows.shape[1])
    fitted = gptq(dec, model.params, resolve(dec, model.free), windows[:count], settings)
    free = {n: fitted.scales.get(n, q) for n, q in model.free.items()}
    weights = {n: q for n, q in resolve(dec, free).items() if n.endswith(".weight")}
    stats = collect_statistics(dec, fitted.params, text.calibration, scales=weights)
    found, _ = calibrate_activations(dec, stats, ranges, model.tame)
    return replace(model, params=fitted.params, free={**free, **found})


@dataclass(frozen=True)
class _Run:
    """Settings, text, teacher and callbacks that all stages of a run share."""

    effort: Effort
    seed: int
    text: Windows
    teacher: Params
    store: Store
    watch: Observer

    def settings(self, dec: Decoder, stage: Stage, steps: int) -> TrainSettings:
        return TrainSettings(dec, stage, self.effort, steps, self.seed)

    def fit(
        self, index: int, stage: Stage, steps: int, model: Calibrated, basis: np.ndarray
    ) -> tuple[Theta, History]:
        """Learns one stage, from its last checkpoint where there is one. If it diverges, it begins
        anew at lower rates.

        Args:
          index: number of the stage, from 0.
          basis: as `Base.basis`.
        """
        calibrated, length = model.dec, self.text.learning.shape[1]
        dec = decoder(calibrated.config, calibrated.plan, length, calibrated.prefix)
        settings = self.settings(dec, stage, steps)
        base = Base(
            params=dict(model.params),
            free=model.free,
            units=theta_units(dec, model.free),
            teacher=self.teacher,
            basis=basis,
        )

        def first() -> TrainState:
            theta = initial_theta(dec, model.free, [g for g, _ in stage.learn])
            return initial_state(stage, theta, steps)

        begun = self.store.load(index, first()) or Progress(first(), History())

        def save(state: TrainState, history: History) -> None:
            self.store.save(index, state, history)

        def report(step: int, loss: float, held_out: float) -> None:
            self.watch.learned(index, step, steps, loss, held_out)

        on_device, told = jax.tree.map(jnp.asarray, base), Callbacks(save, report)
        cached = uncached
        while True:
            history = begun.history
            if cached is uncached and not has_ended(begun.state, self.effort, steps):
                cached = cache_teacher(settings, self.teacher, self.text.learning)
            now = replace(settings, stage=slowed(stage, history.retreats))
            try:
                return fit(now, on_device, begun, self.text, cached, told), history
            except Diverged as error:
                what = _retreat_for(error, history, stage)
            self.watch.say(f"stage {index + 1}: {what}; begun anew at a quarter of its rates")
            # Not in the block above, where the traceback keeps the state that failed alive.
            self.store.forget(index)
            begun = Progress(first(), History(retreats=history.retreats + 1))
            save(*begun)


def _retreat_for(error: Diverged, history: History, stage: Stage) -> str:
    """Says why a stage is begun anew.

    Raises:
      Diverged: it is not: no rate changes what comes before the first step, or it has been often
        enough.
    """
    what = str(error).partition(";")[0]
    if not history.loss:
        raise error
    if history.retreats == MOST_RETREATS:
        raise Diverged(
            f"{what}, at 1/{4**MOST_RETREATS} of its rates too; lower the learning rates of the"
            f" stage, {dict(stage.learn)}; the last checkpoint is kept"
        ) from None
    return what
