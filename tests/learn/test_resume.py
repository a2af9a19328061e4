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


def run(
    store: stages.Store | None,
    kill_at: tuple[int, int] | None = None,
    time: int = 1,
    recipe: Recipe = RECIPE,
    said: list[str] | None = None,
) -> Learned:
    """Learns, until a stage takes a step for the n-th time."""
    dec, params, free = tiny.calibrated("mha_tied", "w8a8")
    # Far too coarse: learning has something to do in both stages.
    act = free["layers.mlp.act"]
    coarse = QParams(scale=act.scale * np.float32(8), zero_point=act.zero_point)
    free = dict(free) | {"layers.mlp.act": coarse}
    ids = tiny.random_ids((6, 16))
    text = Windows(tiny.random_ids((4, 24)), ids, ids[:2])

    class Killer(Observer):
        times = 0

        def learned(self, stage: int, step: int, steps: int, loss: float, held_out: float) -> None:
            self.times += (stage, step) == kill_at
            if self.times == time:
                raise Killed

        def say(self, message: str) -> None:
            assert said is not None, message
            said.append(message)

    return learn(Calibrated(dec, params, free, True), recipe, EFFORT, text, store, Killer())


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


# --- Stages that diverge ---

BROKEN = ThetaKey("bias", "layers.mlp.down.bias")


def diverging(where: str, slow: float):
    """`train.compile_stage` whose steps diverge unless the rates are that much lower: as the loss
    of step 7, in what step 8 learned, which is evaluated before it is saved, or by the KL at the
    end, which is saved."""
    real, stop = train.compile_stage, {"loss": 7, "parameter": 8, "end": STEPS}[where]

    def broken(dec, stage, effort, steps) -> train.CompiledStage:
        honest, taken = real(dec, stage, effort, steps), 0

        def held_out(*args):
            kl = honest.held_out(*args)
            high = stage.learn[0][1] > STAGE.learn[0][1] * slow
            return 1000 * kl if where == "end" and taken == stop and high else kl

        def step(state, *rest):
            nonlocal taken
            at = int(state.step)
            taken = at + 1
            state, loss, norms = honest.step(state, *rest)
            if where == "end" or at + 1 != stop or stage.learn[0][1] <= STAGE.learn[0][1] * slow:
                return state, loss, norms
            if where == "loss":
                return state, jnp.float32(np.nan), norms | {BROKEN: jnp.float32(np.inf)}
            ruined = state.theta | {BROKEN: state.theta[BROKEN] * np.float32(np.nan)}
            return replace(state, theta=ruined), loss, norms

        return train.CompiledStage(step, held_out)

    return broken


@pytest.fixture(scope="module")
def quartered(_compile_once) -> Learned:
    """What the recipe gives whose rates are a quarter."""
    stage = stages.slowed(STAGE, 1)
    assert stage.learn == (("biases", 0.000075), ("unrotated", 0.0125))
    return run(None, recipe=replace(RECIPE, stages=(stage, stage)))


def assert_retreated(made: Learned, quartered: Learned) -> None:
    assert [h.retreats for h in made.histories] == [1, 1]
    assert_same(
        replace(made, histories=[replace(h, retreats=0) for h in made.histories]), quartered
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "parameter"])
def test_what_diverges_begins_anew_at_a_quarter_of_its_rates(
    tmp_path, quartered, monkeypatch, where
):
    monkeypatch.setattr(train, "compile_stage", diverging(where, 0.25))
    said: list[str] = []
    made = run(Checkpoints(tmp_path, INPUTS), said=said)
    assert_retreated(made, quartered)
    step = 7 if where == "loss" else 8
    assert len(said) == 2
    for i, s in enumerate(said):
        assert s.startswith(f"stage {i + 1}: {BROKEN}: learning diverged at step {step}: ")
        assert "; lower" not in s
    assert all(s.endswith("; begun anew at a quarter of its rates") for s in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        [((0, 7), 1)],  # in the step that diverges first
        [((0, 1), 2), ((0, 7), 1)],  # twice after it began anew
        [((0, 5), 2), ((1, 2), 1), ((1, 12), 1)],
    ],
    ids=str,
)
def test_killed_before_or_after_it_diverged_is_as_never_killed(
    tmp_path, quartered, monkeypatch, kills
):
    monkeypatch.setattr(train, "compile_stage", diverging("parameter", 0.25))
    for at, time in kills:
        with pytest.raises(Killed):
            run(Checkpoints(tmp_path, INPUTS), at, time, said=[])
    assert_retreated(run(Checkpoints(tmp_path, INPUTS), said=[]), quartered)


@pytest.mark.slow
def test_killed_between_its_end_and_beginning_anew_is_as_never_killed(
    tmp_path, quartered, monkeypatch
):
    monkeypatch.setattr(train, "compile_stage", diverging("end", 0.25))

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "forget", killed)
        with pytest.raises(Killed):
            run(Checkpoints(tmp_path, INPUTS), said=[])
    assert last_checkpoint(tmp_path) == (0, STEPS)
    said: list[str] = []
    assert_retreated(run(Checkpoints(tmp_path, INPUTS), said=said), quartered)
    assert all(": held-out KL: learning diverged: " in s for s in said)


@pytest.mark.slow
@pytest.mark.usefixtures("_compile_once")
@pytest.mark.parametrize("where", ["loss", "parameter"])
def test_what_diverges_a_third_time_stops_at_its_last_good_checkpoint(tmp_path, monkeypatch, where):
    given: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_stage", diverging(where, 0.01))
        said = refusal(run, Checkpoints(tmp_path, INPUTS), said=given)
    assert len(given) == 2
    assert said.startswith(f"{BROKEN}: learning diverged at step {7 if where == 'loss' else 8}: ")
    assert said.endswith("the last checkpoint is kept")
    assert last_checkpoint(tmp_path) == (0, 6)
    monkeypatch.setattr(train, "compile_stage", diverging(where, 1 / 16))
    gone_on = run(Checkpoints(tmp_path, INPUTS), said=[])
    assert [h.retreats for h in gone_on.histories] == [2, 2]


def test_intervals():
    assert [train.evaluation_interval(n) for n in (1, 6, 30, 60, 250, 300, 500, 5000)] == [
        1, 1, 5, 10, 42, 50, 50, 50
    ]  # fmt: skip
