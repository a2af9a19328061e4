"""Which texts a benchmark takes for what, and the runs that read them."""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from workspace import write_tiny_model

from qnpu_jax.errors import UserError
from qnpu_jax.recipes import RECIPES, Effort, Stage
from qnpu_jax.text import excerpts

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
accuracy = importlib.import_module("accuracy")
checks = importlib.import_module("checks")
key_cache = importlib.import_module("key_cache")
protocol = importlib.import_module("protocol")

W8A8 = RECIPES["w8a8"]


def parsed(*given: object) -> Namespace:
    parser = argparse.ArgumentParser()
    protocol.add_arguments(parser)
    return parser.parse_args(list(map(str, given)))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def written_texts(folder: Path, **texts: str) -> dict[str, Path]:
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / "x.txt").write_text(text)
    return {name: folder / name / "x.txt" for name in texts}


@pytest.mark.parametrize("option", ["--own", "--windows", "--batch", "--length"])
@pytest.mark.parametrize("value", ["-7", "99999999999999", "x"])
def test_counts_are_checked_before_anything_is_read(option, value, capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--text", "a", "--calibration", "b", option, value)
    assert end.value.code == 2
    assert option in capsys.readouterr().err


def test_texts_that_would_pass_for_one_another_are_refused(tiny_model, tmp_path):
    at = written_texts(tmp_path, a="words " * 200, b="other words " * 200)
    given = ["--model", tiny_model, "--text", at["a"], "--calibration", at["a"]]
    given += ["--effort", "none", "--windows", 1, "--length", 16]
    with pytest.raises(UserError, match="--others: files named x, x; expected different names"):
        protocol.load(parsed(*given, "--others", at["a"], at["b"]))
    (tmp_path / "text.txt").write_text("words " * 200)
    with pytest.raises(UserError, match="none of them text"):
        protocol.load(parsed(*given, "--others", tmp_path / "text.txt"))
    assert list(protocol.load(parsed(*given, "--others", at["b"])).others) == ["x"]


def test_a_text_too_short_to_learn_from_is_refused_before_the_work(tiny_model, tmp_path):
    at = {name: tmp_path / f"{name}.txt" for name in ("long", "short", "blank")}
    for name, text in (("long", "words " * 900), ("short", "words " * 9), ("blank", " \n")):
        at[name].write_text(text)
    given = ["--model", tiny_model, "--text", at["long"], "--windows", 1, "--length", 16]
    given += ["--calibration", at["long"]]
    for name in ("short", "blank"):
        with pytest.raises(UserError, match=rf"{name}\.txt"):
            protocol.load(parsed(*given, at[name], "--effort", "fast"))
    found = protocol.load(parsed(*given, at["short"], "--effort", "none"))
    assert list(found.calibration) == ["long.txt", "short.txt"]  # rows name no folder


def test_texts_to_calibrate_on_have_different_names(tiny_model, tmp_path):
    at = written_texts(tmp_path, a="words " * 900, b="other words " * 900)
    given = ["--model", tiny_model, "--text", at["a"], "--windows", 1, "--length", 16]
    with pytest.raises(UserError, match=r"--calibration: files named x\.txt, x\.txt; expected"):
        protocol.load(parsed(*given, "--calibration", at["a"], at["b"], "--effort", "none"))


def test_no_window_of_a_run_reads_the_ends_that_judge_it(tiny_model):
    """Asked for more than there is, calibration, GPTQ and learning take the rest of each text."""
    checkpoint = protocol.models_checkpoint.load(str(tiny_model))
    long, short = list(range(3000)), list(range(4000, 4800))
    bench = protocol.Bench(checkpoint, np.zeros((1, 8)), {"long": long, "short": short})
    effort = Effort("tiny", steps=2, length=16, tokens=10**6, held_out=4)
    greedy = Stage(gptq=True, gptq_tokens=10**6)
    recipe = dataclasses.replace(
        W8A8, calibration_length=20, calibration_tokens=200, stages=(greedy,)
    )
    made = bench.text({}, recipe, effort)
    assert made.domains == {excerpts.DOCUMENTATION: 4, "end of long": 4, "end of short": 4}
    assert made.held_out[4:].ravel().tolist() == [*range(2936, 3000), *range(4736, 4800)]
    for windows, last in ((made.pool, 20), (made.learning, 16)):
        seen = set(windows.ravel().tolist())
        assert seen == {*range(2936 // last * last), *range(4000, 4000 + 736 // last * last)}
    np.testing.assert_array_equal(made.pool[:10], made.calibration)
    plain = bench.text({}, dataclasses.replace(recipe, stages=()), effort)
    assert not len(plain.pool), "calibration itself serves"


@pytest.mark.slow
def test_the_measurement_of_the_key_cache_runs(tiny_model, tmp_path, monkeypatch, capsys):
    at = written_texts(tmp_path, text="words of many kinds. " * 900)
    given = ["--model", tiny_model, "--text", at["text"], "--calibration", at["text"]]
    monkeypatch.setattr(
        sys, "argv", ["key_cache", *map(str, given), "--windows", "1", "--length", "32"]
    )
    assert key_cache.main() == 0
    assert "centred: perplexity" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_checked_model_is_verified_and_answers(tiny_model, tmp_path, monkeypatch):
    at = written_texts(tmp_path, text="words of many kinds. " * 900)
    given = ["--model", tiny_model, "--text", at["text"], "--calibration", at["text"]]
    given += ["--effort", "none", "--recipes", "w8a8", "--windows", "1", "--length", "32"]
    rows = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["accuracy", *map(str, given), "--check", "--json", str(rows)])
    for name, tokens in {"PREFILL": 4, "CACHE": 12, "ANSWER": 8}.items():
        monkeypatch.setattr(checks, name, tokens)  # the tiny model has 64 positions
    assert accuracy.main() in (0, 1)
    row = json.loads(rows.read_text())[1]
    assert row["verify"]["differing"] == 0 and row["verify"]["elements"] > 10_000
    assert [chat["asked"] for chat in row["chats"]] == [*checks.ASKED]
    assert all(chat["integers"] and chat["float"] for chat in row["chats"])


def test_what_is_not_checked_needs_no_litert():
    without = "import sys; sys.modules['ai_edge_litert'] = None; import protocol, accuracy"
    command = [sys.executable, "-c", without]
    subprocess.run(command, cwd=Path(__file__).parents[2] / "benchmarks", check=True)
