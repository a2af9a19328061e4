"""Output folders: written beside their place and moved in whole, so that a killed run leaves
nothing that loads.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnpu_jax.errors import UserError

MODEL = "model.tflite"
REPORT = "report.json"
RECIPE = "recipe.json"
TOKENIZER = "tokenizer"
DIAGNOSIS = "diagnosis"
ACCUMULATORS, ACCUMULATORS_FIGURE = "accumulators.json", "accumulators.svg"

FORMAT = 1
"""Version of the folder; a reader refuses any other."""

WIDTH = 100
"""Of lines in our JSON files."""


@dataclass(frozen=True)
class Kind:
    """Folders that a command makes.

    Attributes:
      files: what they may hold.
      mark: the one that they always hold.
      made: names of files that other commands put there.
    """

    command: str
    files: frozenset[str]
    mark: str
    made: re.Pattern[str] | None = None

    def holds(self, name: str) -> bool:
        """Whether a file or folder of this name may lie in one."""
        return name in self.files or bool(self.made and self.made.fullmatch(name))


MODELS = Kind(
    "qnpu quantize",
    frozenset(
        {MODEL, REPORT, RECIPE, TOKENIZER, "integer_model.json", "integer_model.safetensors"}
        | {DIAGNOSIS, ACCUMULATORS, ACCUMULATORS_FIGURE}  # `qnpu diagnose`, `qnpu proof`
    ),
    REPORT,
    re.compile(r"[\w-]+-[0-9a-f]{12}-\d+-\d+(-\w+)?\.tflite"),  # `deployment`
)


def deployment(use: str, model: str, prefill: int, context: int, signature: str = "") -> str:
    """Name of a file that is made of a folder's model and kept beside it. It tells which model, so
    that a folder written again does not meet the file of the old one.

    Args:
      use: profile or target.
      model: its hash, of which 12 digits are in the name.
      signature: the one that it holds, where it is only one.
    """
    parts = (use, model[:12], str(prefill), str(context), signature)
    return "-".join(filter(None, parts)) + ".tflite"


def check_writable(out: Path, overwrite: bool, kind: Kind = MODELS) -> None:
    """Raises UserError where `out` cannot be made: call it before the work, not after.

    Only a folder that holds files of its kind and no others is ever replaced: `--overwrite --out ~`
    harms nobody.
    """
    with system_errors(out):
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file; expected a folder; choose another --out")
        if out.is_dir() and (held := {p.name for p in out.iterdir()}):
            _check_ours(out, held, overwrite, kind)
        parent = next(p for p in out.resolve().parents if p.exists())
        if not parent.is_dir():
            raise UserError(f"{out}: {parent} is a file; expected a folder; choose another --out")
        _try_to_create(parent)


def check_can_create(folder: Path) -> None:
    """Raises UserError where nothing can be created in an existing folder."""
    with system_errors(folder):
        _try_to_create(folder)


def _try_to_create(folder: Path) -> None:
    """To try is the only sure test: root, quotas, read-only disks."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".qnpu"):
        pass


def _check_ours(out: Path, held: set[str], overwrite: bool, kind: Kind) -> None:
    if not overwrite:
        raise UserError(f"{out}: not empty; expected a new or empty folder; use --overwrite")
    foreign = {name for name in held if not kind.holds(name)}
    if kind.mark not in held or foreign:
        what = f"holds {min(foreign)}" if foreign else f"holds no {kind.mark}"
        raise UserError(
            f"{out}: {what}, so it is not ours to overwrite; expected an output folder of"
            f" `{kind.command}` and nothing else in it; choose another --out"
        )


@contextmanager
def writing(out: Path, overwrite: bool, kind: Kind = MODELS) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well and vanishes
    otherwise."""
    check_writable(out, overwrite, kind)
    out = out.resolve()
    made = [p for p in out.parents if not p.exists()]
    with system_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(out)
        partial.mkdir()
        try:
            yield partial
            _replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):  # not empty: all went well
                for folder in made:
                    folder.rmdir()


@contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and vanishes otherwise.

    Args:
      replace: an older file of that name goes at the end; without it, it is an error.
    """
    with system_errors(path):
        if path.exists() and not replace:
            raise UserError(f"{path}: exists; expected a new file; choose another name")
        if not path.absolute().parent.is_dir():
            raise UserError(
                f"{path}: its folder does not exist; expected an existing one; make it first"
            )
        partial = _partial(path)
        try:
            yield partial
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turns what the system says while `path` is written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); expected room and permission;"
            " check the disk, or choose another place"
        ) from None


def _partial(path: Path) -> Path:
    """Where to write what becomes `path`: a hidden name beside it, which tells our process.

    Removes what processes that no longer live left there.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = stale.name.split(".")[-2]
        if pid.isdecimal() and not _another_lives(int(pid)):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _another_lives(pid: int) -> bool:
    if pid == os.getpid():
        return False  # of an earlier process, as happens in containers
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _replace(partial: Path, out: Path) -> None:
    """Moves `partial` to `out`. A run killed between the two moves leaves the old folder as
    .<out>.<pid>.old, which goes when the next one succeeds."""
    if out.exists():
        out.rename(out.with_name(f".{out.name}.{os.getpid()}.old"))
    partial.rename(out)
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.old"):
        shutil.rmtree(old)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder and below, by relative path."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): digest(p) for p in files}


def write_json(path: Path, data: Any) -> None:
    """`layout` in a file."""
    path.write_text(layout(data) + "\n")


def layout(value: Any, newline: str = "\n") -> str:
    """JSON to be read by people: what fits in a line is one, and so is any list of numbers.

    Args:
      newline: what begins a line, with the indentation of the value.
    """
    line = json.dumps(value)
    numbers = isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
    short = len(newline) + len(line) <= WIDTH
    if short or numbers or not isinstance(value, dict | list | tuple):
        return line
    children = value.values() if isinstance(value, dict) else value
    inner = newline + " "
    parts = [layout(child, inner) for child in children]
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {part}" for key, part in zip(value, parts, strict=True)]
    return line[0] + inner + ("," + inner).join(parts) + newline + line[-1]


def columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows with a "tensor" each as columns by tensor: one value per layer, or one where all agree;
    with "layers" where only some have a row.

    A report with a row for every layer would be thousands of lines.
    """
    table: dict[str, dict[str, list[Any]]] = {}
    layers: dict[str, list[int]] = {}
    for row in rows:
        name = re.sub(r"^layers\.\d+\.", "layers.", row["tensor"])
        columns = table.setdefault(name, {})
        if name != row["tensor"]:
            layers.setdefault(name, []).append(int(row["tensor"].split(".")[1]))
        for key, value in row.items():
            if key != "tensor":
                short = float(f"{value:.5g}") if isinstance(value, float) else value
                columns.setdefault(key, []).append(short)
    every = sorted({layer for some in layers.values() for layer in some})
    return {
        name: {k: v[0] if len(set(v)) == 1 else v for k, v in columns.items()}
        | ({"layers": some} if (some := layers.get(name, every)) != every else {})
        for name, columns in table.items()
    }


def check_files(folder: Path, hashes: Mapping[str, Any], by: str, way_out: str) -> None:
    """Raises UserError for a file that is missing or not as it was: `digests` undone.

    Args:
      by: who expects it.
    """
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; expected {by}; {way_out}")
        if (got := digest(path)) != expected:
            raise UserError(
                f"{path}: changed or damaged: SHA-256 {got[:12]}..., expected"
                f" {str(expected)[:12]}...; {way_out}"
            )


def version(package: str) -> str | None:
    """Of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
