"""The loop: a pure step over a `TrainState`, and `fit`, which can be killed at any step and goes on
from the last checkpoint to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder
from qnpu_jax.learn.losses import TopK, held_out_kl, objective
from qnpu_jax.learn.optimizer import optimizer
from qnpu_jax.learn.parameters import Base, Theta
from qnpu_jax.recipes import Effort, Stage

DIVERGED = 20.0
"""A loss this many times the first one has diverged: no useful step comes back from there."""
RUINED = 10.0
"""So has a stage that ends with so many times the held-out KL that it began with (at least 0.1)."""
COMPILER_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
}
"""By backend. On a GPU, XLA spends two minutes on choosing kernels for a step that runs for one; on
a CPU, it orders ops for threads that two cores do not have, in half as much memory again."""


@struct.dataclass(kw_only=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: steps taken in this stage.
      theta: what is learned (`parameters.initial`).
      optimizer: optax's state.
      best, best_kl: the parameters of least held-out KL so far, and that KL (nats per token).
      stale: evaluations since.
      first_loss: of the stage, by which divergence is judged.
    """

    step: Any
    theta: Any
    optimizer: Any
    best: Any
    best_kl: Any
    stale: Any
    first_loss: Any


@dataclass
class History:
    """Losses by step and held-out KLs by (step, value), of one stage."""

    loss: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


Batch = tuple[Int[Array, "b t"], TopK | None]
"""Token ids, and what was kept of the teacher."""


@dataclass(frozen=True)
class Compiled:
    """The jitted functions of one stage."""

    step: Callable[
        [TrainState, Base, jax.Array, jax.Array, TopK | None], tuple[TrainState, jax.Array, Any]
    ]
    held_out: Callable[[Theta, Base, jax.Array], jax.Array]


