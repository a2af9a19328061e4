"""Heat map of where precision is lost: tensors by layers, with their own SQNR and share of the KL.

Needs matplotlib, the extra `figures`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from qnpu_jax.diagnose.run import Diagnosis
from qnpu_jax.diagnose.summary import TensorRow
from qnpu_jax.graph import LAYERS, split_name

EXTRA = 'install qnpu\'s extra "figures": pip install "qnpu[figures]"'
DECIBELS = (10.0, 60.0)
"""SQNRs at the ends of the colour scale."""
PERCENT = (0.01, 10.0)
"""Shares at the ends of the colour scale."""


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def table(
    rows: Sequence[TensorRow], of: Callable[[TensorRow], float | None]
) -> tuple[list[str], Float[np.ndarray, "tensors layers"]]:
    """Tabulates a number over tensors (rows) and layers (columns).

    Args:
      rows: those of layers that round are taken.
      of: returns a row's number.

    Returns:
      Names of the tensors without layer, and the table, NaN where there is no number.
    """
    cells: dict[str, dict[int, float]] = {}
    for row in rows:
        name, layer = split_name(row.tensor)
        if layer is not None and row.rounds:
            value = of(row)
            cell = cells.setdefault(name.removeprefix(LAYERS), {})
            cell[layer] = np.nan if value is None else value
    layers = 1 + max(layer for cell in cells.values() for layer in cell)
    grid = [[cell.get(layer, np.nan) for layer in range(layers)] for cell in cells.values()]
    return [*cells], np.array(grid)


def draw(found: Diagnosis, target: Path) -> None:
    """Draws the heat map into an SVG. Equal numbers give equal bytes."""
    import matplotlib as mpl
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    names, sqnr = table(found.rows, lambda r: r.own_sqnr)
    _, share = table(found.rows, lambda r: 100 * found.share(r))
    title = f"{found.text.source}: KL {found.kl['simulator']:.3g} nats a token"
    with mpl.rc_context({"svg.hashsalt": "qnpu", "svg.fonttype": "none", "font.size": 7}):
        figure = Figure(figsize=(8, 1.3 + 0.12 * len(names)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, sqnr, Normalize(*DECIBELS), "YlOrRd_r", "own SQNR (dB)")
        _panel(right, share, LogNorm(*PERCENT), "YlOrRd", "share of the KL (%)")
        left.set_yticks(range(len(names)), names, fontsize=6)
        figure.suptitle(title, fontsize=8, parse_math=False)
        figure.savefig(target, format="svg", metadata={"Date": None})


def _panel(axes: Any, values: np.ndarray, norm: Any, colours: str, title: str) -> None:
    shown = np.clip(values, norm.vmin, norm.vmax)
    image = axes.imshow(shown, norm=norm, cmap=colours, aspect="auto", interpolation="none")
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("layer")
    axes.figure.colorbar(image, ax=axes, location="bottom", aspect=40, pad=0.01)
