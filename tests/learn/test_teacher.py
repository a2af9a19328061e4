"""What is kept of the float teacher: the right rows of it, within its bound, and the same learning
as from a teacher that is recomputed."""

import dataclasses
import itertools
from copy import deepcopy
from typing import Any

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import pytest
import tiny

from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.forward import Reading
from qnpu_jax.learn import stages as learn_stages
from qnpu_jax.learn import teacher, train
from qnpu_jax.learn.losses import top_k
from qnpu_jax.learn.stages import Calibrated, Learned, Nowhere, learn
from qnpu_jax.learn.teacher import (
    BYTES_PER_TOKEN,
    CachedTopK,
    cache_teacher,
    check_teacher_bytes,
)
from qnpu_jax.learn.train import History, Progress, TrainSettings, TrainState, batches, uncached
from qnpu_jax.recipes import Effort, Recipe, Stage
from qnpu_jax.text.windows import Windows

K, STEPS, SEED = 4, 12, 3
STAGE = dataclasses.replace(learnable.ROTATED, top_k=K)
WINDOWS = learnable.WINDOWS
RECOMPUTED = dataclasses.replace(learnable.EFFORT, steps=STEPS)
ALL = BYTES_PER_TOKEN * WINDOWS.size * K
KEPT = dataclasses.replace(RECOMPUTED, teacher_bytes=ALL)


def kept(effort: Effort = KEPT, stage: Stage = STAGE, steps: int = STEPS) -> train.TeacherCache:
    dec, params, _ = learnable.made()
    return cache_teacher(TrainSettings(dec, stage, effort, steps, SEED), params, WINDOWS)


# --- What is kept ---


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 5, 7], ids="in parts of {}".format)
def test_each_window_has_its_own_teacher(batch):
    """16 windows: the last part is short where it does not divide them."""
    dec, params, _ = learnable.made()
    found = kept(dataclasses.replace(KEPT, batch=batch))
    assert isinstance(found, CachedTopK)
    np.testing.assert_array_equal(found.windows, np.arange(16))
    assert (found.log_p.dtype, found.ids.dtype) == (np.float32, np.int32)
    assert found.log_p.nbytes + found.ids.nbytes == ALL, "what it was said to take"
    rows = np.asarray([15, 0, 7, 15])
    read = found(rows)
    for i, row in enumerate(rows):
        logits = learnable.logits_of(dec, Reading(params, {}), WINDOWS[row])
        expected = top_k(jnp.asarray(logits), K)
        np.testing.assert_array_equal(read.ids[i], expected.ids)
        np.testing.assert_allclose(read.log_p[i], expected.log_p, atol=1e-5)  # float32


