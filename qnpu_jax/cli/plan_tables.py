"""Tables of `qnpu plan`."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from qnpu_jax.cli.tables import show, table
from qnpu_jax.graph import LAYERS
from qnpu_jax.latency import roofline
from qnpu_jax.plan import Plan

TOP = 12
"""Groups that are shown, by what their low bits cost."""


def print_plan(made: Plan) -> None:
    """Prints the front, what is raised, and what low bits cost."""
    show(_front(made), _raised(made), _charges(made))


def _front(made: Plan) -> Table:
    shown = table(
        f"plans; seconds are an {roofline.LABEL}, off by up to {100 * made.error[0]:.0f}% (token)"
        f" and {100 * made.error[1]:.0f}% (chunk)",
        ("plan", "KL", "predicted", "ms a token", "ms a chunk", "weights", "casts", "raised"),
        ("plan",),
    )
    ends = sorted((made.low, made.high, *made.front), key=lambda p: (p.decode, p.kl))
    for p in (made.chosen, *ends):
        shown.add_row(
            p.name, f"{p.kl:.4f}", f"{p.predicted:.4f}", f"{1e3 * p.decode:.3f}",
            f"{1e3 * p.prefill:.3f}", f"{p.size / 1e6:.4g} MB", str(p.casts), str(sum(p.raised)),
        )  # fmt: skip
    return shown


def _raised(made: Plan) -> Table:
    """Raised groups by their kind, with the layers of each."""
    shown = table(
        "what the plan raises",
        ("tensor", "bits", "layers", "charged", "of them"),
        ("tensor", "layers"),
    )
    groups = made.choices.groups
    of: dict[tuple[str, int, int], list[int]] = {}
    for i, group in enumerate(groups):
        member = group.members[0]
        name = (LAYERS + "*." if member.prefix == LAYERS else member.prefix) + member.name
        of.setdefault((name, group.low, group.high), []).append(i)
    for (name, low, high), mine in of.items():
        up = [i for i in mine if made.chosen.raised[i]]
        if up:
            layers = ", ".join(_spans([groups[i].members[0].layer for i in up]))
            charge = f"{sum(made.charges[i] for i in up):+.4f}"
            shown.add_row(name, f"{low} -> {high}", layers, charge, f"{len(up)} of {len(mine)}")
    return shown


def _spans(layers: list[int]) -> list[str]:
    """Runs of numbers.

    >>> _spans([0, 1, 2, 5, 7, 8])
    ['0-2', '5', '7-8']
    """
    runs: list[list[int]] = []
    for x in sorted(Counter(layers)):
        if runs and x == runs[-1][-1] + 1:
            runs[-1].append(x)
        else:
            runs.append([x])
    return [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs]


def _charges(made: Plan) -> Table:
    shown = table(
        "what low bits cost most", ("tensor", "bits", "charged", "+-", "in the plan"), ("tensor",)
    )
    order = sorted(range(len(made.charges)), key=lambda i: -made.charges[i])
    for i in order[:TOP]:
        group, up = made.choices.groups[i], made.chosen.raised[i]
        bits = f"{group.low} -> {group.high}" if up else str(group.low)
        shown.add_row(
            group.name, str(group.low), f"{made.charges[i]:.4f}", f"{made.errors[i]:.4f}", bits
        )
    return shown
