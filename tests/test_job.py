"""The main job in one process: what it writes, proves and refuses, and when it refuses."""

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pairwise
import pytest
from workspace import EVAL_TOKENS, PREFILL, VOCAB, request, workspace, write_tiny_model

from qnpu_jax import artifacts, deploy, job, models, progress
from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph.graph import is_identity
from qnpu_jax.integer import storage
from qnpu_jax.learn import train
from qnpu_jax.learn.train import History
from qnpu_jax.output import OutputFolder
from qnpu_jax.proof.comparison import op_names
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.recipes import EFFORTS, RECIPES, Effort, Stage
from qnpu_jax.text.files import default_text
from qnpu_jax.tflite.interpreter import LiteRT
from qnpu_sim.program import compile_model, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return workspace(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(scope="module")
def out(folder):
    return folder / "out"


def read(path):
    return json.loads(path.read_text())


# What lands in the folder.


def test_files(out):
    assert {p.name for p in out.iterdir()} == {
        "model.tflite",
        "integer_model.safetensors",
        "integer_model.json",
        "recipe.json",
        "report.json",
        "tokenizer",
    }


def test_recipe_holds_every_setting_and_input(folder, out):
    data = read(out / "recipe.json")
    assert data["recipe"] == read(folder / "recipe.json")
    assert data["recipe"]["seed"] == 0
    assert (data["prefill"], data["logits"]) == (PREFILL, "all")
    inputs = data["inputs"]
    weights = (folder / "model" / "model.safetensors").read_bytes()
    assert inputs["model"] == {"source": "model", "sha256": hashlib.sha256(weights).hexdigest()}
    text = (folder / "text.txt").read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    assert inputs["calibration"] == {"source": "text.txt", "sha256": digest, "tokens": 128}
    digest = hashlib.sha256(default_text().encode()).hexdigest()
    assert inputs["held_out"]["sha256"] == digest
    assert set(data["versions"]) == {"python", *job.PACKAGES}
    assert str(folder) not in (out / "recipe.json").read_text()  # nothing of this machine


def test_report(folder, out):
    report = read(out / "report.json")
    assert report["held_out"]["tokens"] == EVAL_TOKENS
    assert report["bytes"] == (out / "model.tflite").stat().st_size
    assert report["verify"]["differing"] == 0
    assert report["verify"]["differences"] == []
    assert report["verify"]["elements"] > 10_000
    scores = report["perplexity"]
    assert list(scores) == ["float", "fake-quant", "simulator", "LiteRT"]
    assert scores["LiteRT"] == scores["simulator"]
    assert scores["fake-quant"] == pytest.approx(scores["float"], rel=0.1)
    stages = {"load", "fold, rotate", "prefix", "calibrate", "freeze", "write", "verify"}
    assert stages < set(report["seconds"])
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(report["sha256"]) == files - {"report.json"}
    assert str(folder) not in (out / "report.json").read_text()
    assert max(map(len, (out / "report.json").read_text().splitlines())) < 200


def test_accumulators_stay_within_what_was_proved(out):
    found = read(out / "report.json")["accumulators"]
    assert found["closest"]["needed"] <= found["closest"]["available"]
    rows = found["all"]
    assert {"layers.attn.q", "layers.attn.kv1.scores", "layers.mlp.down", "head.logits"} < set(rows)
    for row in rows.values():
        seen, low, high = (np.asarray(row[k], np.float64) for k in ("seen", "low", "high"))
        assert (seen <= np.maximum(-low, high)).all()
        assert (seen > 0).all()


def test_every_op_of_the_graphs_is_compared(out):
    model = storage.load(out)
    dec = model.decoder(PREFILL)
    total = sum(
        not is_identity(g, n, i) for g in dec.graphs for n in g.nodes for i in range(g.layers)
    )
    assert read(out / "report.json")["verify"]["tensors"] == total
    assert len(op_names(model.decoder(PREFILL))) == total
    assert len(op_names(model.decoder(PREFILL, logits="last"))) == total + 1


def test_same_seed_same_bytes_another_seed_others(folder, out, tmp_path):
    again = request(folder, out=tmp_path / "again")
    job.run(again, Simulated, progress.Observer())
    for name in ("model.tflite", "integer_model.safetensors", "recipe.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    other = dataclasses.replace(again.recipe, seed=1)
    job.run(request(folder, out=tmp_path / "other", recipe=other), Simulated, progress.Observer())
    files = [d / "integer_model.safetensors" for d in (out, tmp_path / "other")]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize("name", pairwise.often(["w4a8", "w8a16", "w4a16"], ["w4a16"]))
def test_every_recipe_is_proved(folder, tmp_path, name):
    recipe = dataclasses.replace(request(folder).recipe, name=name, bits=RECIPES[name].bits)
    report = job.run(
        request(folder, out=tmp_path / "out", recipe=recipe), Simulated, progress.Observer()
    )
    assert report["verify"]["differing"] == 0
    assert report["perplexity"]["LiteRT"] == report["perplexity"]["simulator"]


def test_logits_of_the_last_position(folder, tmp_path):
    report = job.run(
        request(folder, out=tmp_path / "out", logits="last"), Simulated, progress.Observer()
    )
    assert report["verify"]["differing"] == 0
    # Scoring takes every position all the same.
    assert report["perplexity"] == read(folder / "out" / "report.json")["perplexity"]
    assert LiteRT(tmp_path / "out" / "model.tflite").logits == "last"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (folder / "out").iterdir()
    }
    made = OutputFolder.open(tmp_path / "out")
    assert job.verify_folder(made, None, Simulated, progress.Observer()).comparison.differing == 0


def test_without_rotation_and_prefix_on_text_of_its_own(folder, tmp_path):
    recipe = dataclasses.replace(
        request(folder).recipe, rotation="none", prefix="none", calibration_tokens=64
    )
    (tmp_path / "held_out.jsonl").write_text(
        '{"text": "the words that are scored here, thrice"}\n' * 3
    )
    report = job.run(
        request(
            folder, out=tmp_path / "out", recipe=recipe, calibration=None,
            eval_text=tmp_path / "held_out.jsonl",
        ),
        Simulated, progress.Observer(),
    )  # fmt: skip
    assert report["prefix"] is None
    assert report["calibration"]["source"] == "written by the model"
    assert report["calibration"]["tokens"] == 64
    assert report["held_out"]["source"] == "held_out.jsonl"
    assert report["verify"]["differing"] == 0
    assert "calibration text" in report["seconds"]


# Learning.

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


def test_learned(folder, learned):
    _, out = learned
    report = read(out / "report.json")
    (stage,) = report["learned"]
    assert (stage["stage"], stage["steps"], stage["taken"], stage["every"]) == (2, 4, 4, 1)
    assert stage["evaluated"] == [0, 1, 2, 3, 4]
    assert len(stage["loss"]) == 4
    assert len(stage["held_out_kl"]) == 5
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
        "model", "calibration", "learning", "early_stopping", "held_out"
    }  # fmt: skip
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # no checkpoints


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


