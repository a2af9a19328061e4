"""The output folder read back: whole, unchanged and of this version, or refused in one line."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_artifacts import fill, message
from workspace import workspace

from qnpu_jax.artifacts import FORMAT, MODEL, REPORT, digest, digests
from qnpu_jax.integer import storage
from qnpu_jax.models.tokenizer import Tokenizer
from qnpu_jax.output import OutputFolder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return workspace(tmp_path_factory.getbasetemp() / "tiny") / "out"


def refused(folder: Path) -> str:
    return message(OutputFolder.open, folder)


def test_everything_of_a_folder(out):
    folder = OutputFolder.open(str(out))
    assert folder.path == out
    assert folder.report == json.loads((out / REPORT).read_text())
    assert folder.tflite == out / MODEL
    assert folder.sha256 == digest(out / MODEL)
    model, text = storage.load(out), "def f(x): return 1"
    assert (folder.model.config, folder.model.prefix) == (model.config, model.prefix)
    for name, codes in model.codes.items():
        np.testing.assert_array_equal(folder.model.codes[name], codes)
    assert folder.tokenizer.encode(text) == Tokenizer.load(out / "tokenizer").encode(text)
    assert folder.model is folder.model and folder.tokenizer is folder.tokenizer  # read once
    name = f"generate-{folder.sha256[:12]}-128-512.tflite"
    assert folder.deployment("generate", 128, 512) == out / name
    assert "perplexity" not in repr(folder)  # nor anything else of the report


def test_a_folder_of_an_older_version_is_refused_by_that_version(out, tmp_path):
    """The integers had other formats before; report.json had format 1 throughout."""
    old = shutil.copytree(out, tmp_path / "old")
    meta = json.loads((old / "integer_model.json").read_text())
    (old / "integer_model.json").write_text(json.dumps(meta | {"format": 2}))
    report = json.loads((old / REPORT).read_text())
    hashes = {name: x for name, x in digests(old).items() if name != REPORT}
    (old / REPORT).write_text(json.dumps(report | {"sha256": hashes}))
    folder = OutputFolder.open(old)
    assert message(lambda: folder.model) == (
        f"{old / 'integer_model.json'}: format 2, expected {storage.FORMAT}; run `qnpu quantize`"
        " again"
    )
    (old / REPORT).write_text(json.dumps(report | {"format": FORMAT + 1}))
    assert f"format {FORMAT + 1}; expected {FORMAT}; run" in refused(old)


def test_report(tmp_path):
    assert OutputFolder.open(fill(tmp_path / "out")).report["format"] == FORMAT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read (Expecting value"),
        ("[]", f"format list; expected {FORMAT}"),
        ("{}", f"format None; expected {FORMAT}"),
        ('{"format": 99}', f"format 99; expected {FORMAT}; run `qnpu quantize` again"),
        ('{"format": 1}', f"no hash of {MODEL}"),
        ('{"format": 1, "sha256": {"other": ""}}', f"no hash of {MODEL}"),
    ],
)
def test_report_that_cannot_be_read(tmp_path, text, expected):
    out = fill(tmp_path / "out")
    (out / REPORT).write_text(text)
    said = refused(out)
    assert said.startswith(f"{out / REPORT}: ")
    assert expected in said


def test_no_report(tmp_path):
    out = fill(tmp_path / "out")
    (out / REPORT).unlink()
    assert refused(out).startswith(f"{out / REPORT}: missing; expected an output")
    assert "missing" in refused(tmp_path / "nowhere")
    assert "missing" in refused(out / MODEL)


def test_changed_and_missing_files(tmp_path):
    out = fill(tmp_path / "out", "model")
    (out / MODEL).write_text("mode")
    text = refused(out)
    assert text.startswith(f"{out / MODEL}: changed or damaged: SHA-256 ")
    assert f"expected {hashlib.sha256(b'model').hexdigest()[:12]}...;" in text
    (out / MODEL).unlink()
    assert refused(out).startswith(f"{out / MODEL}: missing; expected by {REPORT}")
