"""Output folders and files, written whole or not at all.

A folder is written under a hidden name beside its place and renamed when it is complete, so a run
that is killed leaves nothing that loads. `qnpu_jax.output` reads the folders back.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import math
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
TOKENIZER, DIAGNOSIS = "tokenizer", "diagnosis"
ACCUMULATORS, ACCUMULATORS_FIGURE = "accumulators.json", "accumulators.svg"

FORMAT = 1
"""Version of report.json and of the names in the folder; a reader refuses any other."""

WIDTH = 100
"""Characters of a line in our JSON files."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder: what a command writes, and may therefore overwrite.

    Attributes:
      command: the command, for messages.
      files: names that such a folder may hold.
      mark: name that it always holds.
      made: pattern of further names, of files that other commands add.
    """

    command: str
    files: frozenset[str]
    mark: str
    made: re.Pattern[str] | None = None

    def holds(self, name: str) -> bool:
        """Tells whether a folder of this kind may hold a file or folder of this name."""
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


def parse_json(text: str | bytes) -> Any:
    """Reads JSON: `json.loads`, with a ValueError for too deep a nesting too.

    >>> parse_json('{"a": [1]}')
    {'a': [1]}

    Raises:
      ValueError: not valid JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def deployment(use: str, model: str, prefill: int, context: int, signature: str = "") -> str:
    """Names a file that is made of a folder's model and kept in the folder.

    The name tells which model, so that a folder written again does not take the file of its earlier
    model for its own.

    >>> deployment("generate", "0123456789abcdef", 128, 512)
    'generate-0123456789ab-128-512.tflite'

    Args:
      use: export profile, or the chip that it was compiled for.
      model: SHA-256 of the model, hexadecimal; 12 digits go into the name.
      prefill: tokens of the prefill signature.
      context: positions of the KV cache.
      signature: the signature in the file, where it holds only one.
    """
    parts = (use, model[:12], str(prefill), str(context), signature)
    return "-".join(filter(None, parts)) + ".tflite"


def check_writable(out: Path, overwrite: bool, kind: Kind = MODELS) -> None:
    """Checks that a folder can be written; call it before the work, not after.

    Only a folder that holds files of its kind and no others is ever replaced, so `--overwrite
    --out ~` harms nobody.

    Raises:
      UserError: the folder is not empty, holds something else, or cannot be created.
    """
    with system_errors(out):
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is a file; expected a folder; choose another --out")
        if out.is_dir() and (held := {p.name for p in out.iterdir()}):
            _check_ours(out, held, overwrite, kind)
        parent = next(p for p in out.resolve().parents if p.exists())
        if not parent.is_dir():
            raise UserError(f"{out}: {parent} is a file; expected a folder; choose another --out")
        _try_to_create(parent, _partial(out.resolve()).name)


def check_can_create(folder: Path) -> None:
    """Checks that files can be created in an existing folder.

    Raises:
      UserError: they cannot.
    """
    with system_errors(folder):
        _try_to_create(folder)


def _try_to_create(folder: Path, name: str = "") -> None:
    """Tries to create something: the only sure test, given root, quotas and read-only disks.

    Args:
      name: of what will be created, which the system may find too long.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".qnpu") as made:
        if name:
            (Path(made) / name).mkdir()


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
    """Gives a folder to write into; it becomes `out` when the block ends well, else vanishes.

    Raises:
      UserError: as `check_writable`; the disk is full.
    """
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
    """Gives a path to write to; the file becomes `path` when the block ends well, else vanishes.

    Args:
      replace: replace an older file of that name, at the end; without it, one is an error, and one
        that has come meanwhile is left as it is.

    Raises:
      UserError: before the block, the file exists, its folder does not, or it cannot be written.
    """
    with system_errors(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; expected a file; choose another name")
        if not replace:
            _refuse_existing(path)
        if not path.absolute().parent.is_dir():
            way_out = "expected an existing one; make it first"
            raise UserError(f"{path}: its folder does not exist; {way_out}")
        partial = _partial(path)
        partial.touch()
        partial.unlink()
        try:
            yield partial
            if replace:
                partial.rename(path)
            else:
                _link(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path}: exists; expected a new file; choose another name")


def _link(partial: Path, path: Path) -> None:
    """Gives a file its name, in one step, where nothing has that name."""
    try:
        os.link(partial, path)
    except OSError:  # something has, or the disk has no hard links
        _refuse_existing(path)
        partial.rename(path)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turns an error of the system while `path` is written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); expected room and permission;"
            " check the disk, or choose another place"
        ) from None


def _partial(path: Path) -> Path:
    """Gives the hidden name beside `path` under which this process writes it.

    Removes what processes that no longer live left there.
    """
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = stale.name.split(".")[-2]
        if pid.isdecimal() and not _another_lives(int(pid)):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _another_lives(pid: int) -> bool:
    if pid == os.getpid():
        return False  # numbers of processes come again in containers: an earlier run's
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _replace(partial: Path, out: Path) -> None:
    """Moves `partial` to `out`.

    A run killed between the two moves leaves the old folder as .<out>.<pid>.old, which the next
    run that succeeds removes.
    """
    if out.exists():
        out.rename(out.with_name(f".{out.name}.{os.getpid()}.old"))
    partial.rename(out)
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.old"):
        shutil.rmtree(old)


def digest(path: Path) -> str:
    """Hashes a file: SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Hashes every file in a folder and below: SHA-256 by relative path."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): digest(p) for p in files}


def write_json(path: Path, data: Any) -> None:
    """Writes a value as JSON, laid out by `layout`; numbers that JSON does not have as null."""
    path.write_text(layout(finite(data)) + "\n")


def finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by None.

    >>> finite({"kl": [0.5, float("nan")]})
    {'kl': [0.5, None]}
    """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layout(value: Any, newline: str = "\n") -> str:
    """Lays out a value as JSON for people: on one line where it fits, or is a list of numbers.

    >>> print(layout({"name": "w8a8", "bits": [8] * 25, "texts": ["a" * 50, "b" * 50]}))
    {
     "name": "w8a8",
     "bits": [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8],
     "texts": [
      "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
      "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
     ]
    }

    Args:
      newline: what begins a line: the newline and the indentation of the value.
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
    """Turns rows, one per tensor and layer, into columns by tensor.

    A column has a value for each layer, or a single value where all layers agree. Where only some
    layers have a row, "layers" lists them. A report with a row for every layer would have thousands
    of lines.

    >>> rows = [{"tensor": f"layers.{i}.mlp.up", "bits": 8, "scale": 0.5 + i} for i in range(2)]
    >>> columns(rows)
    {'layers.mlp.up': {'bits': 8, 'scale': [0.5, 1.5]}}

    Args:
      rows: dicts with a "tensor", its name.

    Returns:
      Columns by the tensor's name without its layer; floats have five digits.
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
    """Compares files with their hashes.

    Args:
      hashes: SHA-256 by path below `folder`, as `digests` gives them.
      by: who expects the files, for messages.
      way_out: end of the messages.

    Raises:
      UserError: a file is missing, or is not as it was.
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
    """Gives the version of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