# Afterwards.


def test_check_on_other_text(folder, out):
    made = OutputFolder.open(out)
    found = job.verify_folder(made, folder / "text.txt", Simulated, progress.Observer())
    assert found.comparison.to_json() == read(out / "report.json")["verify"]


@pytest.mark.parametrize(("prefill", "logits"), [(40, "all"), (7, "last")])
def test_export(folder, out, tmp_path, prefill, logits):
    file = tmp_path / "m.tflite"
    deploy.export(OutputFolder.open(out), file, prefill, logits)
    runner = LiteRT(file)
    assert (runner.tokens, runner.logits) == (prefill, logits)
    ids = np.random.default_rng(0).integers(VOCAB, size=prefill, dtype=np.int32)
    model = storage.load(out)
    program = compile_model(model, model.decoder(prefill, logits=logits), "litert_ref")
    np.testing.assert_array_equal(runner.run(ids), run(program, ids)["head.logits"])
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_export_of_the_same_length_is_the_same_file(out, tmp_path):
    deploy.export(OutputFolder.open(out), tmp_path / "m.tflite", PREFILL, "all")
    assert (tmp_path / "m.tflite").read_bytes() == (out / "model.tflite").read_bytes()


# Refusals: before the work.


def refused(asked: job.Job) -> str:
    with pytest.raises(UserError) as error:
        job.run(asked, Simulated, progress.Observer())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refused_before_the_model_is_read(folder, tmp_path, monkeypatch):
    def load(_):
        raise AssertionError("the model was read")

    monkeypatch.setattr(models, "load", load)
    (tmp_path / "empty.txt").write_text("\n")
    for changes, message in [
        ({"prefill": 1}, "prefill: 1 is too short; expected at least 2"),
        ({"prefill": -5}, "prefill: -5 is too short"),
        (
            {"eval_tokens": PREFILL - 1},
            "eval-tokens: 15 is less than one window; expected at least",
        ),
        ({}, "out: not empty; expected a new or empty folder; use --overwrite"),
        ({"calibration": tmp_path / "no.txt"}, "no.txt: no such file"),
        ({"calibration": tmp_path / "empty.txt"}, "empty.txt: no text in it"),
        ({"eval_text": tmp_path / "empty.txt"}, "empty.txt: no text in it"),
    ]:
        out = {} if message.startswith("out") else {"out": tmp_path / "out"}
        assert message in refused(request(folder, **out | changes))
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def with_rule(asked: job.Job, pattern: str, bits: int) -> job.Job:
    """One rule of the plan replaced, or put first."""
    others = tuple(rule for rule in asked.recipe.bits.rules if rule[0] != pattern)
    recipe = dataclasses.replace(asked.recipe, bits=BitPlan(((pattern, bits), *others)))
    return dataclasses.replace(asked, recipe=recipe)


