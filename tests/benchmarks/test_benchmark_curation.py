"""benchmarks/curation.py: choices of windows on a tiny model, and what is refused."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from workspace import write_tiny_model

from qnpu_jax import pipeline
from qnpu_jax.calibrate import calibrate_activations, collect_statistics
from qnpu_jax.errors import UserError
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.measure.perplexity import divergence, fake_quant_logits, float_logits
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text.starts import starts_of
from qnpu_jax.text.windows import Windows

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
curation = importlib.import_module("curation")
curation_figure = importlib.import_module("curation_figure")

SIZES = ("2", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("curation")
    write_tiny_model(made / "model")
    recipe = RECIPES["w8a8"].to_json()
    recipe |= {"prefix": "none", "calibration_tokens": 128, "calibration_length": 32}
    (made / "recipe.json").write_text(json.dumps(recipe))
    (made / "judged.txt").write_text("Judged words, 1 to 9. " * 90)
    (made / "code.txt").write_text("def f(x):\n    return x + 1\n" * 90)
    rng = np.random.default_rng(0)
    words = " ".join("".join(rng.choice(list("abcdeXYZ 019"), 6)) for _ in range(600))
    (made / "given.txt").write_text(words)
    return made


def parsed(monkeypatch, folder: Path, *more: object):
    given = ["--model", folder / "model", "--recipe", folder / "recipe.json"]
    given += ["--text", folder / "judged.txt", "--others", folder / "code.txt"]
    given += ["--calibration", folder / "given.txt", "--windows", 2, "--length", 16]
    given += ["--sizes", *SIZES, "--pool", 512, "--seeds", 0, 1, *more]
    monkeypatch.setattr(sys, "argv", ["curation", *map(str, given)])
    return curation.arguments()


@pytest.mark.nightly
def test_choices_are_measured_and_kept(monkeypatch, folder, tmp_path, capsys):
    path = tmp_path / "rows.json"
    args = parsed(monkeypatch, folder, "--own", 256, "--json", path)
    assert curation.measured(args) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 4 * len(SIZES)
    for row in rows:
        assert row["worst"] == max(row["kls"].values()) > 0
        assert row["kl"] == pytest.approx(np.mean(list(row["kls"].values())))
        assert set(row["kls"]) == {"text", "code"}
    for pool in (curation.FILES, curation.OWN):
        for size in (2, 4):
            reached = {
                (r["choice"], r["seed"]): r["coverage"]
                for r in rows
                if (r["pool"], r["size"]) == (pool, size)
            }
            assert max(reached.values()) == reached["chosen", 0]
    capsys.readouterr()
    assert curation.measured(args) == 0  # all rows are kept: nothing is measured
    assert "pool" not in capsys.readouterr().out.split("\n\n")[0]
    figure = tmp_path / "curation.svg"
    pytest.importorskip("matplotlib")
    curation_figure.draw(rows, figure)
    assert "Judged texts are in" in figure.read_text()


@pytest.mark.slow
def test_a_row_is_the_model_that_its_windows_give(monkeypatch, folder):
    """The reading of `curation`, from statistics in parts, against a frozen model's."""
    args = parsed(monkeypatch, folder)
    bench = curation.load(args)
    study = curation.Study(args, bench)
    study.measure(curation.FILES, curation.CHOSEN, 0, 2)
    row = study.measure(curation.FILES, curation.CHOSEN, 0, 4)
    recipe = study.recipe
    checkpoint = bench.checkpoint
    windows = study.order(curation.FILES, curation.CHOSEN, 0).windows[:4]
    config = checkpoint.config
    params = pipeline.prepare(config, checkpoint.params, recipe)
    # Keys' centres come from the first windows, in every row.
    first = Windows.of(study.pool(curation.FILES).windows[:4])
    begun = pipeline.with_prefix(
        config, params, recipe, first, starts_of(checkpoint.tokenizer), Observer()
    )
    dec = study.model.dec
    scaled = pipeline.smoothed(dec, begun.params, recipe, first)
    stats = collect_statistics(dec, scaled, windows)
    free, _ = calibrate_activations(dec, stats, recipe.activation_init, False)
    model = freeze(dec, scaled, free | study.model.weights, begun.tokens)
    original = float_logits(begun.config, recipe.bits, begun.original)
    found = divergence(original, fake_quant_logits(model), bench.held_out, 2)
    assert row["kls"]["text"] == pytest.approx(found.kl, rel=1e-3)  # biases in float, or in int32


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sizes", 17], "--sizes: 17 windows of 32 tokens; expected at most the 16"),
        (["--quantile", 1.5], "--quantile: expected 0 to 1; got 1.5"),
        (["--figure", "a.txt"], "a.txt: expected a name that ends in .svg"),
        (["--figure", "none/a.svg"], "none/a.svg: no folder none"),
    ],
)
def test_what_is_refused_before_the_work(monkeypatch, folder, more, message):
    args = parsed(monkeypatch, folder, *more)
    with pytest.raises(UserError) as error:
        curation.check(args, curation.load(args))
    assert message in str(error.value)


def test_a_judged_text_chooses_nothing(monkeypatch, folder):
    args = parsed(monkeypatch, folder, "--calibration", folder / "given.txt", folder / "code.txt")
    with pytest.raises(UserError, match=r"code\.txt: the same text as .*, which is judged"):
        curation.check(args, curation.load(args))
