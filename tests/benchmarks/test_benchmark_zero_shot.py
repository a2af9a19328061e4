"""Zero-shot accuracy: float rows of an earlier run serve, if they are of the same."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from workspace import write_tiny_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
zero_shot = importlib.import_module("zero_shot")


@pytest.mark.slow
def test_float_is_measured_once(tmp_path, monkeypatch, capsys):
    tiny, tasks = tmp_path / "tiny", tmp_path / "tasks"
    tiny.mkdir()
    tasks.mkdir()
    model = write_tiny_model(tiny)
    row = {"context": "words of many", "continuation": " kinds"}
    (tasks / "last.jsonl").write_text((json.dumps(row) + "\n") * 2)
    first, second = tmp_path / "first.json", tmp_path / "second.json"

    def run(*more: object) -> int:
        given = ["--tasks", tasks, "--float", "--model", model, "--batch-tokens", 64, *more]
        monkeypatch.setattr(sys, "argv", ["zero_shot", *map(str, given)])
        monkeypatch.setattr(zero_shot.tasks, "LENGTHS", (16,))
        return zero_shot.main()

    assert run("--json", first) == 0
    forward = zero_shot.float_logits
    monkeypatch.setattr(zero_shot, "float_logits", lambda *_: pytest.fail("measured again"))
    assert run("--json", second, "--float-rows", first) == 0
    once, again = (json.loads(path.read_text()) for path in (first, second))
    assert once["rows"] == again["rows"] and once["means"] == again["means"]
    capsys.readouterr()
    assert run("--float-rows", first, "--limit", 1) == 2
    assert "leave --float-rows out" in capsys.readouterr().err
    (tmp_path / "no.json").write_text("{}")
    assert run("--float-rows", tmp_path / "no.json") == 2
    assert "no report of this benchmark" in capsys.readouterr().err
    monkeypatch.setattr(zero_shot, "float_logits", forward)
    (tasks / "last.jsonl").write_text((json.dumps(row) + "\n") * 3)
    assert run("--float-rows", first) == 2, "other items"
