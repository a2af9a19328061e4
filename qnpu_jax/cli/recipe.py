"""`qnpu recipe`: recipes as JSON, with bits set by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from qnpu_jax.cli import importing
from qnpu_jax.cli.options import check_unused
from qnpu_jax.errors import UserError

app = typer.Typer()

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Bits of a tensor, or of all that a pattern matches: layers.2.mlp.act=16; repeatable.",
    ),
]
OfModel = Annotated[
    str | None, typer.Option(help="The model whose tensors --set names, as for `quantize`.")
]
Follow = Annotated[
    bool, typer.Option("--follow", help="Move along what the bits of --set ask of other tensors.")
]


@app.command(name="recipe")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A named recipe or a file.")] = "w8a8",
    bits: Sets = None,
    model: OfModel = None,
    follow: Follow = False,
) -> None:
    """Prints a recipe as JSON, to start one's own from.

    With --set some of its bits are others; the biases of linears, whose
    bits go with those of their outputs, move along. The name of such a
    recipe ends in -set.
    """
    from qnpu_jax import artifacts
    from qnpu_jax.recipes import load_recipe

    recipe = load_recipe(name)
    asked: dict[str, int] = {}
    for tensor, width in map(_parsed, bits or ()):
        asked.pop(tensor, None)  # the last one counts, also beside patterns between the two
        asked[tensor] = width
    if asked:
        if model is None:
            raise UserError("--set: no model; expected the one whose tensors it names; add --model")
        with importing():
            from qnpu_jax.models import load_params
            from qnpu_jax.plan import ties
        changed = recipe.bits.set_all(asked, ties(load_params(model)[0]), follow)
        recipe = replace(recipe, name=f"{recipe.name}-set", bits=changed)
    else:
        check_unused("model", model, None, "a recipe without --set")
        if follow:
            raise UserError("--follow: nothing moves without --set; expected both; leave it out")
    typer.echo(artifacts.layout(recipe.to_json()))


def _parsed(text: str) -> tuple[str, int]:
    """A tensor and its bits.

    >>> _parsed("layers.2.mlp.act=16")
    ('layers.2.mlp.act', 16)
    """
    name, _, bits = text.rpartition("=")
    if not name or not (bits.isascii() and bits.isdecimal()):
        raise UserError(
            f"--set {text}: expected a tensor and its bits, as layers.2.mlp.act=16; correct it"
        )
    return name, int(bits)
