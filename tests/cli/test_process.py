"""The command in a process of its own: same bytes, killed, interrupted, and on a real model."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import STAGE, without_stages
from workspace import QUANTIZE, request, start, workspace, write_inputs

from qnpu_jax import cli, job, progress
from qnpu_jax.errors import UserError
from qnpu_jax.output import OutputFolder
from qnpu_jax.proof.simulated import Simulated


@contextlib.contextmanager
def running(*args: str, cwd: Path, stderr: int = subprocess.PIPE) -> Iterator:
    process = start(*args, cwd=cwd, stderr=stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def wait_for(condition: Callable[[], object], process) -> None:
    """Waits as long as pytest's own timeout allows: a busy machine is no failure."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.nightly
def test_another_process_gives_the_same_bytes(tmp_path, tmp_path_factory):
    made = workspace(tmp_path_factory.getbasetemp() / "tiny")
    with running(*QUANTIZE, "--out", str(tmp_path / "new"), cwd=made) as process:
        out, err = process.communicate()
    assert (process.returncode, without_stages(err)) == (0, "")
    assert "perplexity" in out
    stages = [found[1] for found in STAGE.finditer(err)]
    assert list(dict.fromkeys(stages)) == list(
        json.loads((tmp_path / "new" / "report.json").read_text())["seconds"]
    )
    assert err.startswith("qnpu: load\n")
    for name in ("model.tflite", "integer_model.safetensors", "integer_model.json"):
        assert (tmp_path / "new" / name).read_bytes() == (made / "out" / name).read_bytes()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator:
    """A run that has begun to write its output folder."""
    write_inputs(folder)
    with running(*QUANTIZE, cwd=folder) as process:
        wait_for(lambda: list(folder.glob(".out.*.partial/model.tflite")), process)
        yield process


@pytest.mark.slow
def test_killed_while_it_writes(tmp_path):
    with writing(tmp_path) as process:
        process.kill()
        process.wait()
    (left,) = tmp_path.glob(".out.*.partial")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"report\.json: missing"):
        job.verify_folder(OutputFolder.open(left), None, Simulated, progress.Observer())
    job.run(request(tmp_path), Simulated, progress.Observer())
    assert {p.name for p in tmp_path.iterdir()} == {"model", "out", "recipe.json", "text.txt"}
    made = OutputFolder.open(tmp_path / "out")
    assert job.verify_folder(made, None, Simulated, progress.Observer()).comparison.differing == 0


@pytest.mark.slow
def test_asked_to_end_while_it_writes(tmp_path):
    """SIGTERM, as a scheduler sends it."""
    with writing(tmp_path) as process:
        process.terminate()
        out, err = process.communicate()
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert err.splitlines()[-1] == "qnpu: interrupted, nothing is left behind"
    assert {p.name for p in tmp_path.iterdir()} == {"model", "recipe.json", "text.txt"}


@pytest.mark.slow
def test_interrupted(tmp_path):
    """Ctrl-C on a terminal, where the running stage is shown."""
    write_inputs(tmp_path)
    screen, terminal = os.openpty()
    with running(*QUANTIZE, cwd=tmp_path, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while b"calibrate" not in shown:
            shown += os.read(screen, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux's way to say that the other side has closed
            while data := os.read(screen, 4096):
                shown += data
        out, _ = process.communicate()
    os.close(screen)
    assert process.returncode == 130
    assert out == ""
    assert b"elapsed" in shown
    last = shown.decode().rstrip("\r\n").rpartition("\n")[2].split("\r")[-1]
    assert last.endswith("qnpu: interrupted, nothing is left behind")
    assert b"Traceback" not in shown
    assert {p.name for p in tmp_path.iterdir()} == {"model", "recipe.json", "text.txt"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_imports(tmp_path, number):
    """The first two seconds of a command that computes."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not show what a process has imported")
    with running(*QUANTIZE, cwd=tmp_path) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_for(lambda: "jaxlib" in maps.read_text(), process)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (128 + number, "")
    assert err == "qnpu: interrupted, nothing is left behind\n"


def test_where_an_exception_would_only_be_printed():
    """In JAX's callback of the garbage collector, and in what it calls."""

    def called() -> bool:
        return cli._ignores(sys._getframe())

    def _xla_gc_callback() -> bool:
        return called()

    assert _xla_gc_callback() and not called()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_compiles(tmp_path, number):
    """XLA, interrupted there, crashes when the interpreter ends."""
    write_inputs(tmp_path)
    args = ["text", "model", "--out", "own.jsonl", "--tokens", "4096", "--length", "128"]
    with running(*args, cwd=tmp_path) as process:
        assert process.stderr is not None
        while "write text" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(1.0)  # compiling takes two seconds
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (128 + number, "")
    assert err == "qnpu: interrupted, nothing is left behind\n"
    assert {p.name for p in tmp_path.iterdir()} == {"model", "recipe.json", "text.txt"}


def learning(folder: Path) -> list[str]:
    """A command that learns in two stages."""
    write_inputs(folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    stages = [{"learn": [["biases", 0.0003]], "share": 0.5}] * 2
    (folder / "recipe.json").write_text(json.dumps(recipe | {"stages": stages}))
    return [*QUANTIZE, "--effort", "fast"]


@pytest.mark.slow
@pytest.mark.nightly
def test_killed_while_it_learns(tmp_path):
    """Killed in the first stage, interrupted in the second: the bytes of a run that was not."""
    command = learning(tmp_path)
    with running(*command, "--out", "whole", cwd=tmp_path) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    lines = without_stages(err).splitlines()
    assert lines[0] == "qnpu: learns, and keeps checkpoints in whole.checkpoints until it is done"
    assert lines[1].startswith("qnpu: learning, stage 1: step 1 of 30, loss ")
    assert re.fullmatch(r"qnpu: learning, stage 2: step 30 of 30, .*, 0 s left", lines[-1])
    assert "│ stage 2          │ 30 of 30 steps, held-out KL " in out

    kept = tmp_path / "out.checkpoints"
    with running(*command, cwd=tmp_path) as process:
        wait_for(lambda: (kept / "stage0-10.json").exists(), process)
        process.kill()
        process.wait()
    with running(*command, cwd=tmp_path) as process:
        wait_for(lambda: (kept / "stage1-5.json").exists(), process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    said = without_stages(err)
    assert re.match(r"qnpu: goes on from stage 1, step \d+, as kept in out.checkpoints\n", said)
    last = err.splitlines()[-1]
    goes_on = re.fullmatch(
        r"qnpu: interrupted; the same command goes on from stage 2, step (\d+), kept in"
        r" out\.checkpoints",
        last,
    )
    assert goes_on, last
    with running(*command, cwd=tmp_path) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"goes on from stage 2, step {goes_on[1]}, as kept in out.checkpoints\n" in err
    assert not kept.exists()
    for name in ("model.tflite", "integer_model.safetensors", "integer_model.json", "recipe.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
