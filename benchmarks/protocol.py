"""What the accuracy benchmarks share: the texts, the readings of a model, one measured row.

Perplexity: the text tokenized without special tokens, its first 65,536 tokens as 128 windows of
512, mean negative log-likelihood of the 511 next tokens of each, exponentiated. Calibration and
learning on another text; the held-out text that decides which step is kept is a third (Python's
documentation).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qnpu_jax import corpus, evaluation, models, pipeline
from qnpu_jax.learn.stages import Text
from qnpu_jax.recipes import EFFORTS, Effort, Recipe
from sim.run import compile_model, run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--calibration", type=Path, required=True, help="to calibrate and learn on")
    parser.add_argument("--effort", choices=list(EFFORTS), default="full")
    parser.add_argument("--steps", type=int, help="in place of the effort's")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--no-simulator", action="store_true", help="fake-quant only")
    parser.add_argument("--json", type=Path, help="rows are kept here, and not measured again")


@dataclass(frozen=True)
class Bench:
    """A model and its texts."""

    checkpoint: models.Checkpoint
    held_out: np.ndarray
    calibration: Path

    def windows(self, path: Path | None, length: int, tokens: int) -> np.ndarray:
        """Of a file, by default of Python's documentation."""
        texts = [corpus.default_text()] if path is None else corpus.read_text(path)
        tokenizer, size = self.checkpoint.tokenizer, self.checkpoint.config.vocab_size
        ids = corpus.tokenize(texts, tokenizer, size, str(path))
        return corpus.windows(ids, length, max(1, tokens // length), str(path))

    def text(self, recipe: Recipe, effort: Effort) -> Text:
        calibration = self.windows(
            self.calibration, recipe.calibration_length, recipe.calibration_tokens
        )
        if not effort.steps:
            return Text.of(calibration)
        learning = self.windows(self.calibration, effort.length, effort.tokens)
        held_out = self.windows(None, effort.length, effort.held_out * effort.length)
        return Text(calibration, learning, held_out)


def load(args: argparse.Namespace) -> Bench:
    bench = Bench(models.load(args.model), np.zeros(0), args.calibration)
    held_out = bench.windows(args.text, args.length, args.windows * args.length)
    return Bench(bench.checkpoint, held_out, args.calibration)


def measure(
    bench: Bench, recipe: Recipe, effort: Effort, batch: int, simulate: bool
) -> dict[str, Any]:
    """Quantizes by a recipe; perplexities, KL and top-1 agreement, and how learning went."""
    config, tokenizer = bench.checkpoint.config, bench.checkpoint.tokenizer
    start = time.perf_counter()
    params = pipeline.prepare(config, bench.checkpoint.params, recipe)
    text = bench.text(recipe, effort)
    marks: list[tuple[int, int, float]] = []

    def report(stage: int, step: int, steps: int, loss: float, kl: float) -> None:
        marks.append((stage, step, time.perf_counter()))
        if step == 1 or step % 50 == 0:
            print(
                f"  stage {stage} step {step}/{steps} loss {loss:.4f} held-out {kl:.4f}", flush=True
            )

    made = pipeline.quantize(config, params, recipe, text, tokenizer.bos_id, effort, report=report)
    seconds = time.perf_counter() - start
    with jax.default_matmul_precision("highest"):
        scores = _scores(bench, recipe, made, batch, simulate)
    steps = [b[2] - a[2] for a, b in pairwise(marks) if a[0] == b[0]]
    return {
        "recipe": recipe.name,
        **scores,
        "prefix": list(made.model.prefix),
        "seconds": round(seconds, 1),
        "step_seconds": round(float(np.median(steps)), 4) if steps else None,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "held_out_kl": [h.held_out for h in made.histories],
        "loss": [[round(x, 5) for x in h.loss] for h in made.histories],
        "device": str(jax.devices()[0]),
    }


def _scores(
    bench: Bench, recipe: Recipe, made: pipeline.Quantized, batch: int, simulate: bool
) -> dict[str, Any]:
    config, model = bench.checkpoint.config, made.model
    readings = {"fake_quant": evaluation.fake_quant_logits(model)}
    if simulate:
        program = compile_model(model, model.decoder(bench.held_out.shape[1]), "litert_ref")
        codes = lambda ids: run(program, ids)["head.logits"]  # noqa: E731
        readings["simulator"] = evaluation.integer_logits(model, codes)
    scores: dict[str, Any] = {
        name: evaluation.perplexity(logits, bench.held_out, batch)
        for name, logits in readings.items()
    }
    last = list(readings.values())[-1]
    original = evaluation.float_logits(config, recipe.bits, made.reference)
    found = evaluation.divergence(original, last, bench.held_out, batch)
    return {**scores, "kl": found.kl, "top1": found.top1}


def show(row: dict[str, Any]) -> None:
    """A row as it comes, without its curves."""
    print({k: v for k, v in row.items() if k not in ("loss", "held_out_kl")}, flush=True)


def float_perplexity(bench: Bench, recipe: Recipe, batch: int) -> float:
    """Of the float model, without a prefix."""
    params = pipeline.prepare(bench.checkpoint.config, bench.checkpoint.params, recipe)
    logits = evaluation.float_logits(bench.checkpoint.config, recipe.bits, params)
    with jax.default_matmul_precision("highest"):
        return evaluation.perplexity(logits, bench.held_out, batch)
