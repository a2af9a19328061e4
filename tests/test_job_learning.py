"""The main job where it learns: what it reports and keeps, and how it goes on."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
from test_job import read, refused
from workspace import EVAL_TOKENS, request, workspace

from qnpu_jax import artifacts, job, progress
from qnpu_jax.learn import train
from qnpu_jax.learn.train import History
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.recipes import EFFORTS, RECIPES, Effort, Stage
from qnpu_jax.text.files import default_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return workspace(tmp_path_factory.getbasetemp() / "tiny")


EFFORT = Effort("tiny", steps=4, batch=2, length=48, tokens=480, held_out=2)
"""An evaluation and a checkpoint after every step."""
LEARNED = ("model.tflite", "integer_model.safetensors", "recipe.json")


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """A function that asks for a little learning, and out/ of it; compiled once for all."""
    stages = (Stage(calibrate="all"), Stage(learn=(("biases", 0.0003),)))
    recipe = dataclasses.replace(request(folder).recipe, stages=stages)

    def asked(out, **changes) -> job.Job:
        return request(folder, out=out, **{"recipe": recipe, "effort": EFFORT} | changes)

    out = tmp_path_factory.mktemp("learned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_stage", functools.cache(train.compile_stage))
        job.run(asked(out), Simulated, progress.Observer())
        yield asked, out


class Watch(progress.Observer):
    """Remembers what it is told, and interrupts after a step."""

    def __init__(self, until: int | None = None):
        super().__init__()
        self.said, self.steps, self.until = [], [], until

    def say(self, message):
        self.said.append(message)

    def learned(self, stage, step, steps, loss, held_out):
        assert (stage, steps) == (1, EFFORT.steps)
        self.steps.append(step)
        if step == self.until:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_learned(folder, learned):
    _, out = learned
    report = read(out / "report.json")
    (stage,) = report["learned"]
    assert (stage["stage"], stage["steps"], stage["taken"], stage["every"]) == (2, 4, 4, 1)
    assert stage["evaluated"] == [0, 1, 2, 3, 4]
    assert len(stage["loss"]) == 4
    assert len(stage["held_out_kl"]) == 5
    domains = stage["domains"]
    assert domains.keys() == {"pydoc_data.topics", "end of text.txt"}
    for i, kl in enumerate(stage["held_out_kl"]):
        kls = [by_step[i] for by_step in domains.values()]
        # Each is rounded to five digits.
        assert kl == pytest.approx((sum(kls) / 2 + max(kls)) / 2, rel=1e-4)
    assert report["effort"] == "tiny"
    assert report["verify"]["differing"] == 0
    assert report["learning"]["tokens"] == EFFORT.tokens
    assert report["learning"]["source"] == report["calibration"]["source"] == "text.txt"
    early, scored = report["early_stopping"], report["held_out"]
    assert early["source"] == scored["source"] == "pydoc_data.topics"
    assert (early["tokens"], scored["tokens"]) == (96, EVAL_TOKENS)
    settings = read(out / "recipe.json")
    assert settings["effort"] == json.loads(json.dumps(dataclasses.asdict(EFFORT)))
    assert set(settings["inputs"]) == {
        "model", "calibration", "learning", "learning_end", "early_stopping", "prefix", "held_out"
    }  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no checkpoints


@pytest.mark.slow
def test_interrupted_and_resumed(learned, tmp_path):
    asked, out = learned
    request = asked(tmp_path / "out")
    watch = Watch(until=3)
    with pytest.raises(KeyboardInterrupt):
        job.run(request, Simulated, watch)
    kept = tmp_path / "out.checkpoints"
    assert watch.said == [f"learns, and keeps checkpoints in {kept} until it is done"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.checkpoints"]
    assert job.resumes(request) == (2, 2)

    # Not for a job that asks for something else, which touches nothing.
    before = artifacts.digests(kept)
    other = dataclasses.replace(request.recipe, seed=1)
    said = refused(asked(tmp_path / "out", recipe=other))
    assert said.startswith(f"{kept}: checkpoints of another run: recipe.seed: expected 1, got 0; ")
    (tmp_path / "other.txt").write_text(default_text()[70_000:80_000])
    said = refused(asked(tmp_path / "out", calibration=tmp_path / "other.txt"))
    assert said.startswith(f"{kept}: checkpoints of another run: calibration: expected ")
    model = shutil.copytree(request.model, tmp_path / "model")
    config = read(model / "config.json")
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    said = refused(asked(tmp_path / "out", model=str(model)))
    assert "another run: config.rms_norm_eps: expected 1e-06, got 1e-05; give what that" in said
    assert artifacts.digests(kept) == before

    watch = Watch()
    job.run(request, Simulated, watch)
    assert watch.said == [f"goes on from stage 2, step 2, as kept in {kept}"]
    assert watch.steps == [3, 4]
    for name in LEARNED:
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()
    assert not kept.exists()

    # Once done, the same again begins afresh.
    watch = Watch(until=1)
    with pytest.raises(KeyboardInterrupt):
        job.run(dataclasses.replace(request, overwrite=True), Simulated, watch)
    assert watch.steps == [1]
    assert not kept.exists()  # nothing was learned yet, so nothing is left behind
    assert job.resumes(request) is None


def test_checkpoints_elsewhere(learned, tmp_path):
    asked, _ = learned
    request = asked(tmp_path / "out", checkpoints=tmp_path / "a" / "kept")
    with pytest.raises(KeyboardInterrupt):
        job.run(request, Simulated, Watch(until=2))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert job.resumes(request) == (2, 1)
    assert job.resumes(asked(tmp_path / "out")) is None


def test_where_checkpoints_go(folder):
    def place(out):
        return request(folder, out=Path(out)).checkpoint_folder()

    assert place("out/") == Path("out.checkpoints")
    assert place("a/b.c") == Path("a/b.c.checkpoints")
    assert place(".") == Path.cwd().with_name(f"{Path.cwd().name}.checkpoints")


def test_a_recipe_that_learns_nothing_keeps_nothing(folder):
    for recipe in (RECIPES["rtn-minmax-w8a8"], RECIPES["spinquant-w8a8"]):
        assert request(folder, recipe=recipe, effort=EFFORTS["fast"]).learning() is None
    assert request(folder, effort=EFFORTS["fast"]).learning() is EFFORTS["fast"]


def test_long_histories_are_shortened(folder):
    recipe = dataclasses.replace(request(folder).recipe, stages=(Stage(learn=(("biases", 1.0),)),))
    asked = request(folder, recipe=recipe, effort=dataclasses.replace(EFFORT, steps=500))
    history = History([float(i) for i in range(500)], [(0, 1 / 3)])
    (stage,) = job._learned(asked, [history])
    assert stage["every"] == 3
    assert stage["loss"][:2] == [1.0, 4.0]
    assert stage["loss"][-1] == 498.5
    assert len(stage["loss"]) == 167
    assert stage["held_out_kl"] == [0.33333]


@pytest.mark.nightly
def test_a_learning_rate_that_diverges(learned, tmp_path):
    asked, _ = learned
    stages = (Stage(learn=(("unrotated", 1e4), ("biases", 0.001))),)
    recipe = dataclasses.replace(asked(tmp_path).recipe, stages=stages)
    said = refused(asked(tmp_path / "out", recipe=recipe))
    assert "learning diverged at step " in said
    assert "lower the learning rates of the stage" in said
    assert said.endswith("the last checkpoint is kept")
