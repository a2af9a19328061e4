"""Draws KL against the number of calibration windows from the rows of curation.py.

`python benchmarks/curation_figure.py curation.json benchmarks/figures/curation.svg`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import Row, read_rows

from qnpu_jax.errors import UserError

LOOKS = {"chosen": ("#0072B2", "o"), "first": ("#555555", "s"), "random": ("#D55E00", "^")}
"""Colour, which the colour-blind tell apart (Okabe and Ito), and marker, by choice."""
OTHERS = (("#009E73", "D"), ("#CC79A7", "v"), ("#56B4E9", "P"))
"""Of choices at other quantiles than the pool's maximum."""
PANELS = {"kl": "mean of the texts", "worst": "worst text"}


def check(path: Path) -> None:
    """Refuses a figure that could not be written, before anything is measured."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"{path}: expected a name that ends in .svg, .png or .pdf; name another")
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent}; make it, or name another file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "--figure: needs matplotlib, which is not installed; pip install 'qnpu[figures]', or"
            " leave it out"
        ) from None


def label(row: Row) -> str:
    """The choice, and its quantile where that is not the pool's maximum."""
    quantile = row.get("quantile", 1.0)
    return row["choice"] if quantile == 1 else f"{row['choice']}, quantile {quantile}"


def curve(rows: Sequence[Row], pool: str, name: str, reading: str) -> list[tuple[int, list[float]]]:
    """Readings of a choice by size: one, or one a seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["pool"], label(row)) == (pool, name) and row.get(reading) is not None:
            found.setdefault(row["size"], []).append(row[reading])
    return sorted(found.items())


def draw(rows: Sequence[Row], path: Path) -> None:
    """A row of panels for each pool; random choices as mean and range over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "qnpu"  # equal bytes for equal numbers
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    others = dict.fromkeys(label(row) for row in rows if label(row) not in LOOKS)
    looks = LOOKS | dict(zip(others, OTHERS, strict=False))
    height = 3.0 * len(pools) + 0.9
    figure, axes = plt.subplots(
        len(pools), 2, figsize=(8.4, height), squeeze=False, sharex=True, layout="constrained"
    )
    for line, pool in zip(axes, pools, strict=True):
        for axis, (reading, title) in zip(line, PANELS.items(), strict=True):
            for name, look in looks.items():
                _draw_curve(axis, name, look, curve(rows, pool, name, reading))
            sizes = sorted({row["size"] for row in rows})
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, list(map(str, sizes)))
            axis.set_title(f"pool of {pool}: {title}", fontsize=9)
            axis.set_ylabel("KL to float, nats per token", fontsize=8)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel(f"calibration windows of {rows[0]['window']} tokens", fontsize=8)
    axes[0][0].legend(fontsize=8, frameon=False)
    seeds = len({row["seed"] for row in rows if row["choice"] == "random"})
    figure.supxlabel(
        f"{rows[0]['recipe']} as calibrated, nothing learned, model {rows[0]['model']}. Chosen: by"
        " coverage of activation peaks;\nfirst: of the pool; random: mean and range of"
        f" {seeds} {'seed' if seeds == 1 else 'seeds'}. Judged texts are in"
        " no pool.",
        fontsize=8,
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _draw_curve(
    axis: Any, name: str, look: tuple[str, str], points: list[tuple[int, list[float]]]
) -> None:
    if not points:
        return
    color, marker = look
    sizes = [size for size, _ in points]
    means = [sum(values) / len(values) for _, values in points]
    axis.plot(sizes, means, marker=marker, ms=4, lw=1.4, color=color, label=name)
    if any(len(values) > 1 for _, values in points):
        low, high = ([pick(values) for _, values in points] for pick in (min, max))
        axis.fill_between(sizes, low, high, color=color, alpha=0.2, lw=0)


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    source, target = map(Path, sys.argv[1:])
    try:
        check(target)
        draw(read_rows(source), target)
    except (UserError, OSError, KeyError) as error:
        print(f"{source}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
