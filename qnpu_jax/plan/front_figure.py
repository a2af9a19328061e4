"""Figure of a front: KL against the estimated time of a token and of a chunk, or against size.

Needs matplotlib, the extra `figures`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from qnpu_jax.latency import roofline
from qnpu_jax.plan.run import Plan, Point

EXTRA = 'install qnpu\'s extra "figures": pip install "qnpu[figures]"'
INK, BLUE, ORANGE = "#222222", "#0072B2", "#D55E00"


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(made: Plan, target: Path) -> None:
    """Draws the front into an SVG. Equal numbers give equal bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "qnpu", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        if made.timed:
            _panel(left, made, "decode", f"ms a token ({roofline.LABEL})", 1e3)
            chunk = f"ms a chunk of {roofline.CHUNK} tokens ({roofline.LABEL})"
            _panel(right, made, "prefill", chunk, 1e3)
        else:
            _panel(left, made, "size", "MB of weights", 1e-6)
            right.remove()
        left.set_ylabel("KL to the float model (nats a token)")
        left.legend(frameon=False)
        figure.suptitle(
            f"{made.recipe.name}: measured KL against {'estimated time' if made.timed else 'size'}",
            fontsize=9,
            parse_math=False,
        )
        figure.savefig(target, format="svg", metadata={"Date": None})


def _panel(axes: Any, made: Plan, cost: str, label: str, unit: float) -> None:
    def at(p: Point) -> float:
        return unit * getattr(p, cost)

    front = sorted(made.front, key=at)
    if front:
        xs, kls = [at(p) for p in front], [p.kl for p in front]
        axes.plot(xs, kls, "o-", color=BLUE, label="front, measured")
        predicted = [p.predicted for p in front]
        axes.plot(xs, predicted, "--", color=BLUE, alpha=0.6, label="front, predicted")
    for p in (made.low, made.high):
        axes.plot(at(p), p.kl, "s", color=INK)
        axes.annotate(p.name, (at(p), p.kl), xytext=(4, 4), textcoords="offset points")
    axes.plot(at(made.chosen), made.chosen.kl, "*", color=ORANGE, markersize=11, label="the plan")
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)
