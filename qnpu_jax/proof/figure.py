"""Figure of `qnpu proof`: bits of accumulators, layer by layer (extra: figures)."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnpu_jax import artifacts
from qnpu_jax.proof.widths import WIDTHS, AccumulatorRow

MISSING = "matplotlib is not installed; expected the extra figures: pip install 'qnpu[figures]'"


def installed() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(linears: Sequence[AccumulatorRow], path: Path) -> Path:
    """Draws bits of accumulators over the layers, a panel for each kind of linear, as SVG.

    A panel has log2 |acc| + 1 as proved for the widest and the median channel, and as reached on a
    text. Equal numbers give equal bytes.

    Args:
      linears: rows of FULLY_CONNECTED ops, in the order of the graph.
      path: file to write or replace.

    Returns:
      The path.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    groups: dict[str, list[AccumulatorRow]] = {}
    for row in linears:
        groups.setdefault(row.kind, []).append(row)
    with mpl.rc_context({"svg.hashsalt": "qnpu", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 5), layout="constrained")
        columns = -(-len(groups) // 2)
        axes: Any = figure.subplots(2, columns, sharey=True, squeeze=False)
        for axis, (kind, rows) in zip(axes.flat, groups.items(), strict=False):
            _panel(axis, kind, rows)
        for axis in list(axes.flat)[len(groups) :]:
            axis.set_axis_off()
        for row_of_axes in axes:
            row_of_axes[0].set_ylabel("bits of the accumulator")
        low, high = min(row.seen for row in linears), max(row.needed for row in linears)
        axes.flat[0].set_ylim(min(low, *WIDTHS) - 1, max(high, *WIDTHS) + 1)
        figure.legend(
            *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        with artifacts.new_file(path, replace=True) as partial:
            figure.savefig(partial, format="svg", metadata={"Date": None})
    return path


def _panel(axis: Any, kind: str, rows: Sequence[AccumulatorRow]) -> None:
    layers = range(len(rows))
    for bits in WIDTHS:
        axis.axhline(bits, color="gray", lw=0.6, ls="--")
    median = [
        statistics.median(map(max, (-low for low in row.proved.low), row.proved.high))
        for row in rows
    ]
    lines = {
        "proved, widest channel": [row.reach for row in rows],
        "proved, median channel": median,
        "on the text": [row.reached for row in rows],
    }
    for label, reaches in lines.items():
        bits = [math.log2(max(reach, 1)) + 1 for reach in reaches]
        axis.plot(layers, bits, "o" if len(rows) == 1 else "-", ms=3, lw=1.2, label=label)
    axis.set_title(kind, fontsize=9)
    if len(rows) > 1:
        axis.set_xlabel("layer", fontsize=8)
    else:
        axis.set_xticks([])
