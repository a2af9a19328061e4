"""What each part of a recipe is worth: the recipe with one part changed, everything else equal.

`python benchmarks/ablation.py --rows no-prefix ce ...`; without --rows, all. Fewer steps than
`accuracy.py` by default: rows are compared with each other, in one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from accuracy import table
from protocol import add_arguments, load, measure, show

from qnpu_jax.config import UserError
from qnpu_jax.recipes import EFFORTS, Recipe, Stage, load_recipe


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


ROWS: dict[str, Callable[[Recipe], Recipe]] = {
    "full recipe": lambda recipe: recipe,
    "no-learning": with_(stages=()),
    "no-prefix": with_(prefix="none"),
    "no-rotation": lambda r: with_(rotation="none")(without("rotation")(r)),
    "fixed-rotation": without("rotation"),
    "cayley-sgd": every_stage(rotation_optimizer="cayley_sgd"),
    "no-diagonal": without("diagonal"),
    "smooth-start": with_(smooth=0.5),
    "no-biases": without("biases"),
    "fixed-prefix": without("prefix"),
    "scales-only": without("rotation", "diagonal", "biases", "prefix"),
    "paper-groups": without("diagonal", "biases", "prefix"),
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
    "no-rounding": without("rounding"),
    "gptq-only": with_(stages=(Stage(gptq=True),)),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(no_simulator=True, steps=150)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--quick", action="store_true", help="one row, 2 windows: does it work?")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.windows, args.length, args.effort = ["no-learning"], 2, 256, "none"
        args.steps = None
    return args


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    bench, effort = load(args), EFFORTS[args.effort]
    if args.steps:
        effort = dataclasses.replace(effort, steps=args.steps)
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    known = {row["name"] for row in rows}
    original = load_recipe(args.recipe)
    for seed in args.seeds:
        for row in args.rows:
            recipe = ROWS[row](dataclasses.replace(original, seed=seed))
            recipe = dataclasses.replace(recipe, prefix="none") if args.quick else recipe
            name = f"{original.name} {row}" + (f" seed {seed}" if seed else "")
            if name in known or (row != "full recipe" and recipe == ROWS["full recipe"](original)):
                continue
            try:
                found = measure(bench, recipe, effort, args.batch, not args.no_simulator)
            except UserError as error:  # a part without which learning diverges is a result too
                found = {"recipe": recipe.name, "fake_quant": float("inf"), "error": str(error)}
            rows.append({"name": name, "effort": args.effort, "steps": effort.steps, **found})
            show(rows[-1])
            if args.json:
                args.json.write_text(json.dumps(rows) + "\n")
    return rows


def main() -> int:
    args = arguments()
    try:
        rows = rows_of(args)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    table(rows)
    best = min(rows, key=lambda r: r["fake_quant"])
    print(f"best row: {best['name']}, perplexity {best['fake_quant']:.2f} (fake-quant)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
