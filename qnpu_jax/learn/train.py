"""The training loop: a pure step over a `TrainState`, and `fit`, which runs it.

A run killed at any step and started again goes on from the last checkpoint to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import BRIEF, Options
from qnpu_jax.graph import Decoder
from qnpu_jax.learn.losses import Batch, TopK, held_out_kl, objective
from qnpu_jax.learn.optimizer import optimizer
from qnpu_jax.learn.parameters import Base, Theta, ThetaKey
from qnpu_jax.recipes import Effort, Stage
from qnpu_jax.text import Windows

DIVERGED_LOSS = 20.0
"""Learning has diverged at a loss this many times the first one: no step comes back from there."""
DIVERGED_KL = 10.0
"""Learning has diverged if the held-out KL ends this many times above its start (at least 0.1)."""
FEW_BUFFERS: Options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
COMPILER_OPTIONS = BRIEF | {"cpu": FEW_BUFFERS}
"""By backend, of steps. On a GPU, kernels that XLA chose by timing them would be a tenth faster
(SmolLM2-135M, 16 windows: .26 s in place of .29), but a run that goes on after a kill might choose
others, and end in other bytes. On a CPU, XLA would order ops for threads that two cores do not
have, in half as much memory again."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one stage of learning, fixed while it runs.

    Attributes:
      dec: staged for learning windows of T tokens.
      stage: loss, groups and rates.
      effort: batch, precision, patience and memory.
      steps: steps of this stage; its rates reach zero after them.
      seed: decides the order of the windows.
      every: steps between evaluations; None takes `evaluation_interval(steps)`.
    """

    dec: Decoder
    stage: Stage
    effort: Effort
    steps: int
    seed: int
    every: int | None = None


@struct.dataclass(kw_only=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: steps taken in this stage.
      theta: learned parameters, `parameters.Theta`.
      optimizer: optax's state.
      best, best_kl: the parameters of least held-out KL so far, and that KL (`History.held_out`).
      stale: evaluations since then.
      first_loss: loss of the stage's first step, by which divergence is judged.
    """

    step: Any
    theta: Any
    optimizer: Any
    best: Any
    best_kl: Any
    stale: Any
    first_loss: Any


class Diverged(UserError):
    """Learning that no step leads back from."""


@dataclass
class History:
    """Record of a stage.

    Attributes:
      loss: by step.
      held_out: (step, KL) of each evaluation: half the sum of the domains' mean and of the worst
        one, nats per token.
      domains: the KL of each domain, evaluation by evaluation.
      retreats: times that the stage diverged and began anew (`stages.slowed`); all else is of the
        last time.
    """

    loss: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    domains: dict[str, list[float]] = field(default_factory=dict)
    retreats: int = 0


class Progress(NamedTuple):
    """State and record of a stage that has begun: what a checkpoint holds."""

    state: TrainState
    history: History


TeacherCache = Callable[[Int[np.ndarray, " b"]], TopK | None]
"""Gives the stored teacher output of a batch, by the indices of its windows; None: not stored."""


def uncached(_: Int[np.ndarray, " b"]) -> None:
    """Stores nothing: every step computes the teacher."""


@dataclass(frozen=True)
class Callbacks:
    """Functions that `fit` calls while it runs.

    Attributes:
      save: after every evaluation, with state and history; it must copy what it keeps.
      report: after every step, with its number (from 1), its loss and the least held-out KL so far.
    """

    save: Callable[[TrainState, History], None] = lambda *_: None
    report: Callable[[int, float, float], None] = lambda *_: None


@dataclass(frozen=True)
class CompiledStage:
    """The jitted functions of one stage.

    Attributes:
      step: (state, base, batch, warm) -> (state, loss, norm of each parameter's gradient).
      held_out: (theta, base, ids) -> KL of each window.
    """

    step: Callable[
        [TrainState, Base, Batch, jax.Array], tuple[TrainState, jax.Array, dict[ThetaKey, Any]]
    ]
    held_out: Callable[[Theta, Base, jax.Array], jax.Array]


