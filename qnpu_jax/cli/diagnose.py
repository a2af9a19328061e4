"""`qnpu diagnose`: where a model loses precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnpu_jax.cli import importing
from qnpu_jax.cli.options import EvalText, Folder, check_unused
from qnpu_jax.errors import UserError

WITHIN, SLOTS = 1.01, 512
"""Defaults of --suggest."""

app = typer.Typer()


Original = Annotated[
    str | None,
    typer.Option(
        help="The original float model, as for `quantize`, to measure KL from; without it, the one"
        " that the report names if a package holds it, else the folder's own weights in float."
    ),
]
Replaced = Annotated[
    list[str] | None,
    typer.Option(help="Tensor, or pattern of tensors, to make exact one by one; repeatable."),
]
Exact = Annotated[int, typer.Option(min=0, help="How many of the worst to make exact one by one.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write; without it, diagnosis/ in the model's.")
]
Suggest = Annotated[
    bool, typer.Option("--suggest", help="Say which activations 16 bits would help, at what price.")
]
Soc = Annotated[
    str | None, typer.Option(help="Of --suggest: what it is for, one with seconds of `qnpu plan`.")
]
Within = Annotated[
    float, typer.Option(help="Of --suggest: most time of a token and a chunk, by that of now.")
]
Slots = Annotated[int, typer.Option(help="Of --suggest: KV cache slots that a token reads.")]


@app.command()
def diagnose(
    folder: Folder,
    text: EvalText = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of a window of text.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="How many are read, at most.")] = 4,
    model: Original = None,
    replace: Replaced = None,
    exact: Exact = 8,
    top: Annotated[int, typer.Option(min=1, help="How many of the worst to print.")] = 20,
    out: Out = None,
    suggest: Suggest = False,
    soc: Soc = None,
    within: Within = WITHIN,
    context: Slots = SLOTS,
) -> None:
    """Tells where precision is lost, tensor by tensor.

    SQNR, clipping, use of the code range and share of the KL. SQNR is
    against the model's own integer constants run in float, as the folder
    keeps no others: what activations lose, not weights. KL is from the
    original, its share of a tensor by integrated gradients. --suggest
    writes a recipe too, OUT/suggested.json.
    """
    _check(suggest, soc, within, context)
    with importing():
        from qnpu_jax.cli.diagnosis_tables import print_diagnosis, print_suggested
        from qnpu_jax.cli.display import Display
        from qnpu_jax.diagnose import DiagnosisRequest, heat_map, run, write_diagnosis
        from qnpu_jax.output import OutputFolder
        from qnpu_jax.plan import priced, suggested
        from qnpu_jax.proof import Simulated
    asked = DiagnosisRequest(folder, text, tokens, windows, model, tuple(replace or ()), exact, out)
    prices = None
    if soc is not None:  # its mistakes are found before minutes pass
        prices = priced(OutputFolder.open(folder), soc, within, context)
    with Display() as watch:
        found = run.diagnose(asked, Simulated, watch)
        draw = heat_map.draw if heat_map.drawable() else None
        if draw is None:
            watch.say(f"no heat map, as matplotlib is missing: {heat_map.EXTRA}")
        made = None if prices is None else suggested(prices, found)
        recipe = None if made is None else made.recipe
        write_diagnosis(found, asked.target(), draw, recipe)
    print_diagnosis(found, top)
    if made is not None:
        print_suggested(made, top)
    typer.echo(f"wrote {asked.target()}")
    if recipe is not None:
        file = asked.target() / run.SUGGESTED
        typer.echo(f"wrote {file}: qnpu quantize MODEL --recipe {file} --out ..")


def _check(suggest: bool, soc: str | None, within: float, context: int) -> None:
    """Refuses options of --suggest without it, and it without an SoC."""
    if suggest and soc is None:
        raise UserError("--suggest: no SoC; expected one to price 16 bits on; add --soc SM8750")
    if not suggest:
        given = (("soc", soc, None), ("within", within, WITHIN), ("context", context, SLOTS))
        for name, value, default in given:
            check_unused(name, value, default, "a diagnosis without --suggest")
