"""Zero-shot accuracy of a model: float, and fake-quantized and simulated from an output folder.

Protocol: `qnpu_jax.measure.tasks` on every *.jsonl of a folder, all items, 0 examples in the
prompt, no system prompt or chat template. Headline: the mean over tasks of acc_norm (of a last
word: exact match), and its ratio to the float model's, which runs without prefix and, as such
figures are published, without BOS.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.config import bit_plan
from qnpu_jax.errors import UserError
from qnpu_jax.integer import storage
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.measure import task_files, tasks
from qnpu_jax.measure.perplexity import Logits, fake_quant_logits, float_logits, integer_logits
from qnpu_jax.models.checkpoint import Checkpoint, load
from qnpu_jax.transform.fold import fold_norms
from qnpu_sim.program import compile_model, run

GOALS = {8: 0.99, 4: 0.95}
"""Least ratio of the simulator's mean accuracy to float's, by the bits of the narrowest weights."""
QUICK = {"limit": 1, "lengths": (96, 256), "batch_tokens": 4 * 96}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=Path, required=True, help="folder of *.jsonl files")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--folder", type=Path, help="output folder of `qnpu quantize`")
    which.add_argument("--float", action="store_true", help="the float model alone")
    parser.add_argument("--model", default="smollm2-135m", help="the float model")
    parser.add_argument(
        "--float-rows", type=Path, metavar="FILE", help="an earlier --json, whose float is taken"
    )
    parser.add_argument("--no-fake-quant", action="store_true", help="float and simulator only")
    parser.add_argument("--only", nargs="+", help="names of tasks; default all of the folder")
    parser.add_argument("--limit", type=int, help="items per task; default all")
    parser.add_argument("--batch-tokens", type=int, help="tokens per call of the model")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument(
        "--quick", action="store_true", help="1 item per task, two lengths: does it work?"
    )
    args = parser.parse_args()
    args.lengths = tasks.LENGTHS
    if args.json and not args.json.parent.is_dir():  # not after an hour
        parser.error(f"argument --json: no folder {args.json.parent}")
    if args.limit is not None and args.limit < 1:
        parser.error("argument --limit: expected at least 1")
    if args.batch_tokens is None:
        args.batch_tokens = tasks.BATCH_TOKENS if jax.default_backend() == "cpu" else 16384
    if args.quick:
        vars(args).update(QUICK)
    return args


def simulated(model: IntegerModel) -> Logits:
    """The integer simulator at any length: a program per length, made when it first comes."""

    @functools.cache
    def program(length: int) -> Any:
        return compile_model(model, model.decoder(length), "litert_ref")

    def codes(ids: np.ndarray) -> Any:
        return run(program(ids.shape[-1]), ids)["head.logits"]

    return integer_logits(model, codes)


def recipe_name(folder: Path, checkpoint: Checkpoint) -> str:
    """The recipe of an output folder, once it is sure that this checkpoint made it."""
    path = folder / "recipe.json"
    try:
        settings = json.loads(path.read_text())
        name = str(settings["recipe"]["name"])
        made_from = settings["inputs"].get("model", {}).get("sha256", checkpoint.sha256)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged ({error!r}); expected what `qnpu quantize` writes; run it again"
        ) from None
    if made_from != checkpoint.sha256:
        raise UserError(
            f"{path}: made from a model of SHA-256 {made_from[:12]}...; got {checkpoint.source}"
            f" ({checkpoint.sha256[:12]}...); name its model with --model"
        )
    return name


def narrowest_weights(model: IntegerModel) -> int:
    specs = [t for t in model.decoder(1).layer.named("param") if t.name.endswith(".weight")]
    return min(bits for t in specs for bits in t.quant.bits)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Results by reading, with what they were measured on."""
    checkpoint = load(args.model)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    found = task_files.read_folder(args.tasks, args.limit)
    if args.only and (unknown := set(args.only) - {task.name for task in found}):
        raise UserError(
            f"--only: {sorted(unknown)} not in {args.tasks}; expected some of"
            f" {[task.name for task in found]}; correct the name"
        )
    found = [task for task in found if not args.only or task.name in args.only]
    about: dict[str, Any] = {"model": checkpoint.source, "recipe": None, "goal": None}
    about["measured_on"] = measured_on(args, checkpoint)
    rows: list[dict[str, Any]] = []
    readings: dict[str, Logits] = {}
    if args.float_rows:
        rows += earlier_float(args.float_rows, about["measured_on"], [t.name for t in found])
    else:
        params = jax.device_put(fold_norms(config, dict(checkpoint.params)))
        readings["float"] = float_logits(config, bit_plan(8, 8), params)
    if args.folder:
        about["recipe"] = recipe_name(args.folder, checkpoint)
        model = storage.load(args.folder)
        about["goal"] = GOALS[8 if narrowest_weights(model) >= 8 else 4]
        if not args.no_fake_quant:
            readings["fake-quant"] = fake_quant_logits(model)
        readings["simulator"] = simulated(model)
    print(
        f"{'reading':10} {'task':14} {'items':>5} {'acc':>7} {'acc_norm':>8} {'stderr':>6}"
        f" {'perplexity':>10} {'seconds':>8}"
    )
    for name, logits in readings.items():
        bos = tokenizer.bos_id if tokenizer.adds_bos and name == "float" else None
        scoring = tasks.Scoring(bos, args.lengths, args.batch_tokens)
        for task in found:
            start = time.perf_counter()
            (result,) = tasks.score(logits, [task], tokenizer, config.vocab_size, scoring)
            rows.append(_row(name, result, time.perf_counter() - start))
    return {**about, "rows": rows}


