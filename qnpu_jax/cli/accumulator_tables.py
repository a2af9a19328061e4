"""Tables of `qnpu proof`: bits of accumulators, proved and used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import typer
from rich.table import Table

from qnpu_jax.cli.tables import show, table
from qnpu_jax.integer import NO_SUM, Intermediate
from qnpu_jax.proof import WIDTHS, AccumulatorRow, Widths, widths

LEFT = ("", "widest value", "in")
"""Columns that are not numbers."""


def print_widths(found: Widths, count: int) -> None:
    """Prints the tables, that of the `count` widest linears only if there are any, and the
    verdict."""
    show(_kinds(found.rows), _other_ops(found.intermediates), _histogram(found.linears))
    if count:
        show(_widest(widths.widest(found.linears, count)))
    for line in _verdict(found):
        typer.echo(line)


def _kinds(rows: Sequence[AccumulatorRow]) -> Table:
    narrow = [bits for bits in WIDTHS if bits < 32]
    made = table(
        "bits of accumulators, and channels that provably fit fewer",
        ("", "channels", "proved", "median", "text", *map(str, narrow)),
        LEFT,
    )
    before = None
    for kind in widths.kinds(rows):
        if kind.op != before:
            made.add_section()
            made.add_row(kind.op)
            before = kind.op
        bits = (kind.needed, kind.typical, kind.seen)
        shares = (_share(kind.fitting[width], kind.channels) for width in narrow)
        made.add_row(kind.name, f"{kind.channels:,}", *map(str, bits), *shares)
    return made


def _histogram(linears: Sequence[AccumulatorRow]) -> Table:
    made = table("channels of the linears by their bits", ("bits", "proved", "text"))
    proved = widths.histogram(n for row in linears for n in row.proved.needed)
    used = widths.histogram(n for row in linears for n in row.used)
    total = sum(proved.values())
    for bits in range(min(*proved, *used), max(*proved, *used) + 1):
        counts = (proved.get(bits, 0), used.get(bits, 0))
        made.add_row(str(bits), *(_share(n, total) for n in counts))
    return made


def _other_ops(between: Sequence[Intermediate]) -> Table:
    columns = ("", "widest value", "of", "proved", "in")
    made = table("other ops, before they round", columns, LEFT)
    groups: dict[tuple[str, str], list[Intermediate]] = {}
    for found in between:
        groups.setdefault((found.op, found.what), []).append(found)
    for (op, what), group in sorted(groups.items()):
        top = max(group, key=lambda i: max(-i.low, i.high))
        made.add_row(op, what, f"{len(group):,}", str(top.needed), top.tensor)
    return made


def _widest(rows: Sequence[AccumulatorRow]) -> Table:
    columns = ("", "bits", "|acc| at most", "text", "|acc| at most")
    made = table("widest linears", columns, LEFT)
    for row in rows:
        proved, seen = (f"2^{math.log2(max(x, 1)):.2f}" for x in (row.reach, row.reached))
        made.add_row(row.tensor, str(row.needed), proved, str(row.seen), seen)
    return made


def _verdict(found: Widths) -> list[str]:
    linears, read = found.linears, found.text
    channels = sum(len(row.proved.low) for row in linears)
    lines = [f"nothing is summed, so nothing to prove, in {', '.join(NO_SUM)}"]
    for bits in WIDTHS:
        whole = sum(row.needed <= bits for row in linears)
        fit = sum(row.fitting(bits) for row in linears)
        lines.append(
            f"{bits} bits provably hold {whole:,} of {len(linears):,} linears"
            f" ({100 * fit / channels:.1f}% of their channels); on the text"
            f" {sum(row.seen <= bits for row in linears):,} needed no more"
        )
    inside = sum(row.holds for row in found.rows)
    lines.append(
        f"{inside:,} of {len(found.rows):,} accumulators stayed within what was proved, on"
        f" {read.windows.size:,} tokens of {read.source}"
    )
    return lines


def _share(part: int, whole: int) -> str:
    """A percentage that says 100 and 0 only where it is so."""
    if part in (0, whole):
        return "100%" if part else "-"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f}%"