def jit_for_stage(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Applies `jax.jit` with compiler options for programs that run no longer than a stage."""
    options = COMPILER_OPTIONS.get(jax.default_backend(), {})
    return jax.jit(function, compiler_options=options, **settings)


def compile_stage(dec: Decoder, stage: Stage, effort: Effort, steps: int) -> CompiledStage:
    """Builds step and evaluation of a stage.

    The model is an argument of both: closed over, XLA would fold it as a constant.
    """
    tx = optimizer(stage, steps)

    def gradient(theta: Theta, base: Base, batch: Batch, warm: Float[Array, ""]):
        """Loss and gradient, means over the parts of the batch, which run one after the other."""

        def of_part(part: Batch):
            return jax.value_and_grad(lambda theta: objective(dec, stage, base, theta, part, warm))(
                theta
            )

        parts = effort.accumulate
        if parts == 1:
            return of_part(batch)

        def add(total, part: Batch):
            return jax.tree.map(jnp.add, total, of_part(part)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, theta))
        cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        total, _ = jax.lax.scan(add, zero, cut)
        return jax.tree.map(lambda x: x / np.float32(parts), total)

    def step(state: TrainState, base: Base, batch: Batch, warm: jax.Array):
        loss, gradients = gradient(state.theta, base, batch, warm)
        updates, opt = tx.update(gradients, state.optimizer, state.theta)
        moved: Any = optax.apply_updates(state.theta, updates)
        theta = moved
        if stage.rounding_optimizer == "sign":
            theta = {
                key: jnp.clip(x, -0.5, 0.5) if key.kind == "rounding" else x
                for key, x in moved.items()
            }
        norms = {key: jnp.sqrt(jnp.sum(jnp.square(g))) for key, g in gradients.items()}
        finite = jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
        loss = jnp.where(finite, loss, jnp.float32(jnp.nan))
        return replace(state, step=state.step + 1, theta=theta, optimizer=opt), loss, norms

    # What decides is not measured with the noise that a step may have.
    judged = replace(effort, precision="default") if effort.precision == "bfloat16" else effort

    def held_out(theta: Theta, base: Base, ids: jax.Array) -> jax.Array:
        with matmul_precision(judged):
            return held_out_kl(dec, stage, base, theta, ids)

    return CompiledStage(jit_for_stage(step, donate_argnums=0), jit_for_stage(held_out))


def initial_state(stage: Stage, theta: Theta, steps: int) -> TrainState:
    """Makes the state before the first step of a stage.

    Args:
      theta: initial parameters; the first step takes their memory.
    """
    return TrainState(
        step=jnp.int32(0),
        theta=theta,
        optimizer=optimizer(stage, steps).init(theta),
        best=jax.tree.map(np.array, theta),  # a copy: the first step donates the original
        best_kl=np.float32(np.inf),
        stale=np.int32(0),
        first_loss=np.float32(np.nan),
    )


def batches(windows: int, batch: int, seed: int, step: int) -> Iterator[Int[np.ndarray, " b"]]:
    """Yields the indices of the windows of each batch, from a step on, without end.

    Every pass over the windows has an order of its own, drawn from (seed, pass), so that a resumed
    run sees what it would have seen.

    Args:
      windows: how many there are; less than a batch of them are repeated.
      step: the first step to yield for, from 0.

    >>> from itertools import islice
    >>> [len(rows) for rows in islice(batches(windows=5, batch=2, seed=0, step=0), 3)]
    [2, 2, 2]
    """
    per_pass = max(1, windows // batch)
    order, drawn = np.zeros(0, np.int64), -1
    while True:
        epoch, at = divmod(step, per_pass)
        if epoch != drawn:
            order, drawn = np.random.default_rng((seed, epoch)).permutation(windows), epoch
        yield np.resize(order[at * batch : (at + 1) * batch], batch)
        step += 1


def evaluation_interval(steps: int) -> int:
    """Returns the steps between two evaluations: 50, or fewer so that a short stage has six too.

    On a CPU, where a short stage takes minutes, a kill then costs a sixth of it at most.

    >>> evaluation_interval(500), evaluation_interval(60)
    (50, 10)
    """
    return max(1, min(50, -(-steps // 6)))


def fit(
    settings: TrainSettings,
    base: Base,
    begun: Progress,
    text: Windows,
    cached: TeacherCache = uncached,
    callbacks: Callbacks = Callbacks(),
) -> Theta:
    """Learns until the stage's last step, or until it has gone stale.

    Args:
      base: the model that the stage starts from, on the device.
      begun: where to go on from; its history is extended in place.
      text: `learning` and `held_out` are read.
      cached: the teacher's likeliest tokens, as `teacher.cache_teacher` gives them.

    Returns:
      The parameters of least held-out KL.

    Raises:
      UserError: no text or unequal parts.
      Diverged: the loss or the held-out KL is not finite, or far above its start. The last
        checkpoint is not touched.
    """
    stage, effort, steps = settings.stage, settings.effort, settings.steps
    state, history = begun
    _check_text(effort, len(text.learning), len(text.held_out))
    every = settings.every or evaluation_interval(steps)
    with matmul_precision(effort):
        run = compile_stage(settings.dec, stage, effort, steps)
        if int(state.step) == 0 and not history.held_out:
            state = _evaluate(run, base, state, history, text)
        warm_steps = round(stage.warmup * steps)
        for rows in batches(len(text.learning), effort.batch, settings.seed, int(state.step)):
            at = int(state.step)
            if has_ended(state, effort, steps):
                break
            batch = Batch(jnp.asarray(text.learning[rows], jnp.int32), cached(rows))
            state, loss = _step(run, stage, base, state, batch, jnp.float32(at < warm_steps))
            history.loss.append(loss)
            callbacks.report(at + 1, loss, float(state.best_kl))
            if (at + 1) % every == 0 or at + 1 == steps:
                state = _evaluate(run, base, state, history, text)
                callbacks.save(state, history)
    _check_end(stage, history)
    return {key: jnp.asarray(x) for key, x in state.best.items()}


def has_ended(state: TrainState, effort: Effort, steps: int) -> bool:
    """Tells whether the stage takes no further step: all are taken, or `patience` is used up."""
    return int(state.step) >= steps or int(state.stale) >= effort.patience


def _step(
    run: CompiledStage, stage: Stage, base: Base, state: TrainState, batch: Batch, warm: jax.Array
) -> tuple[TrainState, float]:
    """Takes one step; returns the new state and the loss."""
    at, first = int(state.step), state.first_loss
    moving = replace(state, best=None, best_kl=None, stale=None, first_loss=None)
    moving, loss, norms = run.step(moving, base, batch, warm)
    value = float(loss)
    first = np.float32(value) if at == 0 else first
    _check_loss(stage, at, value, float(first), norms)
    unmoved = {"best": state.best, "best_kl": state.best_kl, "stale": state.stale}
    return replace(moving, **unmoved, first_loss=first), value


def _check_text(effort: Effort, windows: int, held_out: int) -> None:
    if not windows or not held_out or effort.batch % effort.accumulate:
        raise UserError(
            f"effort {effort.name}: {windows} windows to learn from, {held_out} held out, batches"
            f" of {effort.batch} in {effort.accumulate} parts; expected some of each, in equal"
            " parts; give text for learning, or correct the effort"
        )


def _check_end(stage: Stage, history: History) -> None:
    """Refuses a model that the stage ruined: a loss other than the KL can fall meanwhile."""
    (_, first), (step, last) = history.held_out[0], history.held_out[-1]
    if last > DIVERGED_KL * max(first, 0.1):
        raise Diverged(
            f"held-out KL: learning diverged: {first:.4g} nats at first, {last:.4g} at step {step};"
            f" lower the learning rates of the stage, {dict(stage.learn)}"
        )


def matmul_precision(effort: Effort) -> AbstractContextManager[object]:
    """Returns the context in which matrix products have the effort's precision."""
    named = effort.precision
    if named == "bfloat16" and jax.default_backend() == "gpu":
        named = "BF16_BF16_F32"  # "bfloat16" asks for no less there, and TF32 is what it gets
    return jax.default_matmul_precision(named)


def _evaluate(
    run: CompiledStage, base: Base, state: TrainState, history: History, text: Windows
) -> TrainState:
    """Measures the held-out KL and appends it to the history; if it fell, the current parameters
    become `best`."""
    by_window = np.asarray(run.held_out(state.theta, base, jnp.asarray(text.held_out, jnp.int32)))
    domains = text.domains or {"held-out": len(by_window)}
    ends = np.cumsum([*domains.values()])[:-1]
    kls = dict(zip(domains, (float(x.mean()) for x in np.split(by_window, ends)), strict=True))
    value = 0.5 * (fmean(kls.values()) + max(kls.values()))
    if not np.isfinite(value):  # before it is saved: a checkpoint must be worth going on from
        broken = [key for key, x in state.theta.items() if not np.isfinite(np.asarray(x)).all()]
        raise Diverged(
            f"{broken[0] if broken else 'held-out KL'}: learning diverged at step"
            f" {int(state.step)}: held-out KL {value:.4g}; lower the learning rates of the stage;"
            " the last checkpoint is kept"
        )
    history.held_out.append((int(state.step), value))
    for name, kl in kls.items():
        history.domains.setdefault(name, []).append(kl)
    if value < float(state.best_kl):
        best = jax.tree.map(np.array, state.theta)  # a copy: the next step donates the original
        return replace(state, best=best, best_kl=np.float32(value), stale=np.int32(0))
    return replace(state, stale=np.int32(state.stale + 1))


def _check_loss(
    stage: Stage, step: int, loss: float, first: float, norms: dict[ThetaKey, Any]
) -> None:
    if np.isfinite(loss) and loss <= DIVERGED_LOSS * max(first, 1e-3):
        return
    values = {key: float(x) for key, x in norms.items()}
    broken = [key for key, x in values.items() if not np.isfinite(x)]
    worst = broken[0] if broken else max(values, key=lambda key: values[key])
    raise Diverged(
        f"{worst}: learning diverged at step {step + 1}: loss {loss:.4g}, at first {first:.4g}; the"
        " gradient of this parameter is the"
        f" {'first that is not finite' if broken else 'largest'}; lower the learning rates of the"
        f" stage, {dict(stage.learn)}; the last checkpoint is kept"
    )
