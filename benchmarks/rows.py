"""Rows of a table, kept in a JSON file as they come.

A table takes several commands, and commands get killed. A row holds what it was measured with, and
is not taken for one measured otherwise.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError

Row = dict[str, Any]
"""Name, settings and readings of one measurement, as JSON has them."""
SHARED = ("model", "text", "calibration", "windows", "length")
"""Settings that all rows of a table have in common, or their perplexities do not compare."""
COLUMNS = ("fake_quant", "simulator", "kl", "top1", "seconds", "step_seconds")


@dataclass(frozen=True)
class Job:
    """A row to measure.

    Attributes:
      name: of the row, the only one of this name in its file.
      settings: what it is measured with; a kept row with others is another row.
      measure: gives its readings.
    """

    name: str
    settings: Row
    measure: Callable[[], Row]


def kept_rows(path: Path | None, jobs: Sequence[Job]) -> list[Row]:
    """The rows of a file and of the jobs that it lacks, written after each.

    Raises:
      UserError: the file is damaged, or a row in it was measured with other settings.
    """
    if path and not path.parent.is_dir():  # not after an hour
        raise UserError(f"--json: no folder {path.parent}; make it, or name another file")
    rows = read_rows(path) if path and path.exists() else []
    _check_settings(path, rows, jobs)
    known = {row["name"] for row in rows}
    for job in jobs:
        if job.name in known:
            continue
        known.add(job.name)
        rows.append(artifacts.finite({"name": job.name, **job.settings, **job.measure()}))
        print({k: v for k, v in rows[-1].items() if k not in ("loss", "held_out_kl")}, flush=True)
        if path:
            _write(path, rows)
    return rows


def read_rows(path: Path) -> list[Row]:
    """Rows that `kept_rows` wrote; a number that JSON does not have is read as none."""
    try:
        rows = json.loads(path.read_text(), parse_constant=lambda _: None)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove it or name another") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "name" in r for r in rows):
        raise UserError(
            f"{path}: expected a list of rows with names, as --json writes; remove it or name"
            " another file"
        )
    return rows


def _check_settings(path: Path | None, rows: list[Row], jobs: Sequence[Job]) -> None:
    """Refuses rows that would silently pass for others, before anything is measured."""
    expected = [(row, {k: jobs[0].settings.get(k) for k in SHARED}) for row in rows]
    known = {row["name"]: row for row in rows}
    for job in jobs:
        expected.append(
            (known.setdefault(job.name, {"name": job.name, **job.settings}), job.settings)
        )
    for row, settings in expected:
        other = [k for k, v in settings.items() if row.get(k) != v]
        if other:
            got, wanted = ([f"{k} {x.get(k)}" for k in other] for x in (row, settings))
            raise UserError(
                f"{path or 'recipes'}: row {row['name']!r}: expected {', '.join(wanted)}; got"
                f" {', '.join(got)}; give another --json or the settings of that row, or remove it"
                " from the file to measure it again"
            )


def _write(path: Path, rows: list[Row]) -> None:
    """Writes all rows or nothing: a killed command must not cost the rows of earlier ones."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(rows, allow_nan=False) + "\n")
    os.replace(part, path)


def perplexity(row: Row, reading: str = "fake_quant") -> float:
    """Perplexity of a row, infinite where the recipe diverged."""
    return finite(row.get(reading))


def finite(score: float | None) -> float:
    """A number of a row; infinite where JSON has none."""
    return math.inf if score is None else score


def table(rows: list[Row], columns: Sequence[str] = COLUMNS) -> None:
    width = max(24, *(len(row["name"]) + 1 for row in rows))
    print(f"\n{'':{width}}" + "".join(f"{c:>13}" for c in columns))
    for row in rows:
        cells = {c: "" if row.get(c) is None else row[c] for c in columns}
        if not cells.get("fake_quant", True):
            cells["fake_quant"] = "diverged"
        texts = (x if isinstance(x, str) else f"{x:.4g}" for x in cells.values())
        print(f"{row['name']:{width}}" + "".join(f"{x:>13}" for x in texts))
