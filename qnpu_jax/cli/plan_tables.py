"""Tables of `qnpu plan`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import typer
from rich.table import Table

from qnpu_jax.cli.tables import show, table
from qnpu_jax.graph import LAYERS
from qnpu_jax.latency import roofline
from qnpu_jax.plan import UNIFORM, Exceeded, Plan, ends, exceptions

TOP = 12
"""Groups that are shown, by what their low bits cost."""


def print_plan(made: Plan) -> None:
    """Prints the front, what is raised, and what low bits cost."""
    show(_front(made), _raised(made), _charges(made))
    if made.baselines:
        show(_others(made))
        typer.echo(_verdict(exceptions(made)))


def _front(made: Plan) -> Table:
    shown = table(
        f"plans; seconds are {_worth(made)}",
        ("plan", "KL", "predicted", "ms a token", "ms a chunk", "weights", "casts", "raised"),
        ("plan",),
    )
    uniform = made.baselines.get(UNIFORM, ())
    rows = sorted(
        (*ends(made), *uniform, *made.beside, *made.front),
        key=lambda p: (p.decode if made.timed else p.size, p.kl),
    )
    for p in (made.chosen, *made.learned, *rows):
        shown.add_row(
            p.name, f"{p.kl:.4f}", _or_none(p.predicted), _ms(p.decode),
            _ms(p.prefill), f"{p.size / 1e6:.4g} MB", str(p.casts), str(sum(p.raised)),
        )  # fmt: skip
    return shown


def _worth(made: Plan) -> str:
    if not made.timed:
        return "not estimated for this target"
    token, chunk = (f"{100 * e:.0f}%" for e in made.error)
    return f"an {roofline.LABEL}, off by up to {token} (token) and {chunk} (chunk)"


def _ms(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{1e3 * seconds:.3f}"


def _or_none(kl: float) -> str:
    return f"{kl:.4f}" if math.isfinite(kl) else ""


def _others(made: Plan) -> Table:
    """KL of other planners at each budget."""
    shown = table(
        "other planners: KL, in thousandths of a nat, within each budget of time by what"
        f" {made.low.name} takes",
        ("planner", *(p.name for p in made.front)),
        ("planner",),
    )
    rows = {"ours": made.front} | {n: p for n, p in made.baselines.items() if n != UNIFORM}
    for name, points in rows.items():
        shown.add_row(name, *(_thousandths(p.kl) for p in points))
    return shown


def _thousandths(kl: float) -> str:
    """KL in thousandths, three digits.

    >>> _thousandths(0.13044), _thousandths(0.0592), _thousandths(0.00476)
    ('130', '59.2', '4.76')
    """
    x = 1e3 * kl
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f}"


def _verdict(found: Sequence[Exceeded]) -> str:
    """Says where the front is not the lowest."""
    if not found:
        return "ours loses no more than any of them, within the standard error over windows"
    lines = ["another planner loses less than ours, by more than the standard error over windows:"]
    lines += [
        f"  {e.policy}, {e.point}: KL {e.theirs:.4f}, ours {e.ours:.4f} (+- {e.error:.4f})"
        for e in found
    ]
    return "\n".join(lines)


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
