"""`qnpu text`: what a model writes itself, in a file to look at, to edit and to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnpu_jax.cli import importing
from qnpu_jax.cli.options import Model

app = typer.Typer()


@app.command()
def text(
    model: Model,
    out: Annotated[Path, typer.Option(help="The .jsonl to write, a document a line.")],
    tokens: Annotated[
        int, typer.Option(min=1, max=100_000_000, help="To write, at least.")
    ] = 65_536,
    length: Annotated[
        int, typer.Option(min=32, max=4096, help="Of the longest document, in tokens.")
    ] = 512,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every draw.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    choose: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Windows to choose by coverage, and show.")
    ] = 0,
) -> None:
    """Lets a model write text to calibrate with and to learn from.

    Chats, code, sums, prose, data and other languages: what `quantize`
    writes without --calibration, and what --calibration takes. Loops and
    repeated documents are left out, and counted.

    --choose shows which windows of it show the activations their largest
    values, and marks their documents in the file: "chosen".
    """
    with importing():
        from qnpu_jax import own_text
        from qnpu_jax.cli.display import Display
        from qnpu_jax.cli.text_table import print_choice, print_shares
    asked = own_text.OwnText(model, out, tokens, length, seed, overwrite, choose)
    with Display() as display:
        found = own_text.write(asked, display)
    print_shares(found.corpus, found.choice)
    if found.choice is not None:
        print_choice(found.choice)
    typer.echo(f"wrote {out}")
