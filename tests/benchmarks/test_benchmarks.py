"""What the benchmarks decide from rows: which are kept, refused, compared. Nothing is measured."""

import dataclasses
import importlib
import json
import math
import os
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qnpu_jax.errors import UserError
from qnpu_jax.recipes import EFFORTS, RECIPES, Recipe

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
ablation = importlib.import_module("ablation")
accuracy = importlib.import_module("accuracy")
checks = importlib.import_module("checks")
key_cache = importlib.import_module("key_cache")
outcome = importlib.import_module("outcome")
protocol = importlib.import_module("protocol")
rows_module = importlib.import_module("rows")

SHARED = {"model": "m", "text": "t", "calibration": "c", "windows": 2, "length": 8}
W8A8 = RECIPES["w8a8"]


def job(name="w8a8", score=30.0, calls=None, **settings):
    def measure():
        if calls is not None:
            calls.append(name)
        return {"recipe": "w8a8", "fake_quant": score}

    full = {**SHARED, "effort": "full", "steps": 500, "seed": 0, **settings}
    return rows_module.Job(name, full, measure)


# Rows of a file.


def test_rows_are_kept_and_not_measured_again(tmp_path):
    path, calls = tmp_path / "rows.json", []
    rows_module.kept_rows(path, [job("a", calls=calls)])
    rows = rows_module.kept_rows(path, [job("a", calls=calls), job("b", calls=calls)])
    assert calls == ["a", "b"]
    assert [row["name"] for row in rows] == ["a", "b"]
    assert json.loads(path.read_text()) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_a_command_killed_while_it_writes_costs_no_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    before = rows_module.kept_rows(path, [job("a")])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        rows_module.kept_rows(path, [job("a"), job("b")])
    assert rows_module.read_rows(path) == before


@pytest.mark.parametrize(
    "other", [{"effort": "fast"}, {"steps": 150}, {"seed": 1}, {"windows": 128}, {"length": 512}]
)
def test_a_row_of_other_settings_is_refused_before_anything_is_measured(tmp_path, other):
    path, calls = tmp_path / "rows.json", []
    rows_module.kept_rows(path, [job("a", **other)])
    (key, value), wanted = *other.items(), job().settings
    message = f"row 'a': expected {key} {wanted[key]}; got {key} {value}; give another --json"
    with pytest.raises(UserError, match=message):
        rows_module.kept_rows(path, [job("b", calls=calls), job("a", calls=calls)])
    assert not calls


def test_rows_on_other_windows_do_not_stand_in_one_table(tmp_path):
    path = tmp_path / "rows.json"
    rows_module.kept_rows(path, [job("a", windows=128)])
    with pytest.raises(UserError, match="row 'a': expected windows 2; got windows 128"):
        rows_module.kept_rows(path, [job("b")])
    rows_module.kept_rows(path, [job("b", windows=128, effort="fast")])  # efforts may differ


def test_rows_without_settings_are_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"name": "a", "fake_quant": Infinity}]')
    with pytest.raises(UserError, match="got model None"):
        rows_module.kept_rows(path, [job("a")])


def test_two_recipes_of_one_name_are_refused():
    with pytest.raises(UserError, match="recipes: row 'mine'"):
        rows_module.kept_rows(None, [job("mine", settings="1"), job("mine", settings="2")])


