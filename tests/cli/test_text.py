"""`qnpu text`: a file of the model's own text, which `qnpu quantize` takes."""

import json

import pytest
from workspace import QUANTIZE

from qnpu_jax.text.prompts import FREE

TEXT = ["text", "model", "--out", "own.jsonl", "--tokens", "2048", "--length", "64"]


@pytest.mark.slow
def test_a_text_is_written_shown_and_calibrated_on(qnpu, here):
    status, out, err = qnpu(*TEXT)
    assert status == 0, err
    assert "wrote own.jsonl" in out and FREE in out and "distinct" in out
    lines = [json.loads(line) for line in (here / "own.jsonl").read_text().splitlines()]
    assert len(lines) > 10 and all(line["text"].strip() for line in lines)
    assert len({line["domain"] for line in lines}) > 4  # no chats: the model has no template
    first = (here / "own.jsonl").read_bytes()
    assert qnpu(*TEXT, "--overwrite")[0] == 0
    assert (here / "own.jsonl").read_bytes() == first
    args = [*QUANTIZE, "--out", "new", "--calibration", "own.jsonl"]
    status, out, err = qnpu(*args)
    assert status == 0, err
    report = json.loads((here / "new/report.json").read_text())
    assert report["calibration"]["source"] == "own.jsonl"


@pytest.mark.slow
def test_what_coverage_chooses_is_shown_and_marked(qnpu, here):
    status, out, err = qnpu(*TEXT)
    plain = (here / "own.jsonl").read_text().splitlines()
    status, out, err = qnpu(*TEXT, "--overwrite", "--choose", "5")
    assert status == 0, err
    for shown in ("coverage of activation peaks", "chosen windows", "serves most"):
        assert shown in out
    assert "layers.1." in out or "layers.0." in out
    lines = [json.loads(line) for line in (here / "own.jsonl").read_text().splitlines()]
    marks = [line.pop("chosen", None) for line in lines]
    assert lines == [json.loads(line) for line in plain]  # the same text, but for the marks
    assert set(marks) > {None, 1, 2, 3} and set(marks) <= {None, 1, 2, 3, 4, 5}
    status, out, err = qnpu(*QUANTIZE, "--out", "new", "--calibration", "own.jsonl")
    assert status == 0, err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "--choose 33",
            "choose: 33 windows of 64 tokens; expected at most the 32 that",
        ),
        ("--choose 32", "choose: 32 windows of 64 tokens; expected at most the"),
        ("--choose -1", "Invalid value for '--choose'"),
        ("--out own.txt", "own.txt: expected a name that ends in one of .jsonl, .ndjson, .json"),
        ("--out there.jsonl", "there.jsonl: exists; expected a new file"),
        ("--out no/own.jsonl", "no/own.jsonl: its folder does not exist"),
        ("--length 1024", "length: 1024 tokens; expected at most the model's 512 positions"),
        ("--length 4", "Invalid value for '--length'"),
        ("--tokens 0", "Invalid value for '--tokens'"),
        ("--tokens 99999999999999999999999", "Invalid value for '--tokens'"),
        ("--out folder.jsonl --overwrite", "folder.jsonl: is a folder; expected a file"),
        ("--out lost.jsonl", "lost.jsonl: exists; expected a new file"),
        (f"--out {'n' * 246}.jsonl", "cannot be written (File name too long)"),
    ],
)
def test_what_is_refused(refused, here, args, message):
    (here / "there.jsonl").write_text("mine")
    (here / "folder.jsonl").mkdir()
    (here / "lost.jsonl").symlink_to("nowhere")
    assert message in refused(*TEXT, *args.split())
    assert (here / "there.jsonl").read_text() == "mine"


def test_chats_need_a_template(refused, here):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    (here / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    args = [*QUANTIZE, "--out", "new", "--calibration", "chats.jsonl"]
    assert "chats.jsonl: holds chats, and model has no chat template" in refused(*args)