def measured_on(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Names all that float rows depend on: the model, the tasks' files, and how many items."""
    files = {path.name: artifacts.digest(path) for path in sorted(args.tasks.glob("*.jsonl"))}
    return {"model": checkpoint.sha256, "tasks": files, "limit": args.limit}


def earlier_float(path: Path, expected: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The float rows of an earlier report.

    Raises:
      UserError: no report, or one of another model, other files of tasks, or other items.
    """
    try:
        report = json.loads(path.read_text())
        rows = {row["task"]: row for row in report["rows"] if row["reading"] == "float"}
        found = report["measured_on"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no report of this benchmark ({error!r}); expected what an earlier run wrote"
            " by --json; leave --float-rows out"
        ) from None
    if found != expected or any(name not in rows for name in names):
        raise UserError(
            f"{path}: float rows of {sorted(rows)} on {found}; expected {names} on {expected};"
            " leave --float-rows out"
        )
    return [rows[name] for name in names]


def _row(reading: str, result: tasks.TaskResult, seconds: float) -> dict[str, Any]:
    """Prints a line of the table, and returns it as data."""
    norm = "" if result.acc_norm is None else f"{100 * result.acc_norm:.2f}"
    perplexity = "" if result.perplexity is None else f"{result.perplexity:.2f}"
    print(
        f"{reading:10} {result.name:14} {result.items:5} {100 * result.acc:7.2f} {norm:>8}"
        f" {100 * result.stderr:6.2f} {perplexity:>10} {seconds:8.1f}",
        flush=True,
    )
    return {
        "reading": reading,
        "task": result.name,
        "items": result.items,
        "acc": result.acc,
        "acc_norm": result.acc_norm,
        "headline": result.headline,
        "stderr": result.stderr,
        "perplexity": result.perplexity,
        "seconds": round(seconds, 1),
        "correct": "".join("01"[c] for c in result.correct),
    }


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per reading: mean accuracy, its ratio to float, and the standard error of their difference.

    The difference is taken item by item: two readings of one model mostly answer alike, so it is
    known better than either accuracy.
    """
    by_reading: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_reading.setdefault(row["reading"], []).append(row)
    out = {}
    for name, own in by_reading.items():
        out[name] = {"mean": float(np.mean([row["headline"] for row in own]))}
        pairs = [_bits(a) - _bits(b) for a, b in zip(own, by_reading["float"], strict=True)]
        variance = [np.var(d) / max(len(d) - 1, 1) for d in pairs]
        out[name] |= {
            "ratio": out[name]["mean"] / max(out["float"]["mean"], 1e-9),
            "difference_stderr": float(np.sqrt(np.sum(variance))) / len(pairs),
        }
    return out


def _bits(row: dict[str, Any]) -> np.ndarray:
    return np.array([int(c) for c in row["correct"]])


def main() -> int:
    args = arguments()
    try:
        with jax.default_matmul_precision("highest"):
            report = measure(args)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    report["means"] = means(report["rows"])
    if args.json:
        report["device"] = str(jax.devices()[0])
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return conclude(report, args.quick)


def conclude(report: dict[str, Any], quick: bool) -> int:
    """Prints the headline figure last; returns the exit status."""
    print()
    for name, mean in report["means"].items():
        ratio = ""
        if name != "float":
            relative = mean["difference_stderr"] / max(report["means"]["float"]["mean"], 1e-9)
            ratio = f", {100 * mean['ratio']:.1f}% of float (+- {100 * relative:.1f})"
        print(
            f"{report['recipe'] or 'model'} {name}: mean accuracy {100 * mean['mean']:.2f}{ratio}"
        )
    simulator = report["means"].get("simulator")
    if quick or simulator is None or simulator["ratio"] >= report["goal"]:
        return 0
    print(f"short of the goal: {simulator['ratio']:.4f} of float, at least {report['goal']} wanted")
    return 1


if __name__ == "__main__":
    sys.exit(main())
