"""`qnpu diagnose`: where a model loses precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qnpu_jax.cli.display import Display
from qnpu_jax.cli.options import EvalText, Folder
from qnpu_jax.diagnose import Diagnosis, heat_map, run
from qnpu_jax.proof import Simulated

app = typer.Typer()


@app.command()
def diagnose(
    folder: Folder,
    text: EvalText = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of a window of text.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="How many are read, at most.")] = 4,
    model: Annotated[
        str | None,
        typer.Option(
            help="The original float model, as for `quantize`, to measure KL from; without it, the"
            " one that the report names if a package holds it, else the folder's own weights in"
            " float."
        ),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="Tensor, or pattern of tensors, to make exact one by one; repeatable."),
    ] = None,
    exact: Annotated[
        int, typer.Option(min=0, help="How many of the worst to make exact one by one.")
    ] = 8,
    top: Annotated[int, typer.Option(min=1, help="How many of the worst to print.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; without it, diagnosis/ in the model's.")
    ] = None,
) -> None:
    """Tells where precision is lost: SQNR, clipping, use of the code range and share of the KL of
    every tensor.

    SQNR is against the model's own integer constants run in float, as the
    folder keeps no others: what activations lose, not weights. KL is from the
    original, its share of a tensor by integrated gradients.
    """
    asked = run.Request(folder, text, tokens, windows, model, tuple(replace or ()), exact, out)
    with Display() as watch:
        found = run.run(asked, Simulated, watch)
        draw = heat_map.draw if heat_map.drawable() else None
        if draw is None:
            watch.say(f"no heat map, as matplotlib is missing: {heat_map.EXTRA}")
        run.write(found, asked.target(), draw)
    _print(found, top)
    typer.echo(f"wrote {asked.target()}")


def _print(found: Diagnosis, top: int) -> None:
    console = Console(soft_wrap=False)
    console.print(_tensors(found, top))
    console.print(_kinds(found))
    count, length = found.text.windows.shape
    kl = found.kl
    typer.echo(
        f"KL of {count} x {length} tokens of {found.text.source}, in nats a token, from"
        f" {found.reference}: simulator {kl['simulator']:.4f}, fake-quant {kl['fake_quant']:.4f},"
        f" with exact activations {kl['constants']:.4f}"
    )


def _tensors(found: Diagnosis, top: int) -> Table:
    """The worst, and what was made exact."""
    total = found.kl["simulator"]
    alone = {r.tensor: r.kl / total if total else 0.0 for r in found.replaced}
    table = Table(title="worst tensors by their share of the KL", title_justify="left")
    table.add_column("tensor")
    for name in ("KL %", "exact %", "own dB", "dB", "clip %", "used %"):
        table.add_column(name, justify="right")
    for i, r in enumerate(found.worst):
        if i < top or r.tensor in alone:
            table.add_row(
                r.tensor,
                _percent(found.share(r)),
                _percent(alone.get(r.tensor)),
                _number(r.own_sqnr),
                _number(r.sqnr),
                "design" if r.by_design else _percent(r.clipped),
                _percent(r.used),
            )
    return table


def _kinds(found: Diagnosis) -> Table:
    table = Table(title="the same over all layers", title_justify="left")
    table.add_column("tensor")
    table.add_column("KL %", justify="right")
    for name, share in list(found.kinds().items())[:8]:
        table.add_row(name, _percent(share))
    if total := found.kl["simulator"]:
        table.add_row("weights and other constants", _percent(found.kl["constants"] / total))
    return table


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f}"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}"
