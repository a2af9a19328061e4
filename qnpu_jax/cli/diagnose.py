"""`qnpu diagnose`: where a model loses precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnpu_jax.cli import importing
from qnpu_jax.cli.options import EvalText, Folder

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
    """Tells where precision is lost, tensor by tensor.

    SQNR, clipping, use of the code range and share of the KL. SQNR is
    against the model's own integer constants run in float, as the folder
    keeps no others: what activations lose, not weights. KL is from the
    original, its share of a tensor by integrated gradients.
    """
    with importing():
        from qnpu_jax.cli.diagnosis_tables import print_diagnosis
        from qnpu_jax.cli.display import Display
        from qnpu_jax.diagnose import DiagnosisRequest, heat_map, run, write_diagnosis
        from qnpu_jax.proof import Simulated
    asked = DiagnosisRequest(folder, text, tokens, windows, model, tuple(replace or ()), exact, out)
    with Display() as watch:
        found = run.diagnose(asked, Simulated, watch)
        draw = heat_map.draw if heat_map.drawable() else None
        if draw is None:
            watch.say(f"no heat map, as matplotlib is missing: {heat_map.EXTRA}")
        write_diagnosis(found, asked.target(), draw)
    print_diagnosis(found, top)
    typer.echo(f"wrote {asked.target()}")