def test_refused_before_the_model_is_touched(folder, tmp_path, monkeypatch):
    def prepare(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("qnpu_jax.pipeline.prepare", prepare)
    (tmp_path / "short.txt").write_text("Too short.")
    asked = request(folder, out=tmp_path / "out")
    bits = "the bit plan gives it"
    few = "tokens are too few; expected at least"
    for changes, message in [
        ({"prefill": 600, "eval_tokens": 600}, "prefill: 600 tokens after a prefix of up to 6;"),
        ({"calibration": tmp_path / "short.txt"}, f"short.txt: 8 {few} 32 (one window)"),
        ({"eval_text": tmp_path / "short.txt"}, f"short.txt: 8 {few} {PREFILL} (one window)"),
    ]:
        assert message in refused(dataclasses.replace(asked, **changes))
    long = dataclasses.replace(asked.recipe, calibration_length=509)
    assert "calibration_length: 509 tokens after a prefix of up to 6; expected at most" in refused(
        dataclasses.replace(asked, recipe=long)
    )
    for pattern, width, message in [
        ("layers.7.*", 8, "bit plan rule 'layers.7.*': 8: matches no tensor"),
        ("embed.weight", 4, f"embed.weight: {bits} 4 bits; expected 8;"),
        ("layers.1.*.weight", 2, f"layers.attn.q.weight: {bits} 2 bits; expected 4 or 8;"),
        ("*.o.bias", 16, f"layers.attn.o.bias: {bits} 16 bits; expected 32 or 64;"),
        ("*.k_cache", 16, f"layers.attn.prefix_k: {bits} 16 bits; expected 8;"),
        ("*.masked", 8, "the plan gives it fewer bits than its input"),
        ("head.logits", 32, f"head.logits: {bits} 32 bits; expected 8 or 16;"),
    ]:
        assert message in refused(with_rule(asked, pattern, width))
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_tokenizer_of_another_model(folder, tmp_path):
    write_tiny_model(tmp_path / "model", vocab_size=VOCAB + 10)
    said = refused(request(folder, model=str(tmp_path / "model"), out=tmp_path / "out"))
    assert "model: the tokenizer has token ids up to 329, outside the model's vocabulary" in said


@pytest.mark.nightly
def test_eight_bit_residual(folder, tmp_path):
    """The requantize after the embedding is an identity then, tied to the table."""
    asked = with_rule(request(folder, out=tmp_path / "out"), "*.residual", 8)
    report = job.run(asked, Simulated, progress.Observer())
    assert report["verify"]["differing"] == 0
