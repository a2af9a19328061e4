"""`qnpu proof`: how wide every accumulator must be, proved from the weights, beside what a text
brings it to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qnpu_jax import artifacts
from qnpu_jax.cli.display import Display
from qnpu_jax.cli.options import EvalText, Folder
from qnpu_jax.integer import NO_SUM, Intermediate
from qnpu_jax.output import OutputFolder
from qnpu_jax.proof import WIDTHS, Row, Widths, figure, observed, widths

app = typer.Typer()


@app.command()
def proof(
    folder: Folder,
    text: EvalText = None,
    tokens: Annotated[int, typer.Option(help="Of the text, read in the simulator.")] = 1024,
    prefill: Annotated[
        int, typer.Option(help="Tokens of a sequence, on which sums over keys depend.")
    ] = 128,
    widest: Annotated[int, typer.Option(min=0, help="Linears to name.")] = 5,
) -> None:
    """Bits that every accumulator needs: proved from the weights, channel by channel, and used on a
    text; with what narrower accumulators could hold.

    Writes accumulators.json into the folder and, with matplotlib (extra: figures),
    accumulators.svg. Exit status 1 where a run passes what was proved, which is a bug.
    """
    with Display() as clock:
        opened = OutputFolder.open(folder)
        found = widths.measure(opened, text, tokens, prefill, observed, clock)
    console = Console(soft_wrap=False)
    console.print(_kinds_table(found.rows))
    console.print(_between_table(found.intermediates))
    console.print(_histogram_table(found.linears))
    if widest:
        console.print(_widest_table(widths.widest(found.linears, widest)))
    for line in _verdict(found):
        typer.echo(line)
    typer.echo(f"wrote {widths.write(found, folder)}")
    if figure.installed():
        typer.echo(f"wrote {figure.draw(found.linears, folder / artifacts.ACCUMULATORS_FIGURE)}")
    else:
        typer.echo(f"no {artifacts.ACCUMULATORS_FIGURE}: {figure.MISSING}", err=True)
    if broken := [row.tensor for row in found.rows if not row.holds]:
        typer.echo(f"{broken[0]}: the run passes what was proved, which is a bug", err=True)
        raise typer.Exit(1)


def _kinds_table(rows: Sequence[Row]) -> Table:
    shown = [bits for bits in WIDTHS if bits < 32]
    table = _table(
        "bits of accumulators, and channels that provably fit fewer",
        ("", "channels", "proved", "median", "text", *map(str, shown)),
    )
    before = None
    for kind in widths.kinds(rows):
        if kind.op != before:
            table.add_section()
            table.add_row(kind.op)
            before = kind.op
        bits = (kind.needed, kind.typical, kind.seen)
        shares = (_share(kind.fitting[width], kind.channels) for width in shown)
        table.add_row(kind.name, f"{kind.channels:,}", *map(str, bits), *shares)
    return table


def _histogram_table(linears: Sequence[Row]) -> Table:
    table = _table("channels of the linears by their bits", ("bits", "proved", "text"))
    proved = widths.histogram(n for row in linears for n in row.proved.needed)
    used = widths.histogram(n for row in linears for n in row.used)
    total = sum(proved.values())
    for bits in range(min(*proved, *used), max(*proved, *used) + 1):
        counts = (proved.get(bits, 0), used.get(bits, 0))
        table.add_row(str(bits), *(_share(n, total) for n in counts))
    return table


def _between_table(between: Sequence[Intermediate]) -> Table:
    table = _table("other ops, before they round", ("", "widest value", "of", "proved", "in"))
    groups: dict[tuple[str, str], list[Intermediate]] = {}
    for found in between:
        groups.setdefault((found.op, found.what), []).append(found)
    for (op, what), group in sorted(groups.items()):
        top = max(group, key=lambda i: max(-i.low, i.high))
        table.add_row(op, what, f"{len(group):,}", str(top.needed), top.tensor)
    return table


def _widest_table(rows: Sequence[Row]) -> Table:
    table = _table("widest linears", ("", "bits", "|acc| at most", "text", "|acc| at most"))
    for row in rows:
        proved, seen = (f"2^{math.log2(max(x, 1)):.2f}" for x in (row.reach, row.reached))
        table.add_row(row.tensor, str(row.needed), proved, str(row.seen), seen)
    return table


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


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    texts = ("", "widest value", "in")
    for name in columns:
        table.add_column(name, justify="left" if name in texts else "right")
    return table
