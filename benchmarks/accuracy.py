"""Perplexity of float, fake-quantized and simulated model, per recipe, without learning.

Protocol: the text tokenized without special tokens, its first 65,536 tokens as 128 windows of 512,
mean negative log-likelihood of the 511 next tokens of each, exponentiated. Calibration on another
text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from qnpu_jax import corpus, evaluation, models, pipeline
from qnpu_jax.config import RECIPES, UserError, load_recipe
from sim.run import compile_model, run

FLOAT = {"smollm2-135m": (30.03, 0.05)}
"""Perplexity of the float model and tolerance, by the protocol."""
GOALS = {"w8a16": 30.6, "w8a8": 43.0}
SIMULATOR_TOLERANCE = 0.01
"""Relative, simulator against fake-quant: they round alike but for ties and kernel tables."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument(
        "--quick", action="store_true", help="w8a8, 2 windows, no prefix: does it work?"
    )
    return parser.parse_args()


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per recipe, after the row of the float model."""
    checkpoint = models.load(args.model)
    tokenizer, config = checkpoint.tokenizer, checkpoint.config

    def windows(path: Path, length: int, count: int) -> np.ndarray:
        ids = corpus.tokenize(corpus.read_text(path), tokenizer, config.vocab_size, str(path))
        return corpus.windows(ids, length, count, str(path))

    held_out = windows(args.text, args.length, args.windows)
    params, rotation = {}, None
    rows: list[dict[str, object]] = []
    for name in args.recipes:
        recipe = load_recipe(name)
        if args.quick:
            recipe = replace(recipe, calibration_tokens=1024, prefix="none")
        if rotation != (recipe.rotation, recipe.seed):
            rotation = (recipe.rotation, recipe.seed)
            params = pipeline.prepare(config, checkpoint.params, recipe)
        if not rows:
            logits = evaluation.float_logits(config, recipe.bits, params)
            rows.append(
                {"recipe": "float", "float": evaluation.perplexity(logits, held_out, args.batch)}
            )
            print(rows[-1], flush=True)
        length = recipe.calibration_length
        calibration = windows(args.calibration, length, recipe.calibration_tokens // length)
        rows.append(
            _row(recipe, config, params, calibration, held_out, tokenizer.bos_id, args.batch)
        )
        print(rows[-1], flush=True)
    return rows


def _row(recipe, config, params, calibration, held_out, bos, batch) -> dict[str, object]:
    start = time.perf_counter()
    quantized = pipeline.quantize(config, params, recipe, calibration, bos)
    model = quantized.model
    seconds = time.perf_counter() - start
    program = compile_model(model, model.decoder(held_out.shape[1]), "litert_ref")

    def simulate(ids: np.ndarray):
        return run(program, ids)["head.logits"]

    readings = {
        "float": evaluation.float_logits(config, recipe.bits, quantized.params),
        "fake_quant": evaluation.fake_quant_logits(model),
        "simulator": evaluation.integer_logits(model, simulate),
    }
    scores = {k: evaluation.perplexity(v, held_out, batch) for k, v in readings.items()}
    return {
        "recipe": recipe.name,
        **scores,
        "prefix": list(model.prefix),
        "seconds": round(seconds, 1),
    }


def verdict(rows: list[dict[str, object]], model: str) -> list[str]:
    """What falls short of the goals."""
    short = []
    if model in FLOAT and abs(rows[0]["float"] - FLOAT[model][0]) > FLOAT[model][1]:
        short.append(
            f"float {rows[0]['float']:.2f}, expected {FLOAT[model][0]} +- {FLOAT[model][1]}"
        )
    for row in rows[1:]:
        name, fake, simulated = row["recipe"], row["fake_quant"], row["simulator"]
        if name in GOALS and simulated > GOALS[name]:
            short.append(f"{name} {simulated:.2f} > {GOALS[name]}")
        if abs(simulated / fake - 1) > SIMULATOR_TOLERANCE:
            short.append(f"{name}: simulator {simulated:.2f} against fake-quant {fake:.2f}")
    return short


def main() -> int:
    args = arguments()
    if args.quick:
        args.recipes, args.windows, args.length = ["w8a8"], 2, 256
    try:
        with jax.default_matmul_precision("highest"):
            rows = measure(args)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{'recipe':8} {'float+prefix':>12} {'fake-quant':>11} {'simulator':>10} {'sim/fq':>8}")
    for row in rows[1:]:
        ratio = row["simulator"] / row["fake_quant"]
        print(
            f"{row['recipe']:8} {row['float']:12.2f} {row['fake_quant']:11.2f}"
            f" {row['simulator']:10.2f} {ratio:8.4f}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"device": str(jax.devices()[0]), "rows": rows}, indent=1) + "\n"
        )
    short = [] if args.quick else verdict(rows, args.model)
    last = rows[-1] if args.quick else next((r for r in rows if r["recipe"] == "w8a8"), rows[-1])
    print("".join(f"short of the goal: {s}\n" for s in short), end="")
    print(
        f"{last['recipe']} on the integer simulator: perplexity {last['simulator']:.2f}, float"
        f" {rows[0]['float']:.2f}"
    )
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
