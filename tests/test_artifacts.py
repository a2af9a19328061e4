"""Output folders: whole or not at all, and never at the cost of somebody else's."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qnpu_jax import artifacts
from qnpu_jax.artifacts import (
    FORMAT,
    MODEL,
    REPORT,
    check_writable,
    deployment,
    digests,
    layout,
    new_file,
    writing,
)
from qnpu_jax.errors import UserError


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def fill(folder: Path, text: str = "x") -> Path:
    """An output folder, as far as this module can tell."""
    folder.mkdir(exist_ok=True)
    (folder / MODEL).write_text(text)
    report = {"format": FORMAT, "sha256": digests(folder)}
    (folder / REPORT).write_text(json.dumps(report))
    return folder


# Where to.


def test_a_name_with_no_room_for_its_hidden_one(tmp_path):
    check_writable(tmp_path / ("n" * 200), overwrite=False)
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / ("n" * 250), overwrite=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["new", "new/deep/er", "empty"])
def test_new_or_empty_folder(tmp_path, name):
    (tmp_path / "empty").mkdir()
    check_writable(tmp_path / name, overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]  # to check leaves nothing


def test_not_empty(tmp_path):
    out = fill(tmp_path / "out")
    assert message(check_writable, out, False) == (
        f"{out}: not empty; expected a new or empty folder; use --overwrite"
    )
    check_writable(out, overwrite=True)


def test_what_was_made_of_a_model_is_ours(tmp_path):
    fill(tmp_path)
    names = [deployment("SM8650-hexagon", "0123456789abcdef", 128, 512)]
    names += [deployment("ethos-u85-256", "0123456789abcdef", 128, 512, "prefill_128")]
    assert names[0] == "SM8650-hexagon-0123456789ab-128-512.tflite"
    assert names[1] == "ethos-u85-256-0123456789ab-128-512-prefill_128.tflite"
    for name in names:
        (tmp_path / name).touch()
    check_writable(tmp_path, overwrite=True)
    for name in ("mine.tflite", "generate-0123456789ab-128.tflite", names[0] + ".txt"):
        (tmp_path / name).touch()
        assert f"holds {name}" in message(check_writable, tmp_path, True)
        (tmp_path / name).unlink()


def test_overwrite_only_what_is_ours(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    text = message(check_writable, tmp_path, True)
    assert text.startswith(f"{tmp_path}: holds notes.txt, so it is not ours to overwrite; expected")
    fill(tmp_path)  # one of our folders, in which the user keeps something
    assert "holds notes.txt" in message(check_writable, tmp_path, True)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / REPORT).unlink()
    assert f"holds no {REPORT}" in message(check_writable, tmp_path, True)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("")
    assert message(check_writable, tmp_path / "f", True).startswith(f"{tmp_path / 'f'}: is a file;")
    text = message(check_writable, tmp_path / "f" / "out", False)
    assert text.startswith(f"{tmp_path / 'f' / 'out'}: {tmp_path / 'f'} is a file; expected a")


def test_not_writable(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    # Not chmod: root may write everywhere.
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    text = message(check_writable, tmp_path / "out", False)
    assert text.startswith(f"{tmp_path / 'out'}: cannot be written (Permission denied); expected")


def test_name_too_long(tmp_path):
    assert "File name too long" in message(check_writable, tmp_path / ("x" * 300), False)


# Whole or not at all.


def test_appears_whole(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with writing(out, overwrite=False) as folder:
        (folder / MODEL).write_text("model")
        assert not out.exists()
        assert folder.parent == out.parent
    assert [p.name for p in out.iterdir()] == [MODEL]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("name", ["out", "a/b/out"])
def test_vanishes_on_any_error(tmp_path, error, name):
    def write():
        with writing(tmp_path / name, overwrite=False) as folder:
            (folder / MODEL).write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert not list(tmp_path.iterdir())


def test_disk_full(tmp_path):
    def write():
        with writing(tmp_path / "out", overwrite=False):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert "cannot be written (No space left on device); expected room" in message(write)
    assert not list(tmp_path.iterdir())


def test_replaces(tmp_path):
    out = fill(tmp_path / "out", "old")
    with writing(out, overwrite=True) as folder:
        fill(folder, "new")
        assert (out / MODEL).read_text() == "old"  # until the end
    assert (out / MODEL).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_keeps_the_old_one_on_error(tmp_path):
    out = fill(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="x"), writing(out, overwrite=True):
        raise ValueError("x")
    assert (out / MODEL).read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_into_an_empty_folder_and_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for text in ("one", "two"):
        with writing(tmp_path / "link", overwrite=True) as folder:
            fill(folder, text)
        assert (tmp_path / "real" / MODEL).read_text() == text
        assert (tmp_path / "link").is_symlink()


def test_removes_what_killed_runs_left(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    for pid in (dead, os.getpid(), os.getppid()):
        (tmp_path / f".o[u]t.{pid}.partial").mkdir()
    (tmp_path / f".o[u]t.{dead}.old").mkdir()
    (tmp_path / f".other.{dead}.partial").mkdir()
    (tmp_path / ".o[u]t.mine.partial").mkdir()
    with writing(tmp_path / "o[u]t", overwrite=False) as folder:
        fill(folder)
    kept = {f".o[u]t.{os.getppid()}.partial", f".other.{dead}.partial", ".o[u]t.mine.partial"}
    assert {p.name for p in tmp_path.iterdir()} == {"o[u]t"} | kept


def test_new_file(tmp_path):
    path = tmp_path / "m.tflite"

    def write():
        with new_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())
    with new_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_new_file_refused(tmp_path):
    def write(path):
        with new_file(path):
            raise AssertionError("written")

    (tmp_path / "f").write_text("")
    assert message(write, tmp_path / "f").startswith(f"{tmp_path / 'f'}: exists; expected a new")
    assert "its folder does not exist" in message(write, tmp_path / "no" / "f")
    (tmp_path / "lost").symlink_to("nowhere")
    assert "exists" in message(write, tmp_path / "lost")
    assert "is a folder" in message(write, tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / ("n" * 250))  # found before the work


def test_a_file_that_comes_meanwhile_is_left(tmp_path):
    path = tmp_path / "f"

    def write(replace):
        with new_file(path, replace=replace) as partial:
            partial.write_text("mine")
            path.write_text("another's")

    assert message(write, False).startswith(f"{path}: exists")
    assert path.read_text() == "another's" and len(list(tmp_path.iterdir())) == 1
    write(True)
    assert path.read_text() == "mine"


# JSON.


def test_layout():
    data = {
        "name": "x",
        "numbers": list(range(100)),
        "scores": {"float": 1.5, "none": None},
        "files": {f"file {i}": "0" * 64 for i in range(3)},
        "lines": ["long line " * 5, "another line " * 5],
        "empty": [{}, [], ""],
    }
    text = layout(data)
    assert json.loads(text) == data
    assert text.splitlines()[:4] == [
        "{",
        ' "name": "x",',
        f' "numbers": {list(range(100))},',
        ' "scores": {"float": 1.5, "none": null},',
    ]
    assert text.splitlines()[5] == '  "file 0": "' + "0" * 64 + '",'
    assert layout([1, "a"]) == '[1, "a"]'


# Reading back.


def test_digests(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "sub" / "a").write_bytes(b"")
    assert digests(tmp_path) == {
        "b": hashlib.sha256(b"abc").hexdigest(),
        "sub/a": hashlib.sha256(b"").hexdigest(),
    }


def test_files_are_named_once():
    assert {MODEL, REPORT, artifacts.RECIPE, artifacts.TOKENIZER} < artifacts.MODELS.files


def test_numbers_that_json_does_not_have_are_written_as_null(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"kl": math.nan, "all": [(1.5, -math.inf), {"x": math.inf}], "n": 2})
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read == {"kl": None, "all": [[1.5, None], {"x": None}], "n": 2}
