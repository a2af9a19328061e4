"""Perplexity of quantized models: our recipes and published methods, in one harness.

Every method is a recipe in the same static graph, on the same text (see `protocol`). With --json,
rows already measured are not measured again, so that a table can be made in several commands. A
method that diverges is a row of the table.

Exit status: 0 if the float model has its known perplexity, our recipes reach the goals of KNOWN on
every text, the simulator agrees with fake-quant, and with --check no element differs from LiteRT's;
else 1; 2 if it could not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

import outcome
from protocol import MAIN, Bench, add_arguments, float_job, load, quick, recipe_job
from rows import Job, Row, finite, kept_rows, perplexity, table

from qnpu_jax.recipes import RECIPES, load_recipe


class Known(NamedTuple):
    """What is known of a model, which may come by any path.

    Attributes:
      windows: of the protocol's 512 tokens.
      perplexity: of the original float model on them.
      goals: by recipe: most perplexity of the simulator, as a ratio to float's, and most KL to
        float (nats).
    """

    windows: int
    perplexity: float
    goals: Mapping[str, tuple[float, float]]


KNOWN = {
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53": Known(
        128,
        30.03,
        {
            "w8a8": (1.009, 0.047),
            "w8a16": (1.019, math.inf),
            "w4a8": (1.129, 0.19),
            "w4a16": (1.165, math.inf),
        },
    ),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32": Known(
        48, 43.76, {"w8a8": (1.01, 0.05), "w4a8": (1.13, 0.19)}
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818": Known(
        48, 22.23, {"w8a8": (1.02, 0.06), "w4a8": (1.15, 0.25)}
    ),
}
"""By the SHA-256 of the weights: SmolLM2-135M, Qwen2.5-Coder-0.5B, Gemma 3 270M."""
FLOAT_TOLERANCE = 0.05
"""Of the float perplexity: another BOS or other windows change it by more, another machine's sums
by less."""
OURS = [name for name in RECIPES if "-" not in name]
SIMULATOR_TOLERANCE = 0.005
"""Relative, simulator against fake-quant, of our recipes: they round alike but for ties and kernel
tables. Where a model is destroyed, as by most published methods here, one code changes all."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--recipes", nargs="+", default=OURS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--quick", action="store_true", help="w8a8, 2 windows, nothing learned: does it work?"
    )
    args = parser.parse_args()
    if args.quick:
        args.recipes, args.windows, args.length = ["w8a8"], 2, 256
        args.effort, args.steps = "none", None
    return args


def jobs(args: argparse.Namespace, bench: Bench) -> list[Job]:
    """The float model, then every recipe by seed."""
    recipes = list(map(load_recipe, args.recipes))
    made = [float_job(args, bench, recipes[0])]
    for seed in args.seeds:
        suffix = f" seed {seed}" if seed else ""
        for recipe in recipes:
            recipe = dataclasses.replace(recipe, seed=seed)
            recipe = quick(recipe) if args.quick else recipe
            made.append(recipe_job(args, bench, recipe.name + suffix, recipe))
    return made


def verdict(rows: list[Row], known: Known | None) -> list[str]:
    """Returns a line for each goal that is missed, on any text."""
    short = []
    original = perplexity(next(r for r in rows if r["name"] == "float"))
    if known and not abs(original - known.perplexity) <= FLOAT_TOLERANCE:
        short.append(f"float {original:.2f}, expected {known.perplexity} +- {FLOAT_TOLERANCE}")
    for row in rows:
        name, fake = row["recipe"], perplexity(row)
        score = perplexity(row, "simulator") if "simulator" in row else fake
        if known and name in known.goals:
            most, most_kl = known.goals[name]
            texts = {MAIN: (original, score), **row.get("others", {})}
            ratios = {text: finite(quantized) / base for text, (base, quantized) in texts.items()}
            short += [
                f"{row['name']} on {text}: {ratio:.3f} of float > {most}"
                for text, ratio in ratios.items()
                if not ratio <= most
            ]
            kl = finite(row.get("kl"))
            if not kl <= most_kl:
                short.append(f"{row['name']}: KL {kl:.4f} > {most_kl}")
        if differing := row.get("verify", {}).get("differing"):
            short.append(f"{row['name']}: {differing:,} elements differ from LiteRT's")
        apart = abs(score / fake - 1) if math.isfinite(fake) else 0.0
        if name in OURS and not apart <= SIMULATOR_TOLERANCE:
            short.append(f"{row['name']}: simulator {score:.2f} against fake-quant {fake:.2f}")
    return short


def main() -> int:
    args = arguments()
    return outcome.status(lambda: measured(args))


def measured(args: argparse.Namespace) -> int:
    bench = load(args)
    rows = kept_rows(args.json, jobs(args, bench))
    table(rows)
    known = KNOWN.get(bench.checkpoint.sha256)
    if known and (args.windows, args.length) != (known.windows, 512):
        known = None
    short = [] if args.quick else verdict(rows, known)
    print("".join(f"short of the goal: {s}\n" for s in short), end="")
    if not args.quick and known is None:
        print("float perplexity and goals not checked: none known for this model and these windows")
    last = next((r for r in rows if r["recipe"] == "w8a8"), rows[-1])
    simulated = "simulator" in last
    kind = "integer simulator" if simulated else "fake-quantized model"
    score = perplexity(last, "simulator" if simulated else "fake_quant")
    original = perplexity(next(r for r in rows if r["name"] == "float"))
    print(f"{last['name']} on the {kind}: perplexity {score:.2f}, float {original:.2f}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