@pytest.mark.parametrize("text", ["[{", "{}", '[{"fake_quant": 1}]'])
def test_damaged_files_are_named(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rows\.json: .*name another"):
        rows_module.kept_rows(path, [job()])


def test_no_folder_is_said_before_anything_is_measured(tmp_path):
    calls = []
    with pytest.raises(UserError, match="--json: no folder"):
        rows_module.kept_rows(tmp_path / "none" / "rows.json", [job(calls=calls)])
    assert not calls


def test_a_job_knows_recipe_effort_and_files(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words")
    args = Namespace(
        text=text, calibration=[text], windows=2, length=8, effort="fast", batch=1, own=0
    )
    args.steps, args.no_simulator, args.others, args.check = 7, True, [], False
    bench = Namespace(checkpoint=Namespace(sha256="0" * 64))

    def settings(recipe: Recipe):
        return protocol.recipe_job(args, bench, "a", recipe, row="r").settings

    found = settings(W8A8)
    assert found["effort"] == "fast" and found["steps"] == 7 and found["row"] == "r"
    assert found["scored"] == "fake_quant" and found["model"] == "0" * 12
    other = settings(dataclasses.replace(W8A8, smooth=0.5))
    assert {k for k in found if found[k] != other[k]} == {"settings"}
    args.own = 64
    assert {k for k in found if found[k] != settings(W8A8)[k]} == {"calibration"}
    args.own, args.others = 0, [text]  # a kept row without them would pass as if they were scored
    assert {k for k in found if found[k] != settings(W8A8)[k]} == {"others_of"}
    args.check = True
    assert settings(W8A8)["checked"] is True
    args.effort = "none"
    with pytest.raises(UserError, match=r"--steps: .* got 7 with none"):
        settings(W8A8)


def test_a_file_of_other_bits_falls_short():
    rows = [scored("float", 30.03), scored("w8a8", 30.1, verify={"elements": 9, "differing": 2})]
    assert accuracy.verdict(rows, None) == ["w8a8: 2 elements differ from LiteRT's"]


# A recipe that diverges.


def test_divergence_is_a_row_in_valid_json(tmp_path, monkeypatch, capsys):
    def diverges(*_, **__):
        raise UserError("w: learning diverged at step 3")

    monkeypatch.setattr(protocol.pipeline, "prepare", lambda *_: {})
    monkeypatch.setattr(protocol.pipeline, "quantize", diverges)
    monkeypatch.setattr(protocol, "starts_of", lambda _: None)
    checkpoint = Namespace(config=None, params={}, tokenizer=None)
    bench = SimpleNamespace(checkpoint=checkpoint, text=lambda *_: None)
    measure = lambda: protocol.measure(bench, W8A8, EFFORTS["full"], 1, True)  # noqa: E731
    path = tmp_path / "rows.json"
    rows = rows_module.kept_rows(
        path, [rows_module.Job("w8a8", SHARED, measure), job("b", math.inf)]
    )
    kept = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert kept == rows
    assert kept[0]["error"] == "w: learning diverged at step 3"
    assert [rows_module.perplexity(row) for row in kept] == [math.inf, math.inf]
    capsys.readouterr()
    rows_module.table(rows)
    assert capsys.readouterr().out.count("diverged") == 2


# Goals of accuracy.py.

KNOWN = accuracy.Known(4, 30.0, {"w8a8": (1.02, 0.05)})


def scored(name, fake, **more):
    return {"name": name, "recipe": name, "fake_quant": fake, **more}


def test_the_float_perplexity_of_known_models_is_checked():
    rows = [scored("float", 31.0)]
    assert accuracy.verdict(rows, KNOWN) == ["float 31.00, expected 30.0 +- 0.05"]
    assert not accuracy.verdict(rows, None)
    assert not accuracy.verdict([scored("float", 30.02)], KNOWN)
    assert all(len(sha256) == 64 for sha256 in accuracy.KNOWN)


def test_goals_see_divergence():
    rows = [scored("float", 30.0), scored("w8a8", None), scored("spinquant-w8a8", None)]
    expected = ["w8a8 on text: inf of float > 1.02", "w8a8: KL inf > 0.05"]
    assert accuracy.verdict(rows, KNOWN) == expected
    assert not accuracy.verdict(rows, None)
    rows = [scored("float", 30.0), scored("w8a8", 30.0, simulator=30.3, kl=0.04)]
    assert accuracy.verdict(rows, KNOWN) == ["w8a8: simulator 30.30 against fake-quant 30.00"]


def test_goals_hold_on_every_text():
    lost = scored("w8a8", 30.5, kl=None, others={"code": (5.0, None)})
    assert accuracy.verdict([scored("float", 30.0), lost], KNOWN) == [
        "w8a8 on code: inf of float > 1.02",
        "w8a8: KL inf > 0.05",
    ]
    row = scored("w8a8", 30.5, kl=0.051, others={"code": (5.0, 5.05), "sums": (5.0, 5.15)})
    assert accuracy.verdict([scored("float", 30.0), row], KNOWN) == [
        "w8a8 on sums: 1.030 of float > 1.02",
        "w8a8: KL 0.0510 > 0.05",
    ]


# The comparison of ablation.py.


@pytest.mark.parametrize("seed", [0, 3])
def test_rows_that_change_nothing_are_skipped_at_every_seed(seed):
    rows = [ablation.FULL, "no-gptq", "no-prefix"]  # w8a8 has no GPTQ
    found = dict(ablation.variants(W8A8, rows, [seed]))
    assert list(found) == [ablation.FULL, "no-prefix"]
    assert {recipe.seed for recipe in found.values()} == {seed}


def test_the_full_recipe_comes_first_whatever_is_asked():
    found = [(row, r.seed) for row, r in ablation.variants(W8A8, ["ce"], [0, 1])]
    assert found == [(ablation.FULL, 0), ("ce", 0), (ablation.FULL, 1), ("ce", 1)]


def test_rows_about_loud_channels_and_a_stage_before_gptq():
    rows = ["loud-channels", "limit-1", "copies-64", "stage-before-gptq"]
    assert list(dict(ablation.variants(W8A8, rows, [0])))[1:] == ["loud-channels", "copies-64"]
    found = dict(ablation.variants(RECIPES["w4a8"], rows, [0]))
    assert list(found)[1:] == ["loud-channels", "limit-1", "stage-before-gptq"]
    before, after = found["stage-before-gptq"].stages
    assert (before.gptq, after.gptq) == (False, True)
    assert (before.share, after.share) == (0.1, 0.9)
    assert before.rate("diagonal") and not before.rate("rounding")


def ablated(**scores):
    """Rows of `full` and others: a list of perplexities, one per seed."""
    return [
        {
            **scored("w8a8", x),
            "row": ablation.FULL if row == "full" else row,
            "seed": seed,
            "kl": x and x / 1000,
        }
        for row, values in scores.items()
        for seed, x in enumerate(values)
    ]


def test_rows_are_compared_with_the_full_recipe_of_their_seed(capsys):
    rows = ablated(full=[40.0, 50.0], ce=[42.0, 51.0], hidden=[41.0, None])
    np.testing.assert_allclose(
        np.array(ablation.changes(rows), float), [0, 0, 5, 2, 2.5, np.inf], atol=1e-9
    )
    ablation.show_summary(ablation.summary(rows))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[1] == ["w8a8", "ce", "+3.50%", "2.12%", "2", "0"]
    assert lines[2] == ["w8a8", "hidden", "+2.50%", "2", "1"]
    assert not ablation.verdict(rows)


def test_a_row_without_its_full_recipe_is_not_compared():
    assert ablation.changes([*ablated(ce=[40.0]), scored("w8a8", 40.0)]) == [None, None]


def test_the_goal_of_ablation_can_fail():
    assert not ablation.verdict(ablated(full=[40.0, 40.0], ce=[39.0, 40.4]))  # -0.75% of both
    assert ablation.verdict(ablated(full=[40.0], ce=[39.0])) == [
        "w8a8 ce beats the full recipe by 2.50%"
    ]
    assert ablation.verdict(ablated(full=[None], ce=[39.0])) == [
        "w8a8 diverged: nothing to compare with"
    ]


def test_a_row_that_leaves_the_float_model_does_not_beat_the_full_recipe():
    rows = ablated(full=[40.0], ce=[39.0])
    rows[1]["kl"] = 0.2
    assert not ablation.verdict(rows)


@pytest.mark.parametrize(
    ("script", "options", "effort", "steps"),
    [
        ("ablation", [], "full", 150),
        ("ablation", ["--effort", "none"], "none", None),
        ("ablation", ["--quick", "--steps", "5"], "none", None),
        ("accuracy", [], "full", None),
        ("accuracy", ["--quick", "--steps", "5"], "none", None),
    ],
)
def test_arguments_of_learning(monkeypatch, script, options, effort, steps):
    argv = [script, "--text", "a.txt", "--calibration", "b.txt", *options]
    monkeypatch.setattr(sys, "argv", argv)
    args = {"ablation": ablation, "accuracy": accuracy}[script].arguments()
    assert (args.effort, args.steps) == (effort, steps)


# Exit status.


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("f: missing"), "f: missing\n"),
        (KeyError("f"), "Traceback (most recent call last):\n"),
    ],
)
def test_an_error_is_no_missed_goal(capsys, error, said):
    def fails():
        raise error

    assert outcome.status(fails) == 2
    assert capsys.readouterr().err.startswith(said)
    assert [outcome.status(lambda n=n: n) for n in (0, 1)] == [0, 1]
