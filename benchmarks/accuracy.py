"""Perplexity of quantized models: our recipes and published methods, in one harness.

Every method is a recipe in the same static graph, on the same text (see `protocol`). With --json,
rows already measured are not measured again, so that a table can be made in several commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from protocol import add_arguments, float_perplexity, load, measure, show

from qnpu_jax.config import UserError
from qnpu_jax.recipes import EFFORTS, RECIPES, load_recipe

FLOAT = {"smollm2-135m": (30.03, 0.05)}
"""Perplexity of the float model and tolerance, by the protocol."""
GOALS = {"w8a8": 30.7, "w8a16": 30.6, "w4a8": 36.0, "w4a16": 35.0}
SIMULATOR_TOLERANCE = 0.005
"""Relative, simulator against fake-quant: they round alike but for ties and kernel tables."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", default=[n for n in RECIPES if "-" not in n])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--quick", action="store_true", help="w8a8, 2 windows, nothing learned: does it work?"
    )
    args = parser.parse_args()
    if args.quick:
        args.recipes, args.windows, args.length, args.effort = ["w8a8"], 2, 256, "none"
    return args


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per recipe and seed, after the row of the float model."""
    bench, effort = load(args), EFFORTS[args.effort]
    if args.steps:
        effort = dataclasses.replace(effort, steps=args.steps)
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    known = {row["name"] for row in rows}
    jobs: list[tuple[str, Any]] = [("float", None)]
    for seed in args.seeds:
        suffix = f" seed {seed}" if seed else ""
        for recipe in map(load_recipe, args.recipes):
            recipe = dataclasses.replace(recipe, seed=seed)
            recipe = dataclasses.replace(recipe, prefix="none") if args.quick else recipe
            jobs.append((f"{recipe.name}{suffix}", recipe))
    for name, recipe in jobs:
        if name in known:
            continue
        if recipe is None:
            score = float_perplexity(bench, load_recipe(args.recipes[0]), args.batch)
            row: dict[str, Any] = {"recipe": "float", "fake_quant": score}
        else:
            row = measure(bench, recipe, effort, args.batch, not args.no_simulator)
        rows.append({"name": name, "effort": args.effort, **row})
        show(rows[-1])
        if args.json:
            args.json.write_text(json.dumps(rows) + "\n")
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    columns = ("fake_quant", "simulator", "kl", "top1", "seconds", "step_seconds")
    print(f"\n{'':24}" + "".join(f"{c:>13}" for c in columns))
    for row in rows:
        cells = [f"{row[c]:13.4g}" if row.get(c) is not None else " " * 13 for c in columns]
        print(f"{row['name']:24}" + "".join(cells))


def verdict(rows: list[dict[str, Any]], model: str) -> list[str]:
    """What falls short of the goals."""
    short = []
    original = next(r for r in rows if r["name"] == "float")["fake_quant"]
    if model in FLOAT and abs(original - FLOAT[model][0]) > FLOAT[model][1]:
        short.append(f"float {original:.2f}, expected {FLOAT[model][0]} +- {FLOAT[model][1]}")
    for row in rows:
        name, fake = row["recipe"], row["fake_quant"]
        score = row.get("simulator", fake)
        if name in GOALS and score > GOALS[name]:
            short.append(f"{row['name']} {score:.2f} > {GOALS[name]}")
        if abs(score / fake - 1) > SIMULATOR_TOLERANCE:
            short.append(f"{row['name']}: simulator {score:.2f} against fake-quant {fake:.2f}")
    return short


def main() -> int:
    args = arguments()
    try:
        rows = rows_of(args)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    table(rows)
    short = [] if args.quick else verdict(rows, args.model)
    print("".join(f"short of the goal: {s}\n" for s in short), end="")
    last = next((r for r in rows if r["recipe"] == "w8a8"), rows[-1])
    kind = "integer simulator" if "simulator" in last else "fake-quantized model"
    score = last.get("simulator", last["fake_quant"])
    print(
        f"{last['name']} on the {kind}: perplexity {score:.2f}, float {rows[0]['fake_quant']:.2f}"
    )
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
