"""The loop: what it sees, what it keeps, when it ends, and that it can be killed at any step. Where
the model does not matter, a quadratic stands in for it."""

import dataclasses
import itertools
from copy import deepcopy
from typing import Any

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnpu_jax.errors import UserError
from qnpu_jax.learn import train
from qnpu_jax.learn.losses import Batch
from qnpu_jax.learn.orthogonal import orthogonality_error
from qnpu_jax.learn.parameters import R1, Theta, ThetaKey, initial_theta
from qnpu_jax.learn.train import (
    Callbacks,
    History,
    Progress,
    TrainSettings,
    TrainState,
    _check_end,
    _check_text,
    batches,
    evaluation_interval,
    fit,
    initial_state,
)
from qnpu_jax.recipes import Effort, Stage
from qnpu_jax.text.windows import Windows

EFFORT = learnable.EFFORT
WINDOWS, HELD_OUT = learnable.WINDOWS, learnable.HELD_OUT
TEXT = Windows(WINDOWS[:0], WINDOWS, HELD_OUT)
X, Y, OFFSET = ThetaKey("scale", "x"), ThetaKey("bias", "y"), ThetaKey("rounding", "x")

# --- Batches ---


def first(n: int, *args: Any) -> list[np.ndarray]:
    return list(itertools.islice(batches(*args), n))


@given(
    n=st.integers(1, 9),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(0, 30),
)
def test_batches_go_on_from_any_step(n, batch, seed, k):
    np.testing.assert_array_equal(
        first(12, n, batch, seed, k), first(k + 12, n, batch, seed, 0)[k:]
    )


@pytest.mark.parametrize(("n", "batch"), [(6, 2), (7, 2), (8, 8), (5, 1)])
def test_every_pass_sees_every_window_once(n, batch):
    length = n // batch
    passes = np.reshape(first(3 * length, n, batch, 0, 0), (3, length * batch))
    for seen in passes:
        assert len(set(seen.tolist())) == length * batch  # less than a batch is left out, in turn
    assert len({tuple(p) for p in passes.tolist()}) > 1 or n == batch
    if n == batch:
        assert not np.array_equal(passes[0], passes[1]), "an order of its own"


def test_fewer_windows_than_a_batch_are_repeated():
    (got,) = first(1, 3, 7, 0, 0)
    assert got.shape == (7,) and set(np.bincount(got)) == {2, 3}


