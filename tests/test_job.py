"""The main job in one process: what it writes, proves and refuses, and when it refuses."""

import dataclasses
import hashlib
import json

import numpy as np
import pairwise
import pytest
from workspace import EVAL_TOKENS, PREFILL, VOCAB, request, workspace, write_tiny_model

from qnpu_jax import deploy, job, models, progress
from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph.graph import is_identity
from qnpu_jax.integer import storage
from qnpu_jax.output import OutputFolder
from qnpu_jax.proof.comparison import op_names
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.recipes import RECIPES
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
    prefixed = ["with prefix"] if report["prefix"]["tokens"] else []
    assert list(scores) == ["float", *prefixed, "fake-quant", "simulator", "LiteRT"]
    assert scores["LiteRT"] == scores["simulator"]
    assert scores["fake-quant"] == pytest.approx(scores["float"], rel=0.1)
    stages = {"load", "fold, rotate", "prefix", "calibrate", "freeze", "write", "verify"}
    assert stages < set(report["seconds"])
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert set(report["sha256"]) == files - {"report.json"}
    assert report["rotations"] == {"R1": "residual stream", "R2": "values of each layer"}
    assert report["norms"] == "once"
    assert report["mlp_channels"]["added"] == 0
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


@pytest.mark.slow
def test_same_seed_same_bytes_another_seed_others(folder, out, tmp_path):
    again = request(folder, out=tmp_path / "again")
    job.run(again, Simulated, progress.Observer())
    for name in ("model.tflite", "integer_model.safetensors", "recipe.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    other = dataclasses.replace(again.recipe, seed=1)
    job.run(request(folder, out=tmp_path / "other", recipe=other), Simulated, progress.Observer())
    files = [d / "integer_model.safetensors" for d in (out, tmp_path / "other")]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize("name", pairwise.often(["w4a8", "w8a16", "w4a16"], []))
def test_every_recipe_is_proved(folder, tmp_path, name):
    recipe = dataclasses.replace(request(folder).recipe, name=name, bits=RECIPES[name].bits)
    report = job.run(
        request(folder, out=tmp_path / "out", recipe=recipe), Simulated, progress.Observer()
    )
    assert report["verify"]["differing"] == 0
    assert report["perplexity"]["LiteRT"] == report["perplexity"]["simulator"]


@pytest.mark.slow
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


@pytest.mark.slow
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


# Afterwards.


def test_check_on_other_text(folder, out):
    made = OutputFolder.open(out)
    found = job.verify_folder(made, folder / "text.txt", Simulated, progress.Observer())
    assert found.comparison.to_json() == read(out / "report.json")["verify"]


@pytest.mark.slow
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
    def prepare(*_, **__):
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
        ("layers.1.*.weight", 2, f"layers.1.attn.q.weight: {bits} 2 bits; expected 4 or 8;"),
        ("*.o.bias", 16, f"layers.0.attn.o.bias: {bits} 16 bits; expected 32 or 64;"),
        ("*.k_cache", 16, f"layers.0.attn.prefix_k: {bits} 16 bits; expected 8;"),
        ("*.masked", 8, "the plan gives it fewer bits than its input"),
        ("head.logits", 32, f"head.logits: {bits} 32 bits; expected 8 or 16;"),
    ]:
        assert message in refused(with_rule(asked, pattern, width))
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.slow
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
