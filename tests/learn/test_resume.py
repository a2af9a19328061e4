"""A run killed at any step, and started again, ends in the bytes of one that was not."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny
from test_checkpoints import INPUTS, assert_equal, refusal

from qnpu_jax.graph.qparams import QParams
from qnpu_jax.learn import stages, train
from qnpu_jax.learn.checkpoints import Checkpoints, last_checkpoint
from qnpu_jax.learn.parameters import ThetaKey
from qnpu_jax.learn.stages import Calibrated, Learned, learn
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import Effort, Recipe, Stage
from qnpu_jax.text.windows import Windows

STEPS = 12  # of each stage: evaluated and saved after every second
STAGE = Stage(learn=(("biases", 0.0003), ("unrotated", 0.05)), share=0.5)
RECIPE = Recipe(name="tiny", bits=tiny.PLANS["w8a8"], stages=(STAGE, STAGE))
EFFORT = Effort("tiny", steps=2 * STEPS, batch=2, length=16, tokens=96, held_out=2, patience=99)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def _compile_once():
    """Both stages are equal: one compilation serves all runs of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_stage", functools.cache(train.compile_stage))
        yield


def run(store: stages.Store | None, kill_at: tuple[int, int] | None = None) -> Learned:
    dec, params, free = tiny.calibrated("mha_tied", "w8a8")
    # Far too coarse: learning has something to do in both stages.
    act = free["layers.mlp.act"]
    coarse = QParams(scale=act.scale * np.float32(8), zero_point=act.zero_point)
    free = dict(free) | {"layers.mlp.act": coarse}
    ids = tiny.random_ids((6, 16))
    text = Windows(tiny.random_ids((4, 24)), ids, ids[:2])

    class Killer(Observer):
        def learned(self, stage: int, step: int, steps: int, loss: float, held_out: float) -> None:
            if (stage, step) == kill_at:
                raise Killed

    return learn(Calibrated(dec, params, free, True), RECIPE, EFFORT, text, store, Killer())


@pytest.fixture(scope="module")
def reference(_compile_once) -> Learned:
    return run(None)


def assert_same(made: Learned, expected: Learned) -> None:
    assert_equal(made.params, expected.params)
    assert_equal(dict(made.free), dict(expected.free))
    assert made.histories == expected.histories


@pytest.mark.slow
def test_something_is_learned(reference):
    _, params, _ = tiny.calibrated("mha_tied", "w8a8")
    for history in reference.histories:
        assert len(history.loss) == STEPS
        assert [step for step, _ in history.held_out] == [0, 2, 4, 6, 8, 10, 12]
        assert min(kl for _, kl in history.held_out) < history.held_out[0][1]
    name = "layers.attn.q.bias"
    assert not np.array_equal(reference.params[name], params[name])


SEVERAL = [(0, 3), (0, 4), (0, 11), (1, 2), (1, 12)]
KILLS = [
    [(0, 1)],  # before the first checkpoint
    [(0, 2)],  # just before it is saved
    [(0, 5)],  # between two
    [(0, 12)],
    [(1, 1)],
    [(1, 8)],
    SEVERAL,
]


@pytest.mark.slow
@pytest.mark.parametrize("kills", pairwise.often(KILLS, [[(0, 2)], SEVERAL]), ids=str)
def test_killed_and_resumed_is_as_never_killed(tmp_path, reference, kills):
    for at in kills:
        with pytest.raises(Killed):
            run(Checkpoints(tmp_path, INPUTS), at)
        assert last_checkpoint(tmp_path) in {at, (at[0], (at[1] - 1) // 2 * 2), (0, 12), None}
    assert_same(run(Checkpoints(tmp_path, INPUTS)), reference)


@pytest.mark.slow
def test_what_is_finished_compiles_nothing(tmp_path, reference, monkeypatch):
    run(Checkpoints(tmp_path, INPUTS))

    def called(*_):
        raise AssertionError("compiled and run")

    monkeypatch.setattr(train, "compile_stage", lambda *_: train.CompiledStage(called, called))
    assert_same(run(Checkpoints(tmp_path, INPUTS)), reference)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "parameter"])
def test_what_diverges_stops_at_the_last_good_checkpoint(tmp_path, reference, monkeypatch, where):
    """As the loss of step 7, or in what step 8 learned, which is evaluated before it is saved."""
    name = ThetaKey("bias", "layers.mlp.down.bias")
    real, stop = train.compile_stage, 7 if where == "loss" else 8

    def broken(*args) -> train.CompiledStage:
        honest = real(*args)

        def step(state, *rest):
            at = int(state.step)
            state, loss, norms = honest.step(state, *rest)
            if (at + 1, last_checkpoint(tmp_path)) == (stop, (1, 6)):
                if where == "loss":
                    return state, jnp.float32(np.nan), norms | {name: jnp.float32(np.inf)}
                state = replace(
                    state, theta=state.theta | {name: state.theta[name] * np.float32(np.nan)}
                )
                return state, loss, norms
            return state, loss, norms

        return train.CompiledStage(step, honest.held_out)

    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_stage", broken)
        said = refusal(run, Checkpoints(tmp_path, INPUTS))
    assert said.startswith(f"{name}: learning diverged at step {stop}: ")
    assert said.endswith("the last checkpoint is kept")
    assert last_checkpoint(tmp_path) == (1, 6)
    assert_same(run(Checkpoints(tmp_path, INPUTS)), reference)


def test_intervals():
    assert [train.evaluation_interval(n) for n in (1, 6, 30, 60, 250, 300, 500, 5000)] == [
        1, 1, 5, 10, 42, 50, 50, 50
    ]  # fmt: skip