def test_only_windows_that_some_step_reads_are_kept():
    used = {int(i) for b in itertools.islice(batches(16, 2, SEED, 0), 3) for i in b}
    assert len(used) == 6
    small = dataclasses.replace(KEPT, teacher_bytes=ALL * 6 // 16)
    found = kept(small, steps=3)
    assert isinstance(found, CachedTopK) and found.windows.tolist() == sorted(used)
    whole = kept()
    for rows in itertools.islice(batches(16, 2, SEED, 0), 3):
        jax.tree.map(
            # Parts of other windows: the last bits of a matrix product may differ.
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            found(rows),
            whole(rows),
        )


def test_a_top_k_of_more_tokens_than_there_are_keeps_all():
    vocabulary = learnable.CONFIG.vocab_size
    effort = dataclasses.replace(KEPT, teacher_bytes=BYTES_PER_TOKEN * WINDOWS.size * vocabulary)
    found = kept(effort, dataclasses.replace(STAGE, top_k=10**6))
    assert isinstance(found, CachedTopK)
    np.testing.assert_array_equal(np.sort(found.ids, axis=-1)[0, 0], np.arange(vocabulary))


@pytest.mark.parametrize(
    ("stage", "effort"),
    [
        (dataclasses.replace(STAGE, top_k=0), KEPT),
        (dataclasses.replace(STAGE, hidden_mse=0.1), KEPT),
        (dataclasses.replace(STAGE, loss="ce"), KEPT),
        (dataclasses.replace(STAGE, loss="hidden"), KEPT),
        (STAGE, RECOMPUTED),
    ],
    ids=["full KL", "hidden_mse", "ce", "hidden", "no memory"],
)
def test_nothing_is_kept_where_it_is_not_enough_or_not_asked_for(monkeypatch, stage, effort):
    monkeypatch.delattr(teacher, "teacher_top_k")  # called, it would raise NameError
    assert kept(effort, stage) is uncached
    one_byte = dataclasses.replace(effort, teacher_bytes=min(effort.teacher_bytes, 1))
    assert kept(one_byte, stage) is uncached, "no bound on what is not kept"


# --- Its bound ---


def test_more_than_its_bound_is_told_before_anything_is_computed(monkeypatch):
    monkeypatch.delattr(teacher, "teacher_top_k")
    with pytest.raises(UserError) as error:
        kept(dataclasses.replace(KEPT, teacher_bytes=ALL - 1))
    assert str(error.value) == (
        "effort test: the teacher's likeliest tokens (16 windows x 8 tokens x top 4) take 4,096"
        " bytes; expected at most teacher_bytes = 4,095; learn from fewer tokens, lower the stage's"
        " top_k, raise teacher_bytes, or set it to 0 to recompute them"
    )
    dec, _, _ = learnable.made()
    settings = TrainSettings(dec, STAGE, KEPT, STEPS, SEED)
    assert len(check_teacher_bytes(settings, WINDOWS)) == 16, "exactly full is not over"


def test_a_later_stages_bound_is_told_before_the_first_stage(monkeypatch):
    monkeypatch.delattr(learn_stages, "_calibrate")
    late = dataclasses.replace(STAGE, top_k=K + 1)
    with pytest.raises(UserError, match=r"top 5\) take 5,120 bytes; .* teacher_bytes = 4,096;"):
        run(dataclasses.replace(KEPT, steps=2 * STEPS), stages=(STAGE, late))


# --- Learning from it ---


class Memory(Nowhere):
    """Keeps every state; gives back the one of step `at`."""

    def __init__(self, saved: dict[int, Any] | None = None, at: int = 0) -> None:
        self.saved, self.at = dict(saved or {}), at

    def load(self, stage: int, like: TrainState) -> Any:
        if not self.at:
            return None
        state, history = self.saved[self.at]
        state = jax.tree.map(
            lambda x, y: jnp.array(x) if isinstance(y, jax.Array) else np.asarray(x), state, like
        )
        return Progress(state, deepcopy(history))

    def save(self, stage: int, state: TrainState, history: History) -> None:
        held = deepcopy(history)
        self.saved[int(state.step)] = jax.tree.map(np.array, state), held


def run(effort: Effort, store: Memory | None = None, stages: Any = (STAGE,)) -> Learned:
    dec, params, free = learnable.made()
    text = Windows(learnable.random_ids(4, seed=5), WINDOWS, learnable.HELD_OUT)
    share = 1 / len(stages)
    parts = tuple(dataclasses.replace(s, share=share) for s in stages)
    recipe = Recipe(name="test", bits=tiny.PLANS["w4a8"], seed=SEED, stages=parts)
    return learn(Calibrated(dec, params, free, tame=True), recipe, effort, text, store)


@pytest.fixture(scope="module")
def _compile_once():
    """One program for held-out text, whatever is kept."""

    def compile_stage(dec, stage, effort, steps):
        plain = dataclasses.replace(effort, teacher_bytes=0)
        return learnable.compile_stage(dec, stage, plain, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_stage", compile_stage)
        yield


@pytest.fixture(scope="module")
def cached(_compile_once) -> tuple[Learned, Memory]:
    store = Memory()
    return run(KEPT, store), store


def assert_same(a: Learned, b: Learned) -> None:
    jax.tree.map(np.testing.assert_array_equal, dict(a.params), dict(b.params))
    jax.tree.map(np.testing.assert_array_equal, dict(a.free), dict(b.free))
    assert a.histories == b.histories


@pytest.mark.slow
@pytest.mark.nightly
def test_learning_from_what_was_kept_is_learning(cached, monkeypatch):
    """Compiled by itself, the teacher may round otherwise than within the step (here it does not):
    losses differ by float32's error, parameters by less than a tenth of a step of 0.01."""
    made, store = cached
    plain = Memory()
    (expected,) = run(RECOMPUTED, plain).histories
    (history,) = made.histories
    assert len(history.loss) == STEPS
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-3)
    for step, (state, _) in plain.saved.items():
        for key, x in state.theta.items():
            found = store.saved[step][0].theta[key]
            np.testing.assert_allclose(found, x, atol=1e-3, err_msg=f"{key} at step {step}")
    # Had the steps not read it, or of the wrong window, that would say nothing.
    real = CachedTopK.__call__
    monkeypatch.setattr(CachedTopK, "__call__", lambda self, rows: real(self, (rows + 1) % 16))
    (wrong,) = run(KEPT).histories
    assert np.abs(np.divide(wrong.loss, expected.loss) - 1).min() > 0.05


@pytest.mark.parametrize("at", [2, 8])
def test_a_run_resumed_with_a_teacher_kept_ends_in_the_same_bytes(cached, at):
    made, store = cached
    again = Memory(store.saved, at)
    again.saved = {step: kept for step, kept in store.saved.items() if step <= at}
    assert_same(run(KEPT, again), made)
    assert again.saved.keys() == store.saved.keys()
    for step, (state, history) in again.saved.items():
        expected, expected_history = store.saved[step]
        jax.tree.map(np.testing.assert_array_equal, state, expected)
        assert history == expected_history


def test_a_stage_that_has_ended_keeps_nothing(cached, monkeypatch):
    made, store = cached
    monkeypatch.delattr(teacher, "teacher_top_k")
    assert_same(run(KEPT, Memory(store.saved, STEPS)), made)
