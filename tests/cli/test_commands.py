"""The command as a user meets it: what is printed, and what is refused and how."""

import dataclasses
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from workspace import PREFILL, QUANTIZE

from qnpu_jax import artifacts, job
from qnpu_jax.cli import report_table
from qnpu_jax.cli.display import Display
from qnpu_jax.integer import storage
from qnpu_jax.models import Tokenizer
from qnpu_jax.models.chat import SYSTEM
from qnpu_jax.output import OutputFolder
from qnpu_jax.proof.comparison import Comparison, Difference
from qnpu_jax.proof.prefill import PrefillProof
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.recipes import RECIPES, load_recipe
from qnpu_jax.tflite.interpreter import LiteRT
from qnpu_jax.transform import rotations_of

# What a user reads.


def test_help(qnpu):
    status, out, _ = qnpu("--help")
    assert status == 0
    for command in ("quantize", "verify", "export", "diagnose", "graph", "recipe"):
        assert f"│ {command}" in out
        status, text, _ = qnpu(command, "--help")
        assert status == 0
        assert f"Usage: qnpu {command}" in text
        assert max(map(len, (out + text).splitlines())) <= 80
    assert "Exit status" in out
    assert qnpu()[0] == 2


@pytest.mark.slow
def test_quantize_prints_one_table(qnpu, here):
    status, out, err = qnpu(*QUANTIZE, "--out", "new")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    table = {row[1]: row[2] for row in rows}
    report = json.loads((here / "new" / "report.json").read_text())
    for name, score in report["perplexity"].items():
        assert table[name] == f"{score:.2f}"
    assert table["elements"] == f"0 of {report['verify']['elements']:,}"
    assert table["on"] == "32 tokens of pydoc_data.topics"
    assert table["model.tflite"] == "0.1 MB"
    assert {"load", "calibrate", "verify", "score LiteRT", "total"} < table.keys()
    assert out.endswith("wrote new\n")