def jitted(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`jax.jit` for a function that runs for a stage."""
    options = COMPILER_OPTIONS.get(jax.default_backend(), {})
    return jax.jit(function, compiler_options=options, **settings)


def compiled(dec: Decoder, stage: Stage, effort: Effort, steps: int) -> Compiled:
    """Step and evaluation, with the model as an argument: closed over, XLA would fold it."""
    tx = optimizer(stage, steps)

    def gradient(theta: Theta, base: Base, text: Batch, warm: Float[Array, ""]):
        """Loss and gradient; over the parts of the batch in turn where it is cut."""

        def of(part: Batch):
            ids, cached = part
            return jax.value_and_grad(
                lambda theta: objective(dec, stage, base, theta, ids, warm, cached)
            )(theta)

        parts = effort.accumulate
        if parts == 1:
            return of(text)

        def add(total, part: Batch):
            return jax.tree.map(jnp.add, total, of(part)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, theta))
        cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), text)
        total, _ = jax.lax.scan(add, zero, cut)
        return jax.tree.map(lambda x: x / np.float32(parts), total)

    def step(state: TrainState, base: Base, ids: jax.Array, warm: jax.Array, cached: TopK | None):
        loss, gradients = gradient(state.theta, base, (ids, cached), warm)
        updates, opt = tx.update(gradients, state.optimizer, state.theta)
        moved: Any = optax.apply_updates(state.theta, updates)
        theta = {
            n: jnp.clip(x, -0.5, 0.5) if n.startswith("rounding/") else x for n, x in moved.items()
        }
        norms = {n: jnp.sqrt(jnp.sum(jnp.square(g))) for n, g in gradients.items()}
        finite = jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
        loss = jnp.where(finite, loss, jnp.float32(jnp.nan))
        return replace(state, step=state.step + 1, theta=theta, optimizer=opt), loss, norms

    def held_out(theta: Theta, base: Base, ids: jax.Array) -> jax.Array:
        return held_out_kl(dec, stage, base, theta, ids)

    return Compiled(jitted(step, donate_argnums=0), jitted(held_out))


def start(stage: Stage, theta: Theta, steps: int) -> TrainState:
    """Before the first step."""
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
    """Which of so many windows make each batch from `step` on: every pass over them in an order of
    its own, drawn from the seed, so that a resumed run sees what it would have seen."""
    per_pass = max(1, windows // batch)
    order, drawn = np.zeros(0, np.int64), -1
    while True:
        epoch, at = divmod(step, per_pass)
        if epoch != drawn:
            order, drawn = np.random.default_rng((seed, epoch)).permutation(windows), epoch
        yield np.resize(order[at * batch : (at + 1) * batch], batch)
        step += 1


def interval(steps: int) -> int:
    """Steps between two evaluations: 50, or fewer so that a short stage has six of them too.

    On a CPU, where a short stage takes minutes, a kill then costs a sixth of it at most.
    """
    return max(1, min(50, -(-steps // 6)))


Save = Callable[[TrainState, History], None]
Report = Callable[[int, float, float], None]
"""Step, loss, best held-out KL."""
Cached = Callable[[Int[np.ndarray, " b"]], TopK | None]
"""What was kept of the teacher for a batch, by the indices of its windows."""


def nothing(_: Int[np.ndarray, " b"]) -> None:
    """Nothing was kept: the step computes what it needs of the teacher."""


def fit(
    dec: Decoder,
    stage: Stage,
    effort: Effort,
    steps: int,
    base: Base,
    state: TrainState,
    history: History,
    windows: Int[np.ndarray, "n t"],
    held_out: Int[np.ndarray, "m t"],
    seed: int,
    save: Save,
    report: Report = lambda *_: None,
    every: int | None = None,
    cached: Cached = nothing,
) -> Theta:
    """Learns for `steps` steps, from wherever `state` is; returns the parameters of least held-out
    KL.

    Args:
      every: steps between evaluations, after each of which `save` is called; by default `interval`.
      cached: as `teacher.keep` gives it.

    Raises:
      UserError: no text, unequal parts, or the loss is not finite or has diverged. The last
        checkpoint is not touched.
    """
    _check_text(effort, len(windows), len(held_out))
    every = every or interval(steps)
    with precision(effort):
        run = compiled(dec, stage, effort, steps)
        quiet = jnp.asarray(held_out, jnp.int32)
        if int(state.step) == 0 and not history.held_out:
            state = _evaluated(run, base, state, history, quiet)
        warm_steps = round(stage.warmup * steps)
        for rows in batches(len(windows), effort.batch, seed, int(state.step)):
            at = int(state.step)
            if ended(state, effort, steps):
                break
            batch = jnp.asarray(windows[rows], jnp.int32), cached(rows)
            state, loss = _stepped(run, stage, base, state, batch, jnp.float32(at < warm_steps))
            history.loss.append(loss)
            report(at + 1, loss, float(state.best_kl))
            if (at + 1) % every == 0 or at + 1 == steps:
                state = _evaluated(run, base, state, history, quiet)
                save(state, history)
    _check_end(stage, history)
    return {name: jnp.asarray(x) for name, x in state.best.items()}


def ended(state: TrainState, effort: Effort, steps: int) -> bool:
    """Whether the stage takes no further step."""
    return int(state.step) >= steps or int(state.stale) >= effort.patience


def _stepped(
    run: Compiled, stage: Stage, base: Base, state: TrainState, batch: Batch, warm: jax.Array
) -> tuple[TrainState, float]:
    """The state after a step, and the step's loss."""
    ids, cached = batch
    at, first = int(state.step), state.first_loss
    moving = replace(state, best=None, best_kl=None, stale=None, first_loss=None)
    moving, loss, norms = run.step(moving, base, ids, warm, cached)
    value = float(loss)
    first = np.float32(value) if at == 0 else first
    _check(stage, at, value, float(first), norms)
    kept = {"best": state.best, "best_kl": state.best_kl, "stale": state.stale}
    return replace(moving, **kept, first_loss=first), value


def _check_text(effort: Effort, windows: int, held_out: int) -> None:
    if not windows or not held_out or effort.batch % effort.accumulate:
        raise UserError(
            f"effort {effort.name}: {windows} windows to learn from, {held_out} held out, batches"
            f" of {effort.batch} in {effort.accumulate} parts; expected some of each, in equal"
            " parts; give text for learning, or correct the effort"
        )


def _check_end(stage: Stage, history: History) -> None:
    """A loss that is not the KL can fall while it ruins the model."""
    (_, first), (step, last) = history.held_out[0], history.held_out[-1]
    if last > RUINED * max(first, 0.1):
        raise UserError(
            f"held-out KL: learning diverged: {first:.4g} nats at first, {last:.4g} at step {step};"
            f" lower the learning rates of the stage, {dict(stage.learn)}"
        )


def precision(effort: Effort):
    """The context in which matrix products have the effort's precision."""
    if effort.precision == "default":
        return nullcontext()
    return jax.default_matmul_precision(effort.precision)


def _evaluated(
    run: Compiled, base: Base, state: TrainState, history: History, ids: jax.Array
) -> TrainState:
    """The state after looking at the held-out KL: `best` is the current parameters if it fell."""
    value = float(run.held_out(state.theta, base, ids))
    if not np.isfinite(value):  # before it is saved: a checkpoint must be worth going on from
        broken = [n for n, x in state.theta.items() if not np.isfinite(np.asarray(x)).all()]
        raise UserError(
            f"{broken[0] if broken else 'held-out KL'}: learning diverged at step"
            f" {int(state.step)}: held-out KL {value:.4g}; lower the learning rates of the stage;"
            " the last checkpoint is kept"
        )
    history.held_out.append((int(state.step), value))
    if value < float(state.best_kl):
        best = jax.tree.map(np.array, state.theta)  # a copy: the next step donates the original
        return replace(state, best=best, best_kl=np.float32(value), stale=np.int32(0))
    return replace(state, stale=np.int32(state.stale + 1))


def _check(stage: Stage, step: int, loss: float, first: float, norms: dict[str, Any]) -> None:
    finite = {n: float(x) for n, x in norms.items()} if not np.isfinite(loss) else None
    if finite is None and loss <= DIVERGED * max(first, 1e-3):
        return
    values = finite or {n: float(x) for n, x in norms.items()}
    broken = [n for n, x in values.items() if not np.isfinite(x)]
    worst = broken[0] if broken else max(values, key=lambda n: values[n])
    raise UserError(
        f"{worst}: learning diverged at step {step + 1}: loss {loss:.4g}, at first {first:.4g}; the"
        " gradient of this parameter is the"
        f" {'first that is not finite' if broken else 'largest'}; lower the learning rates of the"
        f" stage, {dict(stage.learn)}; the last checkpoint is kept"
    )
