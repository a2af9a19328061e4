"""`qnpu proof`: how wide every accumulator must be, proved from the weights, beside what a text
brings it to.
"""

from __future__ import annotations

from typing import Annotated

import typer

from qnpu_jax.cli import importing
from qnpu_jax.cli.options import EvalText, Folder

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
    """Proves how many bits every accumulator needs.

    From the weights, channel by channel, beside what a text uses, and
    what narrower accumulators could hold. Writes accumulators.json into
    the folder and, with matplotlib (extra: figures), accumulators.svg.
    Exit status 1 where a run passes what was proved, which is a bug.
    """
    with importing():
        from qnpu_jax import artifacts
        from qnpu_jax.cli.accumulator_tables import print_widths
        from qnpu_jax.cli.display import Display
        from qnpu_jax.output import OutputFolder
        from qnpu_jax.proof import figure, observe_accumulators, widths
    with Display() as clock:
        opened = OutputFolder.open(folder)
        found = widths.measure_widths(opened, text, tokens, prefill, observe_accumulators, clock)
    print_widths(found, widest)
    typer.echo(f"wrote {widths.write_widths(found, folder)}")
    if figure.installed():
        typer.echo(f"wrote {figure.draw(found.linears, folder / artifacts.ACCUMULATORS_FIGURE)}")
    else:
        typer.echo(f"no {artifacts.ACCUMULATORS_FIGURE}: {figure.MISSING}", err=True)
    if broken := [row.tensor for row in found.rows if not row.holds]:
        typer.echo(f"{broken[0]}: the run passes what was proved, which is a bug", err=True)
        raise typer.Exit(1)
