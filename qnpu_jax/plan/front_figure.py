"""Figure of a front: KL against the estimated time of a token and of a chunk, or against size.

Needs matplotlib, the extra `figures`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from qnpu_jax.latency import roofline
from qnpu_jax.plan.bench import Point
from qnpu_jax.plan.policies import POLICIES, UNIFORM
from qnpu_jax.plan.run import Plan, ends

EXTRA = 'install qnpu\'s extra "figures": pip install "qnpu[figures]"'
INK, BLUE, ORANGE = "#222222", "#0072B2", "#D55E00"
COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
"""Of other planners: Okabe and Ito's, which the colour-blind tell apart, less ours."""
MARKERS = "^vDPX<>sph"
DASHES = ((0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (9, 2)))
"""Repeated beside COLOURS and MARKERS at their own pace: no two planners look alike."""


def drawable() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(made: Plan, target: Path) -> None:
    """Draws the front into an SVG. Equal numbers give equal bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "qnpu", "svg.fonttype": "none", "font.size": 8}):
        beside = bool(made.baselines)
        figure = Figure(
            figsize=(9.6 if beside else 8, 4.2 if beside else 3.6), layout="constrained"
        )
        left, right = figure.subplots(1, 2, sharey=True)
        if made.timed:
            _panel(left, made, "decode", f"ms a token ({roofline.LABEL})", 1e3)
            chunk = f"ms a chunk of {roofline.CHUNK} tokens ({roofline.LABEL})"
            _panel(right, made, "prefill", chunk, 1e3)
        else:
            _panel(left, made, "size", "MB of weights", 1e-6)
            right.remove()
        left.set_ylabel("KL to the float model (nats a token)")
        if beside:
            shown = left.get_legend_handles_labels()
            figure.legend(*shown, loc="outside right upper", frameon=False, handlelength=4)
        else:
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
        width = 2.6 if made.baselines else 1.5
        axes.plot(xs, kls, "o-", color=BLUE, linewidth=width, zorder=3, label="front, measured")
        predicted = [p.predicted for p in front]
        axes.plot(xs, predicted, "--", color=BLUE, alpha=0.6, label="front, predicted")
    for i, p in enumerate(made.beside):
        mine = "_" if i else "ours, at uniform costs"  # one line of the legend
        axes.plot(at(p), p.kl, "o", color=BLUE, fillstyle="none", zorder=3, label=mine)
    for name, points in made.baselines.items():
        if name != UNIFORM:
            mine = sorted(points, key=at)
            axes.plot([at(p) for p in mine], [p.kl for p in mine], label=name, **_look(name))
    fixed = ends(made)
    middle = (at(fixed[0]) + at(made.high)) / 2
    for p in (*fixed, *made.baselines.get(UNIFORM, ())):
        right = at(p) > middle and bool(made.baselines)
        axes.plot(at(p), p.kl, "s", color=INK, zorder=4)
        axes.annotate(
            p.name, (at(p), p.kl), xytext=(-5 if right else 4, 4), textcoords="offset points",
            ha="right" if right else "left", zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )  # fmt: skip
    axes.plot(
        at(made.chosen),
        made.chosen.kl,
        "*",
        color=ORANGE,
        markersize=11,
        zorder=5,
        label="the plan",
    )
    axes.set_xlabel(label)
    axes.margins(y=0.1)  # room for the names of the plans above
    axes.set_ylim(bottom=0)


def _look(policy: str) -> dict[str, Any]:
    """Line of another planner, the same in every figure."""
    i = list(POLICIES).index(policy)
    return {
        "color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)], "linewidth": 0.9, "markersize": 4,
    }  # fmt: skip
