"""Fixtures, loaded by conftest.py: the command in this process, in a working folder of its own."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib import metadata

import pytest
from workspace import workspace

from qnpu_jax.cli import main

Command = Callable[..., tuple[int, str, str]]


STAGES = (
    *(
        "load",
        "fold, rotate",
        "calibration text",
        "fold",
        "write text",
        "centre keys",
        "prefix",
        "calibrate",
        "learn",
        "freeze",
    ),
    *(
        "write",
        "verify",
        "accumulators",
        "score float",
        "score with prefix",
        "score fake-quant",
        "score simulator",
    ),
    *("score LiteRT", "compile", r"layer \d+", "perplexity", "measure", "compare", "original"),
    *("replace", "prove", "observe", "round", "charge", "plan"),
)
PASSED = r"; \d+ s so far|: \d+ of \d+, (\d+ s left|\.\.\.)"
STAGE = re.compile(rf"qnpu: ({'|'.join(STAGES)})({PASSED})?\n")
"""Lines on stderr, where it is no terminal: when a stage begins, and now and then how far it is."""


def without_stages(err: str) -> str:
    """All that a command says on stderr but for its stages."""
    return "".join(line for line in err.splitlines(keepends=True) if not STAGE.fullmatch(line))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return workspace(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A working folder with a copy of all that a run takes and gives."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_packages(monkeypatch):
    """As if no distribution was installed."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.fixture
def qnpu(monkeypatch, capfd) -> Command:
    """The command in this process: status, stdout, stderr without the lines about its stages."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qnpu", *args])
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(os, "_exit", sys.exit)  # what ends an interrupted process
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, without_stages(err)

    return call


@pytest.fixture
def refused(qnpu, here) -> Callable[..., str]:
    """The one line that a mistake gives; nothing else is printed, and no file appears."""

    def call(*args: str) -> str:
        before = sorted(here.rglob("*"))
        status, out, err = qnpu(*args)
        assert (status, out) == (2, "")
        assert err.startswith("qnpu: ") and err.count("\n") == 1
        assert sorted(here.rglob("*")) == before
        return err.removeprefix("qnpu: ").rstrip("\n")

    return call