@pytest.mark.slow
@pytest.mark.nightly
def test_overwrite_replaces(qnpu, here):
    before = (here / "out" / "model.tflite").read_bytes()
    status, _, err = qnpu(*QUANTIZE, "--overwrite", "--prefill", "8")
    assert (status, err) == (0, "")
    assert (here / "out" / "model.tflite").read_bytes() != before
    assert LiteRT(here / "out" / "model.tflite").tokens == 8
    assert not list(here.glob(".*"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_printed_as_it_is_read(qnpu, tmp_path, name):
    status, out, _ = qnpu("recipe", name)
    assert status == 0
    (tmp_path / "own.json").write_text(out)
    assert load_recipe(str(tmp_path / "own.json")) == RECIPES[name]


def report_of(made: Path, **changes) -> dict:
    return json.loads((made / "out" / "report.json").read_text()) | changes


def test_what_learning_did_is_in_the_table(made, capfd):
    stage = {"steps": 60, "taken": 40, "held_out_kl": [0.25, 0.125, 0.13]}
    learned = [{"stage": i, **stage} for i in (1, 3)]
    report_table.show(report_of(made, effort="fast", learned=learned))
    shown = capfd.readouterr().out
    assert "│ learning     │ effort " in shown and "stage 3" in shown
    assert "40 of 60 steps, held-out KL 0.25 -> 0.125" in shown


def test_the_table_says_which_rotation_is_not_merged_and_why(made, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "120")
    gains_between = dataclasses.replace(OutputFolder.open(made / "out").model.config, norms="after")
    report_table.show(report_of(made, rotations=rotations_of(gains_between)))
    shown = capfd.readouterr().out
    assert "R1" in shown and "not merged: a norm's gain stands between each block" in shown
    added = {"original": 1536, "added": 64}
    report_table.show(report_of(made, rotations={}, norms="twice", mlp_channels=added))
    assert "taken twice" in (now := capfd.readouterr().out) and "rotations" not in now
    assert "64 to 1,536, copies of the loudest" in now and "MLP" not in shown


def test_a_prefix_that_does_not_help_is_a_warning(made, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    prefix = {"tokens": [], "before": [70.4, 3.0], "after": [70.4, 3.0], "ok": False}
    report_table.show(report_of(made, prefix=prefix))
    shown = capfd.readouterr().out
    assert "none helps" in shown
    text = " ".join(re.sub("[│\n]", " ", shown).split())
    assert "no prefix tames the outliers: 70 times the median token; ranges by min-max" in text
    assert max(map(len, shown.splitlines())) <= 80


def test_learning_in_lines(monkeypatch, capfd):
    """Where stderr is no terminal: the first step, the last one, and every half minute."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Display() as display, display.stage("learn"):
        for step in range(41, 61):  # resumed after step 40
            display.learned(1, step, 60, 1 / step, 0.125)
            now[0] += 10
    assert capfd.readouterr().err.splitlines() == [
        "qnpu: learn",
        "qnpu: learning, stage 2: step 41 of 60, loss 0.02439, held-out KL 0.125, ...",
        *(
            f"qnpu: learning, stage 2: step {n} of 60, loss {1 / n:.4g}, held-out KL 0.125,"
            f" {10 * (60 - n)} s left"
            for n in (44, 47, 50, 53, 56, 59, 60)
        ),
    ]


def test_stages_in_lines(monkeypatch, capfd):
    """Where stderr is no terminal: each stage when it begins, and its steps every half minute."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Display() as display:
        with display.stage("load"):
            now[0] += 12
        with display.stage("calibrate"):
            for _ in display.track(range(8), 8, "calibrate"):
                now[0] += 10
    assert capfd.readouterr().err.splitlines() == [
        "qnpu: load",
        "qnpu: calibrate; 12 s so far",
        "qnpu: calibrate: 3 of 8, 50 s left",
        "qnpu: calibrate: 6 of 8, 20 s left",
    ]


def test_a_terminal_has_no_lines(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    with Display() as display, display.stage("load"):
        pass
    assert "qnpu: load" not in capfd.readouterr().err


def test_tracking_starts_no_thread(monkeypatch):
    """rich's own `track` does; Ctrl-C while it is joined left it to fail after the last line."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    with Display() as display, display.stage("calibrate"):
        before = threading.enumerate()
        for _ in display.track(range(2), 2, "calibrate"):
            assert threading.enumerate() == before


def test_recipe_and_graph(qnpu, here):
    status, out, _ = qnpu("recipe", "w4a8")
    assert status == 0 and json.loads(out)["name"] == "w4a8"
    (here / "own.json").write_text(out)
    status, out, _ = qnpu("graph", "model", "--recipe", "own.json", "--prefill", "4")
    assert status == 0 and "input, layers.*.attn.q.weight:i4[32,32]" in out
    assert "up.weight:i4[128,32]" in out, "64 channels, and 64 that the recipe adds"


# verify.


def test_verify(qnpu, here):
    status, out, err = qnpu("verify", "out", "--eval-text", "text.txt")
    assert (status, err) == (0, "")
    elements = json.loads((here / "out" / "report.json").read_text())["verify"]["elements"]
    assert out.startswith(f"0 of {elements:,} elements differ, in 0 of ")


def rehash(out: Path) -> None:
    """As if the files had been written as they are now."""
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").unlink()
    report["sha256"] = artifacts.digests(out)
    (out / "report.json").write_text(json.dumps(report))


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "name"), [("opt", "optimized kernels"), ("xnn", "XNNPACK")])
def test_verify_against_what_runs(qnpu, here, kernels, name):
    status, out, err = qnpu("verify", "out", "--kernels", kernels)
    assert status == 0, err
    assert out.startswith("0 of ") and f"simulator against LiteRT's {name})" in out


def test_verify_finds_one_changed_weight(qnpu, here):
    file = here / "out" / "model.tflite"
    model = storage.load(here / "out")
    weight = model.codes["layers.mlp.up.weight"][1].tobytes()
    data = bytearray(file.read_bytes())
    assert data.count(weight) == 1
    data[data.index(weight) + 5 * 32] ^= 0x40  # of row 5, so of output channel 5
    file.write_bytes(data)
    rehash(here / "out")
    status, out, err = qnpu("verify", "out")
    assert status == 1
    lines = err.splitlines()
    first, rest = lines[0], lines[1:]
    found = re.fullmatch(
        rf"layers\.1\.mlp\.up \(FullyConnected\): (\d+) of {PREFILL * 64} differ, by at most (\d+);"
        r" first at \[(\d+), 5\]: LiteRT (-?\d+), simulator (-?\d+)",
        first,
    )
    assert found, first
    count, largest, token, *codes = map(int, found.groups())
    assert 0 < count <= PREFILL
    assert 0 < abs(codes[0] - codes[1]) <= largest
    assert token < PREFILL
    # What follows from it differs too, and nothing before it.
    assert "layers.1.mlp.act (Mul)" in err
    assert not [line for line in rest if "layers.0" in line or "layers.1.attn" in line]
    assert f"elements differ, in {len(lines)} of " in out


def test_verify_names_the_first_differences(qnpu, here, monkeypatch):
    names = "abcdefghijklmnopqrstuvwxy"
    differences = tuple(Difference(x, "Mul", 2, 10, 1, (0,), 3, 4) for x in names)
    lines = [*map(str, differences)]
    proof = PrefillProof(Comparison(30, 300, differences), ())
    monkeypatch.setattr(job, "verify_folder", lambda *_: proof)
    status, out, err = qnpu("verify", "out")
    assert status == 1
    assert err.splitlines() == [*lines[:20], "... and 5 more"]
    assert out.startswith("50 of 300 elements differ, in 25 of 30 tensors")


def test_verify_finds_another_model(qnpu, refused, here):
    shutil.copy(here / "out" / "model.tflite", here / "kept")
    (here / "out" / "model.tflite").unlink()
    assert qnpu("export", "out", "out/model.tflite", "--prefill", "8")[0] == 2  # now incomplete
    shutil.move(here / "kept", here / "out" / "model.tflite")
    changed = here / "out" / "integer_model.json"
    changed.write_text(changed.read_text().replace('"format": 4', '"format": 1'))
    rehash(here / "out")
    expected = "integer_model.json: format 1, expected 4; run `qnpu quantize` again"
    assert expected in refused("verify", "out")


@pytest.mark.parametrize(
    "name", ["model.tflite", "integer_model.safetensors", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("command", ["verify out", "export out new.tflite"])
def test_damage_is_seen_by_hash(refused, here, name, command):
    file = here / "out" / name
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(*command.split())
    assert said.startswith(f"out/{name}: changed or damaged: SHA-256 ")


def test_not_an_output_folder(refused):
    expected = "model/report.json: missing; expected an output folder of `qnpu quantize`; run it"
    assert refused("verify", "model").startswith(expected)
    assert refused("export", "model", "new.tflite").startswith(expected)
    assert refused("verify", "nowhere").startswith("nowhere/report.json: missing")


def test_text_too_short_to_verify(refused, here):
    (here / "short.txt").write_text("short")
    assert "short.txt: 4 tokens are too few; expected at least 16 (one window)" in refused(
        "verify", "out", "--eval-text", "short.txt"
    )


# export.


@pytest.mark.slow
def test_export(qnpu, here):
    status, out, err = qnpu("export", "out", "m.tflite", "--prefill", "24", "--logits", "last")
    assert (status, out, err) == (0, "wrote m.tflite, 0.1 MB\n", "")
    runner = LiteRT(here / "m.tflite")
    ids = np.arange(24, dtype=np.int32)
    expected = Simulated(storage.load(here / "out"), 24, "last").logits(ids)
    np.testing.assert_array_equal(runner.run(ids), expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("text.txt", "text.txt: exists; expected a new file; choose another name"),
        ("no/m.tflite", "no/m.tflite: its folder does not exist; expected an existing one; make"),
        ("m.litertlm", "m.litertlm: a plain .tflite would get this name; expected one that"),
        ("m.tflite --prefill 1", "prefill: 1 is too short; expected at least 2"),
        ("m.tflite --prefill 513", "513 positions; expected at most the model's 512"),
        (
            "m.tflite --logits first",
            "'first' is not one of 'all', 'last'; see `qnpu export --help`",
        ),
    ],
)
def test_export_refused(refused, args, message):
    assert message in refused("export", "out", *args.split())


# generate.

GENERATE = ["generate", "out", "--raw", "--prompt", "def", "--max-tokens", "6"]
GENERATE += ["--prefill", "4", "--context", "32"]


@pytest.mark.slow
def test_generate_is_the_same_text_on_the_simulator(qnpu, here):
    status, text, err = qnpu(*GENERATE, "--kernels", "ref")
    assert status == 0 and text.strip()
    assert re.search(r"prompt: \d+ tokens, [\d.]+ tokens/s; then \d tokens, [\d.]+ tokens/s", err)
    (file,) = (here / "out").glob("generate-*-4-32.tflite")
    before = file.stat().st_mtime_ns
    assert qnpu(*GENERATE, "--backend", "sim")[:2] == (0, text)
    assert file.stat().st_mtime_ns == before  # written once
    assert qnpu("verify", "out")[0] == 0  # the folder is still what its report says
    artifacts.check_writable(here / "out", overwrite=True)  # and ours to replace


@pytest.mark.nightly
def test_unpacked_weights_say_the_same(qnpu, here):
    recipe = RECIPES["w4a8"].to_json() | {"calibration_tokens": 128, "calibration_length": 32}
    (here / "recipe.json").write_text(json.dumps(recipe))
    assert qnpu(*QUANTIZE, "--overwrite")[0] == 0
    files, texts = [], []
    for profile in ("plain", "unpacked"):
        arguments = f"export out {profile}.tflite --context 32 --prefill 4 --profile {profile}"
        assert qnpu(*arguments.split())[0] == 0
        files.append((here / f"{profile}.tflite").stat().st_size)
        texts.append(qnpu(*GENERATE, "--profile", profile)[1])
    assert files[0] < files[1]
    assert texts[0] == texts[1] and texts[0].strip()
    artifacts.check_writable(here / "out", overwrite=True)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def prompt_tokens(err: str) -> int:
    return int(re.search(r"prompt: (\d+) tokens", err).group(1))  # type: ignore[union-attr]


def test_generate_begins_with_bos_where_there_is_no_prefix(qnpu, here):
    """And with a system message, the template's or the user's."""
    folder = OutputFolder.open(here / "out")
    replaced = dataclasses.replace(folder.tokenizer, chat_template=CHAT_TEMPLATE, adds_bos=True)
    replaced.save(here / "out" / "tokenizer")
    report = json.loads((here / "out" / "report.json").read_text())
    (here / "out" / "report.json").unlink()
    report["sha256"] = artifacts.digests(here / "out")
    options = ["--max-tokens", "1", "--prefill", "4", "--context", "64"]
    counts = {}
    for prefix in (None, {"tokens": [0]}):
        (here / "out" / "report.json").write_text(json.dumps(report | {"prefix": prefix}))
        for extra in ((), ("--raw",), ("--system", "abc"), ("--system", "")):
            status, _, err = qnpu("generate", "out", "--prompt", "def", *extra, *options)
            assert status == 0, err
            counts[bool(prefix), extra] = prompt_tokens(err)
    encode = Tokenizer.load(here / "out" / "tokenizer").encode
    texts = {(): SYSTEM + "def", ("--raw",): "def", ("--system", "abc"): "abcdef"}
    for extra, text in (texts | {("--system", ""): "def"}).items():
        assert counts[True, extra] == len(encode(text))
        assert counts[False, extra] == len(encode(text)) + 1


def test_generate_draws_by_its_seed(qnpu, here):
    drawn = [qnpu(*GENERATE, "--temperature", "2", "--seed", seed)[:2] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {status for status, _ in drawn} == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prompt a", "tokenizer: no chat template; expected chat_template.jinja, or"),
        ("--raw --prompt caf\udce9", "argument 'caf\\udce9': not UTF-8; expected text; correct it"),
        ("--raw --prompt a --system b", "--system b: not for --raw, which is no chat; expected no"),
        ("--raw --context 4 --prompt " + "ab" * 40, "prompt: "),
        ("--raw --prompt a --context 16", "context: 16 positions for 128 new tokens; expected mo"),
        ("--raw --prompt a --temperature -1", "sampling: temperature -1.0, top-k 0, top-p 1.0;"),
        ("--raw --prompt a --context 600", "length: prefix"),
    ],
)
def test_generate_refuses(refused, options, message):
    assert message in refused("generate", "out", *options.split())
