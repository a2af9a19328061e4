"""Ablation of a recipe: one part changed at a time, everything else equal.

`python benchmarks/ablation.py --rows no-prefix ce ...`; without --rows, all. Fewer steps than
`accuracy.py` by default: rows are compared with each other, in one run. The full recipe is always
measured: every row is shown against it, of the same seed.

Goal: no row beats the full recipe by more than 1% of perplexity (mean over seeds) and is as near
to the float model (KL); one that does should become the recipe. One that beats it in perplexity
alone has learned the text and left the model. Exit status: 0 if the goal holds (always with
--quick), else 1; 2 if it could not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from protocol import Bench, add_arguments, load, quick, recipe_job
from rows import COLUMNS, Job, Row, kept_rows, perplexity, table

from qnpu_jax.errors import UserError
from qnpu_jax.recipes import Recipe, Stage, load_recipe

FULL = "full recipe"
STEPS = 150
"""Steps of learning where the effort learns and --steps says nothing."""
BETTER = 1.0
"""Percent of perplexity by which no row may beat the full recipe."""


def every_stage(**changes: Any) -> Callable[[Recipe], Recipe]:
    """The recipe with these settings in all stages."""

    def change(recipe: Recipe) -> Recipe:
        stages = tuple(dataclasses.replace(s, **changes) for s in recipe.stages)
        return dataclasses.replace(recipe, stages=stages)

    return change


def without(*groups: str) -> Callable[[Recipe], Recipe]:
    """The recipe that does not learn these groups."""

    def change(recipe: Recipe) -> Recipe:
        def cut(stage: Stage) -> Stage:
            kept = tuple((g, r) for g, r in stage.learn if g not in groups)
            return dataclasses.replace(stage, learn=kept)

        return dataclasses.replace(recipe, stages=tuple(map(cut, recipe.stages)))

    return change


def with_(**changes: Any) -> Callable[[Recipe], Recipe]:
    """The recipe with these settings."""
    return lambda recipe: dataclasses.replace(recipe, **changes)


def two_stages(learned: bool) -> Callable[[Recipe], Recipe]:
    """The first stage without unrotated activations, which then learn alone or are calibrated."""

    def change(recipe: Recipe) -> Recipe:
        first, *others = recipe.stages
        rest = tuple((g, r) for g, r in first.learn if g != "unrotated")
        share = first.share / 2 if learned else first.share
        rotated = dataclasses.replace(first, learn=rest, quantized="rotated", share=share)
        last = Stage(
            calibrate="unrotated",
            ranges="class",
            learn=(("unrotated", 0.01),) if learned else (),
            share=share,
        )
        return dataclasses.replace(recipe, stages=(rotated, last, *others))

    return change


def stage_before(recipe: Recipe) -> Recipe:
    """A tenth of the steps before GPTQ, in which all learns that 8-bit recipes do but weights."""
    if not any(stage.gptq for stage in recipe.stages):
        return recipe
    (before,) = without("rounding")(load_recipe("w8a8")).stages
    after = (dataclasses.replace(s, share=0.9 * s.share) for s in recipe.stages)
    return dataclasses.replace(recipe, stages=(dataclasses.replace(before, share=0.1), *after))


def loud(limit: float, copies: int) -> Callable[[Recipe], Recipe]:
    """The recipe that does this about the loud channels of `down`'s input."""
    return with_(peak_limit=limit, split_channels=copies)


ROWS: dict[str, Callable[[Recipe], Recipe]] = {
    FULL: lambda recipe: recipe,
    "no-learning": with_(stages=()),
    "no-prefix": with_(prefix="none"),
    "no-rotation": lambda r: with_(rotation="none")(without("rotation")(r)),
    "fixed-rotation": without("rotation"),
    "cayley-sgd": every_stage(rotation_optimizer="cayley_sgd"),
    "no-diagonal": without("diagonal"),
    "smooth-start": with_(smooth=0.5),
    "no-biases": without("biases"),
    "fixed-prefix": without("prefix"),
    "scales-only": without("rotation", "diagonal", "biases", "prefix", "rounding"),
    "paper-groups": without("diagonal", "biases", "prefix", "rounding"),
    "two-stages": two_stages(learned=True),
    "two-stages-calibrated": two_stages(learned=False),
    "ce": every_stage(loss="ce"),
    "top-1000": every_stage(top_k=1000),
    "hidden": every_stage(loss="hidden"),
    "kl+hidden": every_stage(hidden_mse=0.1),
    "warm-up": every_stage(warmup=0.25),
    "unmasked": every_stage(masked=False),
    "init-minmax": with_(activation_init="minmax"),
    "init-sigma": with_(activation_init="sigma"),
    "init-sigma-rotated": with_(activation_init="sigma-rotated"),
    "weights-minmax": with_(weight_init="minmax"),
    "weights-sigma": with_(weight_init="sigma"),
    "no-gptq": every_stage(gptq=False),
    "gptaq-quarter": every_stage(gptaq=0.25),
    "no-rounding": without("rounding"),
    "gptq-only": with_(stages=(Stage(gptq=True),)),
    "stage-before-gptq": stage_before,
    "loud-channels": loud(0.0, 0),
    "limit-4": loud(4.0, 0),
    "limit-2": loud(2.0, 0),
    "limit-1": loud(1.0, 0),
    "copies-64": loud(0.0, 64),
    "copies-128": loud(0.0, 128),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(no_simulator=True)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="one row, 2 windows: does it work?")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.windows, args.length = [FULL], 2, 256
        args.effort, args.steps = "none", None
    if args.steps is None and args.effort != "none":
        args.steps = STEPS
    return args


