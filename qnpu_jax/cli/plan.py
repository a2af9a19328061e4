"""`qnpu plan`: which tensor gets how many bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from qnpu_jax.choices import PlanTarget
from qnpu_jax.cli import importing
from qnpu_jax.cli.options import check_unused

if TYPE_CHECKING:
    from qnpu_jax.plan import Origin

app = typer.Typer()

Soc = Annotated[str, typer.Option(help=f"What the plan is for: {', '.join(get_args(PlanTarget))}.")]
Within = Annotated[
    float | None,
    typer.Option(
        help="Most time that a token and a chunk may take, in units of what --low takes, as 1.01."
    ),
]
Loss = Annotated[
    float | None,
    typer.Option(
        help="Nats a token that may be lost, before learning or after that of --effort; the fastest"
        " such plan."
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|OUT",
        help="smollm2-135m, a .gguf file, a Hugging Face folder, org/name; or an output folder of"
        " `qnpu quantize`, whose recipe is then --low.",
    ),
]
Low = Annotated[
    str | None,
    typer.Option(
        help="Recipe to compare with, whose time --within and the front are given in.",
        show_default="w4a8",
    ),
]
Least = Annotated[
    str | None,
    typer.Option(
        help="Recipe of the fewest bits; the plan is it in all else.",
        show_default="--low, with 8-bit scores and softmax where that is w4a8 or w8a8",
    ),
]
OfFolder = Annotated[
    str | None,
    typer.Option(
        help="The float model that OUT was made from, as for `quantize`; without it, the one that"
        " its report names if a package holds it."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="Text or JSONL to calibrate with and measure on; without it, the model writes it."
    ),
]
Cache = Annotated[int, typer.Option(min=129, help="Slots of the KV cache that a token reads.")]
Front = Annotated[
    bool,
    typer.Option(
        "--front/--no-front", help="Plans of nine other budgets of time, or of size, too."
    ),
]
Baseline = Annotated[
    list[str] | None,
    typer.Option(
        help="Another planner's plans beside the front: sqnr, relative, paper, fisher, removal"
        " (slow), kurtosis, random, uniform, charge-greedy, no-casts, once; or all but the slow."
        " Repeatable.",
    ),
]
Pairs = Annotated[
    int,
    typer.Option(
        min=0, help="Pair terms of neighbouring tensors that predictions have beside charges."
    ),
]
Windows = Annotated[
    int,
    typer.Option(
        min=1, help="Windows of each of two texts that charges and KL are measured on, at most."
    ),
]
Learning = Annotated[
    str,
    typer.Option(
        "--effort",
        help="How much is learned from the plan before the last solution: none, fast, full, best.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier plan.")]


@app.command()
def plan(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    soc: Soc,
    within: Within = None,
    kl: Loss = None,
    size: Annotated[float | None, typer.Option(help="Most MB of weights.")] = None,
    low: Low = None,
    high: Annotated[str, typer.Option(help="Recipe of the most bits.")] = "w8a16",
    calibration: Calibration = None,
    context: Cache = 512,
    front: Front = True,
    baseline: Baseline = None,
    effort: Learning = "none",
    pairs: Pairs = 0,
    least: Least = None,
    windows: Windows = 4,
    model: OfFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """Finds the widths that lose least within a budget, and writes them as a recipe.

    What low bits of every weight and activation cost is measured, as a
    share of the KL; what high ones cost is estimated for a Snapdragon or
    an Ethos-U, casts included; a mixed integer program does the rest, and
    is measured and solved again. A target keeps to the widths that it
    has. `qnpu quantize --recipe OUT/plan.json` takes the plan.
    """
    with importing():
        from qnpu_jax import artifacts
        from qnpu_jax.cli.display import Display
        from qnpu_jax.cli.plan_tables import print_plan
        from qnpu_jax.plan import PlanRequest, front_figure, policies, run
        from qnpu_jax.recipes import load_effort, load_recipe
    within, kl, size = (math.inf if x is None else x for x in (within, kl, size))
    of, fewest = _origin(source, low, model), None if least is None else load_recipe(least)
    asked = PlanRequest(
        of.model, soc, of.recipe, load_recipe(high), within, kl, 1e6 * size, calibration,
        context, front, policies.named(baseline or ()), load_effort(effort), pairs, of.sha256,
        fewest, windows,
    )  # fmt: skip
    artifacts.check_writable(out, overwrite, run.KIND)
    with Display() as watch:
        made = run.plan(asked, watch)
        draw = front_figure.draw if front_figure.drawable() else None
        if draw is None:
            watch.say(f"no figure, as matplotlib is missing: {front_figure.EXTRA}")
        run.write_plan(made, out, overwrite, draw)
    print_plan(made)
    typer.echo(f"wrote {out}: qnpu quantize {of.model} --recipe {out / run.RECIPE} --out ..")


def _origin(source: str, low: str | None, model: str | None) -> Origin:
    """The model and the low recipe, given or of a folder."""
    from qnpu_jax import artifacts
    from qnpu_jax.output import OutputFolder
    from qnpu_jax.plan import Origin, origin
    from qnpu_jax.recipes import load_recipe

    if not (Path(source) / artifacts.REPORT).is_file():
        check_unused("model", model, None, "a model")
        return Origin(source, load_recipe("w4a8" if low is None else low), None)
    check_unused("low", low, None, "an output folder, whose recipe it is")
    return origin(OutputFolder.open(source), model)
