"""Output folders: written beside their place and moved in whole, so that a killed run leaves
nothing that loads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qnpu_jax.config import UserError

MODEL = "model.tflite"
REPORT = "report.json"
RECIPE = "recipe.json"
TOKENIZER = "tokenizer"


def check_writable(out: Path, overwrite: bool) -> None:
    """Raises UserError where `out` cannot be made: call it before the work, not after.

    Only a folder of ours is ever replaced, so that `--overwrite --out ~` harms nobody.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out}: not empty; expected a new or empty folder; use --overwrite")
        if not (out / REPORT).is_file():
            raise UserError(
                f"{out}: holds no {REPORT}, so it is not ours to overwrite; choose another --out"
            )
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise UserError(f"{out}: {parent} is not writable; choose another --out")


def _existing_parent(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def writing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends well and vanishes
    otherwise."""
    check_writable(out, overwrite)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.*.partial"):
        if not _alive(stale.name.split(".")[-2]):
            shutil.rmtree(stale, ignore_errors=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well and vanishes otherwise."""
    if not path.absolute().parent.is_dir():
        raise UserError(
            f"{path}: its folder does not exist; expected an existing one; make it first"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _replace(partial: Path, out: Path) -> None:
    if out.exists():
        old = out.parent / f".{out.name}.{os.getpid()}.old.partial"
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def read_report(out: Path) -> dict[str, Any]:
    """The report of an output folder, after checking that model.tflite is the file it speaks of.

    Raises:
      UserError: no such folder, a damaged report, or a model that was changed or cut short since.
    """
    path = out / REPORT
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; expected an output folder of `qnpu quantize`; run it first"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `qnpu quantize` again") from None
    if not isinstance(report, dict) or not isinstance(report.get("sha256"), dict):
        raise UserError(f"{path}: holds no hashes of the output; run `qnpu quantize` again")
    for name, expected in report["sha256"].items():
        file = out / name
        if not file.is_file():
            raise UserError(f"{file}: missing; run `qnpu quantize` again")
        if (got := digest(file)) != expected:
            raise UserError(
                f"{file}: changed or damaged: SHA-256 {got[:12]}, expected {expected[:12]};"
                " run `qnpu quantize` again"
            )
    return report