def variants(
    original: Recipe, rows: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, Recipe]]:
    """The full recipe of every seed, then the rows that change anything in it."""
    for seed in seeds:
        full = dataclasses.replace(original, seed=seed)
        yield FULL, full
        changed = ((row, ROWS[row](full)) for row in dict.fromkeys(rows))
        yield from ((row, recipe) for row, recipe in changed if recipe != full)


def jobs(args: argparse.Namespace, bench: Bench) -> list[Job]:
    original = load_recipe(args.recipe)
    original = quick(original) if args.quick else original
    made = []
    for row, recipe in variants(original, args.rows, args.seeds):
        name = f"{original.name} {row}" + (f" seed {recipe.seed}" if recipe.seed else "")
        made.append(recipe_job(args, bench, name, recipe, row=row))
    return made


def changes(rows: list[Row]) -> list[float | None]:
    """Percent of perplexity by which each row is worse than the full recipe of its seed.

    Infinite for a row that diverged, none where there is no full recipe to compare with.
    """

    def alike(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(k) for k in ("recipe", "effort", "steps", "seed"))

    full = {alike(r): perplexity(r) for r in rows if r.get("row") == FULL}
    bases = [full.get(alike(r), math.inf) if "row" in r else math.inf for r in rows]
    return [
        100 * (perplexity(row) / base - 1) if math.isfinite(base) else None
        for row, base in zip(rows, bases, strict=True)
    ]


def summary(rows: list[Row]) -> dict[str, list[float]]:
    """Changes against the full recipe by row, one per seed."""
    found: dict[str, list[float]] = {}
    for row, change in zip(rows, changes(rows), strict=True):
        if change is not None:
            found.setdefault(f"{row['recipe']} {row['row']}", []).append(change)
    return found


def show_summary(found: dict[str, list[float]]) -> None:
    """Mean and standard deviation over seeds, of the seeds that did not diverge."""
    print(f"\n{'against the full recipe':32}{'mean':>9}{'std':>9}{'seeds':>7}{'diverged':>10}")
    for name, values in found.items():
        finite = [v for v in values if math.isfinite(v)]
        mean = f"{np.mean(finite):+.2f}%" if finite else "diverged"
        std = f"{np.std(finite, ddof=1):.2f}%" if len(finite) > 1 else ""
        print(f"{name:32}{mean:>9}{std:>9}{len(values):7}{len(values) - len(finite):10}")


def divergences(rows: list[Row]) -> dict[str, float]:
    """Mean KL to the float model by row, over seeds (nats)."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if "row" in row and row.get("kl") is not None:
            found.setdefault(f"{row['recipe']} {row['row']}", []).append(row["kl"])
    return {name: float(np.mean(values)) for name, values in found.items()}


def verdict(rows: list[Row]) -> list[str]:
    """Returns a line for each row that beats the full recipe, which is short of the goal."""
    short = [
        f"{row['name']} diverged: nothing to compare with"
        for row in rows
        if row.get("row") == FULL and not math.isfinite(perplexity(row))
    ]
    means = {name: float(np.mean(values)) for name, values in summary(rows).items()}
    kl = divergences(rows)
    full = {row["recipe"]: kl.get(f"{row['recipe']} {FULL}", math.inf) for row in rows}
    recipe = {f"{row['recipe']} {row['row']}": row["recipe"] for row in rows if "row" in row}
    return short + [
        f"{name} beats the full recipe by {-mean:.2f}%"
        for name, mean in means.items()
        if mean < -BETTER and kl[name] <= full[recipe[name]]
    ]


def main() -> int:
    args = arguments()
    try:
        rows = kept_rows(args.json, jobs(args, load(args)))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    shown = [
        row if change is None or not math.isfinite(change) else row | {"vs full": f"{change:+.2f}%"}
        for row, change in zip(rows, changes(rows), strict=True)
    ]
    table(shown, (COLUMNS[0], "vs full", *COLUMNS[2:]))
    found = summary(rows)
    if any(len(values) > 1 for values in found.values()):
        show_summary(found)
    short = [] if args.quick else verdict(rows)
    print("".join(f"short of the goal: {s}\n" for s in short), end="")
    best = min(rows, key=perplexity)
    print(f"best row: {best['name']}, perplexity {perplexity(best):.2f} (fake-quant)")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