def test_batches_differ_by_seed():
    a, b = (first(5, 50, 4, seed, 0) for seed in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("steps", [1, 5, 6, 7, 60, 299, 300, 500, 10_000])
def test_a_stage_is_looked_at_six_times_or_every_50_steps(steps):
    every = evaluation_interval(steps)
    assert 1 <= every <= 50
    assert every == 50 or steps / every <= 6
    assert every == 1 or -(-steps // every) >= min(6, steps) / 2


# --- The loop ---

TOY = Stage(learn=(("unrotated", 0.1),))
TARGET = np.linspace(-1, 1, 5).astype(np.float32)


@pytest.fixture
def quadratic(monkeypatch):
    """A loss with its minimum at TARGET, and as held-out KL the distance to half of it: past there,
    learning overfits. Depends on the batch, so that order matters."""

    def objective(dec, stage, base, theta, batch, warm):
        x = theta[X] - TARGET
        size = jnp.mean(batch.ids.astype(jnp.float32)) / 16
        return jnp.sum(jnp.square(x)) * size + warm * jnp.sum(jnp.abs(theta[X]))

    def held_out_kl(dec, stage, base, theta, ids):
        return jnp.full(len(ids), jnp.sum(jnp.square(theta[X] - TARGET / 2)))

    monkeypatch.setattr(train, "objective", objective)
    monkeypatch.setattr(train, "held_out_kl", held_out_kl)


def toy() -> Theta:
    return {X: jnp.zeros(5)}


Kept = list[tuple[TrainState, History]]


def copied(state: TrainState, history: History) -> tuple[TrainState, History]:
    """What a checkpoint would hold: the loop goes on to change both."""
    held = deepcopy(history)
    return jax.tree.map(np.array, state), held


def loop(
    stage: Stage = TOY,
    steps: int = 12,
    effort: Effort = EFFORT,
    theta: Theta | None = None,
    resume: tuple[TrainState, History] | None = None,
    every: int = 2,
    report: Any = lambda *_: None,
    text: Windows = TEXT,
) -> tuple[Theta, Kept, History]:
    """What `fit` returns, every state that it saved, and the history."""
    dec, params, free = learnable.made()
    base = learnable.base_of(dec, params, free)
    state, history = resume or (
        initial_state(stage, toy() if theta is None else theta, steps),
        History(),
    )
    state = jax.tree.map(jnp.asarray, state)
    history = deepcopy(history)
    saved: Kept = []

    def save(state: TrainState, history: History) -> None:
        saved.append(copied(state, history))

    settings = TrainSettings(dec, stage, effort, steps, seed=0, every=every)
    begun, callbacks = Progress(state, history), Callbacks(save, report)
    best = fit(settings, base, begun, text, callbacks=callbacks)
    return best, saved, history


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("quadratic")
def test_the_best_on_held_out_text_is_what_comes_back():
    patient = dataclasses.replace(EFFORT, patience=100)
    best, saved, history = loop(effort=patient, steps=40)
    steps, kls = zip(*history.held_out, strict=True)
    assert steps == tuple(range(0, 41, 2)) and len(history.loss) == 40
    at = int(np.argmin(kls))
    assert 0 < at < len(kls) - 1 and kls[-1] > 2 * kls[at], "it was to overfit"
    same(best, dict(saved[at - 1][0].theta))
    for (state, _), kl in zip(saved, kls[1:], strict=True):
        assert float(state.best_kl) == np.float32(min(kls[: kls.index(kl) + 1]))
    assert float(saved[-1][0].theta[X][-1]) > 0.8, "near the minimum of what was learned"


@pytest.mark.usefixtures("quadratic")
def test_no_step_is_better_than_a_bad_one():
    """Where every step raises the held-out KL, the start comes back."""
    best, _, history = loop(theta={X: jnp.asarray(TARGET / 2)})
    assert history.held_out[-1][1] > history.held_out[0][1]
    same(best, {X: TARGET / 2})


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.usefixtures("quadratic")
def test_patience_ends_a_stage(patience):
    best, saved, history = loop(effort=dataclasses.replace(EFFORT, patience=patience), steps=200)
    kls = [kl for _, kl in history.held_out]
    at = int(np.argmin(kls))
    assert len(kls) == at + 1 + patience and len(history.loss) == 2 * (len(kls) - 1) < 200
    assert [int(s.stale) for s, _ in saved[-patience:]] == list(range(1, patience + 1))
    again, more, _ = loop(
        effort=dataclasses.replace(EFFORT, patience=patience), steps=200, resume=saved[-1]
    )
    assert not more, "a stage that has ended stays ended"
    same(again, best)


@pytest.mark.usefixtures("quadratic")
def test_a_resumed_run_ends_in_the_same_bytes():
    stage = dataclasses.replace(TOY, warmup=0.5)
    best, saved, history = loop(stage)
    assert [int(s.step) for s, _ in saved] == [2, 4, 6, 8, 10, 12]
    for i, kept in enumerate(saved):
        again, rest, longer = loop(stage, resume=kept)
        same(again, best)
        same(rest, saved[i + 1 :])
        assert longer == history


@pytest.mark.usefixtures("quadratic")
def test_warm_up_lasts_its_share_of_the_steps():
    reached = {}
    for warmup in (0.0, 0.25, 1.0):
        _, saved, _ = loop(dataclasses.replace(TOY, warmup=warmup), every=1)
        reached[warmup] = [s.theta[X] for s, _ in saved]
    same(reached[0.25][:3], reached[1.0][:3])  # 3 of 12 steps
    assert not np.array_equal(reached[0.25][3], reached[1.0][3])
    assert not np.array_equal(reached[0.25][0], reached[0.0][0])


@pytest.mark.usefixtures("quadratic")
def test_every_step_is_reported():
    seen: list[tuple[int, float, float]] = []
    _, _, history = loop(report=lambda *row: seen.append(row))
    assert [s for s, _, _ in seen] == list(range(1, 13))
    assert [loss for _, loss, _ in seen] == history.loss
    assert seen[0][2] == history.held_out[0][1]


@pytest.mark.usefixtures("quadratic")
def test_a_step_takes_the_states_memory():
    """Donated: a copy of moments and parameters of a large model would not fit beside them."""
    dec, params, free = learnable.made()
    base = learnable.base_of(dec, params, free)
    nothing = {"best": None, "best_kl": None, "stale": None, "first_loss": None}
    state = dataclasses.replace(initial_state(TOY, toy(), 12), **nothing)
    step = train.compile_stage(dec, TOY, EFFORT, 12).step
    after, _, _ = step(state, base, Batch(jnp.asarray(WINDOWS[:2])), jnp.float32(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, base)))


@pytest.mark.usefixtures("quadratic")
def test_offsets_of_rounding_stay_within_half_a_code(monkeypatch):
    def objective(dec, stage, base, theta, batch, warm):
        return jnp.sum(theta[OFFSET] * np.asarray([1, -1, 1], np.float32))

    monkeypatch.setattr(train, "objective", objective)
    monkeypatch.setattr(train, "held_out_kl", lambda *a: -jnp.sum(jnp.square(a[3][OFFSET]))[None])
    stage = Stage(learn=(("rounding", 3.0),))
    best, _, _ = loop(stage, theta={OFFSET: jnp.zeros(3)})
    np.testing.assert_array_equal(best[OFFSET], [-0.5, 0.5, -0.5])
    free, _, _ = loop(
        dataclasses.replace(stage, rounding_optimizer="adam"), theta={OFFSET: jnp.zeros(3)}
    )
    assert (np.abs(free[OFFSET]) > 1).all()  # distilled weights go where the loss takes them


@pytest.mark.usefixtures("quadratic")
def test_the_kept_step_is_the_best_of_the_mean_and_the_worst_domain(monkeypatch):
    """Two domains of two and one windows: the second one's KL rises from step 6 on."""

    def held_out_kl(dec, stage, base, theta, ids):
        far = jnp.sum(jnp.square(theta[X] - TARGET))
        return jnp.stack([far, 3 * far, 100 * jnp.sum(jnp.square(theta[X] - TARGET / 2))])

    monkeypatch.setattr(train, "held_out_kl", held_out_kl)
    text = dataclasses.replace(TEXT, held_out=HELD_OUT[:3], domains={"prose": 2, "code": 1})
    best, _, history = loop(text=text)
    prose, code = (np.asarray(history.domains[name]) for name in ("prose", "code"))
    value = (prose + code) / 4 + np.maximum(prose, code) / 2
    np.testing.assert_allclose([kl for _, kl in history.held_out], value, rtol=1e-6)
    x = np.asarray(best[X])
    np.testing.assert_allclose(2 * np.square(x - TARGET).sum(), prose[value.argmin()], rtol=1e-6)
    assert 0 < value.argmin() < len(value) - 1 and value.argmin() != prose.argmin()


# --- What goes wrong ---


@pytest.mark.usefixtures("quadratic")
def test_a_rate_that_diverges_is_named_with_its_step():
    stage = dataclasses.replace(TOY, optimizer="sgd", learn=(("unrotated", 3.0),))
    saved: Kept = []
    seen: list[int] = []
    dec, params, free = learnable.made()
    effort = dataclasses.replace(EFFORT, patience=99)
    settings = TrainSettings(dec, stage, effort, steps=12, seed=0, every=1)
    begun = Progress(initial_state(stage, toy(), 12), History())
    told = Callbacks(lambda *s: saved.append(copied(*s)), lambda s, *_: seen.append(s))
    with pytest.raises(UserError) as error:
        fit(settings, learnable.base_of(dec, params, free), begun, TEXT, callbacks=told)
    text = str(error.value)
    assert text.startswith(f"scale/x: learning diverged at step {seen[-1] + 1}: loss ")
    assert "the gradient of this parameter is the largest" in text
    assert "lower the learning rates of the stage, {'unrotated': 3.0}" in text
    assert text.endswith("the last checkpoint is kept")
    assert int(saved[-1][0].step) == seen[-1], "kept: the last state before that step"
    assert np.isfinite(saved[-1][0].theta[X]).all()


@pytest.mark.usefixtures("quadratic")
def test_nan_is_named_with_its_step_and_parameter(monkeypatch):
    def objective(dec, stage, base, theta, batch, warm):
        # sqrt has no gradient at 0, which y reaches at the third step; the loss itself is finite.
        y = jnp.sum(jnp.sqrt(jnp.maximum(theta[Y], 0)))
        return jnp.sum(jnp.square(theta[X] - TARGET)) + y

    monkeypatch.setattr(train, "objective", objective)
    stage = Stage(learn=(("unrotated", 0.01), ("biases", 0.1)), optimizer="sgd")
    theta = toy() | {Y: jnp.asarray([4.0, 0.04], jnp.float32)}
    with pytest.raises(UserError) as error:
        loop(stage, theta=theta, steps=1000)
    text = str(error.value)
    assert text.startswith("bias/y: learning diverged at step 2: loss nan, at first ")
    assert "first that is not finite" in text and "\n" not in text


@pytest.mark.usefixtures("quadratic")
def test_a_held_out_kl_that_is_not_finite_is_never_saved(monkeypatch):
    def held_out_kl(dec, stage, base, theta, ids):
        x = theta[X]
        kl = jnp.where(jnp.max(x) > 0.35, jnp.nan, jnp.sum(jnp.square(x - TARGET)))
        return jnp.full(len(ids), kl)

    monkeypatch.setattr(train, "held_out_kl", held_out_kl)
    with pytest.raises(
        UserError, match=r"^held-out KL: learning diverged at step 4: held-out KL nan"
    ):
        loop()


# --- A model ---


@pytest.fixture(scope="module")
def learned():
    """A tiny model's rotations, scales of rotated tensors and of weights."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "compile_stage", learnable.compile_stage)
    dec, _, free = learnable.made()
    theta = initial_theta(dec, free, [g for g, _ in learnable.ROTATED.learn])
    yield loop(learnable.ROTATED, steps=40, theta=theta, every=10)
    patch.undo()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_model_learns(learned):
    best, _, history = learned
    kls = [kl for _, kl in history.held_out]
    assert min(kls) < 0.9 * kls[0], "less KL on text that it did not learn from"
    assert float(orthogonality_error(best[R1])) <= 1e-5
    dec, params, free = learnable.made()
    begin = initial_theta(dec, free, [g for g, _ in learnable.ROTATED.learn])
    # The same windows before and after: losses of single steps are of other texts each.
    held_out = learnable.compile_stage(dec, learnable.ROTATED, EFFORT, 40).held_out
    before, after = (
        float(held_out(theta, learnable.base_of(dec, params, free), jnp.asarray(WINDOWS)).mean())
        for theta in (begin, best)
    )
    assert after < 0.85 * before, "less KL on the text that it learned from"
    still = {n for n, x in best.items() if np.array_equal(x, begin[n])}
    assert all(key.kind == "zero_point" for key in still), "where no value is clipped"


def test_a_model_resumed_ends_in_the_same_bytes(learned):
    best, saved, history = learned
    again, _, longer = loop(learnable.ROTATED, steps=40, resume=saved[0], every=10)
    same(again, best)
    assert longer == history


def test_a_model_of_broken_scales_is_named(learned):
    theta = dict(learned[0])
    key = ThetaKey("scale", "layers.mlp.input")
    theta[key] = np.full_like(theta[key], np.inf)
    with pytest.raises(UserError, match=rf"^{key}: learning diverged at step [01]: "):
        loop(learnable.ROTATED, steps=40, theta=theta, every=10)


def test_a_stage_that_ends_far_above_its_start_has_diverged():
    """Its loss may be one that fell meanwhile, as cross-entropy does."""
    stage = Stage(learn=(("biases", 0.1),), loss="ce")
    _check_end(stage, History(held_out=[(0, 0.15), (10, 1.4)]))
    with pytest.raises(UserError, match=r"held-out KL: learning diverged: 0.15 .* 2.34 at step 10"):
        _check_end(stage, History(held_out=[(0, 0.15), (10, 2.34)]))


@pytest.mark.parametrize(("windows", "held_out", "parts"), [(0, 1, 1), (2, 0, 1), (2, 1, 3)])
def test_no_text_or_unequal_parts_are_told(windows, held_out, parts):
    effort = Effort("odd", steps=2, batch=4, accumulate=parts)
    with pytest.raises(UserError, match=r"effort odd: .* windows to learn from"):
        _check_text(effort, windows, held_out)
