"""Protocol of the accuracy benchmarks: texts, and readings of a model.

Perplexity: the text tokenized without special tokens, its first 65,536 tokens as 128 windows of
512, mean negative log-likelihood of the 511 next tokens of each, exponentiated. Calibration and
learning on other texts; which step is kept is decided by the ends of those, which are not learned
from, and by a further one (Python's documentation).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise, zip_longest
from pathlib import Path

import jax
import numpy as np
from rows import Job, Row

from qnpu_jax import pipeline
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params
from qnpu_jax.measure import perplexity as measure_perplexity
from qnpu_jax.measure.perplexity import compare, fake_quant_logits, float_logits, integer_logits
from qnpu_jax.models import checkpoint as models_checkpoint
from qnpu_jax.models.checkpoint import Checkpoint
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import EFFORTS, Effort, Recipe
from qnpu_jax.text import excerpts, files, self_written
from qnpu_jax.text.starts import starts_of
from qnpu_jax.text.windows import Windows, cut
from qnpu_jax.transform.prefix import add_prefix
from qnpu_sim.program import compile_model, run

MOST = 2**31 - 1
"""Of tokens and windows on the command line."""
MAIN = "text"
"""Name of the scored text beside those of --others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], help="texts to score too, float and quantized"
    )
    parser.add_argument(
        "--calibration", type=Path, nargs="+", required=True,
        help="to calibrate and learn on; of several texts, windows in turn while each lasts",
    )  # fmt: skip
    parser.add_argument(
        "--own", type=count_from(0), default=0, metavar="TOKENS",
        help="written by the model itself, to calibrate and learn on too",
    )  # fmt: skip
    parser.add_argument("--effort", choices=list(EFFORTS), default="full")
    parser.add_argument("--steps", type=int, help="in place of the effort's")
    parser.add_argument("--windows", type=count_from(1), default=128)
    parser.add_argument("--length", type=count_from(2), default=512)
    parser.add_argument("--batch", type=count_from(1), default=4)
    parser.add_argument("--no-simulator", action="store_true", help="fake-quant only")
    parser.add_argument(
        "--check", action="store_true",
        help="write each model, compare every tensor with LiteRT's, and let it answer three chats",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="rows are kept here, and not measured again")


def count_from(least: int) -> Callable[[str], int]:
    """An option's type: whole numbers from `least` to MOST."""

    def count(text: str) -> int:
        value = int(text)
        if not least <= value <= MOST:
            raise argparse.ArgumentTypeError(f"expected {least} to {MOST}; got {text}")
        return value

    return count


def effort_of(args: argparse.Namespace) -> Effort:
    effort = EFFORTS[args.effort]
    if args.steps is None:
        return effort
    if args.steps < 1 or not effort.steps:
        raise UserError(
            f"--steps: expected at least 1, with an effort that learns; got {args.steps} with"
            f" {effort.name}; take --effort none alone, or --steps with --effort fast or full"
        )
    return dataclasses.replace(effort, steps=args.steps)


def quick(recipe: Recipe) -> Recipe:
    """The recipe without what takes longest, for --quick."""
    return dataclasses.replace(recipe, prefix="none", calibration_tokens=1024)


@dataclass(frozen=True)
class Bench:
    """A model and its texts.

    Attributes:
      held_out: windows (N, T) of the text that is scored.
      calibration: token ids of each text to calibrate and learn on, by its file's name.
      own: tokens that the model writes itself, a further such text.
      others: windows of texts that are scored too, by name.
    """

    checkpoint: Checkpoint
    held_out: np.ndarray
    calibration: Mapping[str, list[int]]
    own: int = 0
    others: Mapping[str, np.ndarray] = field(default_factory=dict)

    def text(self, params: Params, recipe: Recipe, effort: Effort) -> Windows:
        """All windows of a run; `params` write the model's own text."""
        effort_if_any = effort if effort.steps else None
        texts = dict(self.calibration)
        if self.own:
            writer = self_written.Writer(self.checkpoint.config, recipe.bits, params)
            tokens = self.own + effort.held_out * effort.length
            rows = self_written.calibration_windows(
                writer, self.checkpoint.tokenizer, tokens, effort.length, recipe.seed
            )
            texts["--own"] = rows.reshape(-1).tolist()
        held_out, other = excerpts.judged(self.checkpoint, effort_if_any)
        judges = {excerpts.DOCUMENTATION: held_out.windows} if held_out else {}
        for name, ids in texts.items() if held_out else ():
            count = excerpts.end_windows(len(ids), recipe.calibration_length, effort)
            if count:
                begin = len(ids) - count * effort.length
                judges[f"end of {name}"] = cut(ids[begin:], effort.length, count, name)
                texts[name] = ids[:begin]
        tokens = max(recipe.calibration_tokens, recipe.pool_tokens())
        read = in_turn(texts, recipe.calibration_length, tokens)
        calibrating = read[: max(1, recipe.calibration_tokens // recipe.calibration_length)]
        windows = Windows.of(calibrating, other.windows)
        if judges:
            learning = in_turn(texts, effort.length, effort.tokens)
            windows = Windows.learned(calibrating, learning, judges, other.windows)
        return dataclasses.replace(windows, pool=read) if len(read) > len(calibrating) else windows


def in_turn(texts: Mapping[str, list[int]], length: int, tokens: int) -> np.ndarray:
    """Cuts texts into windows: one of each in turn while each lasts, `tokens` tokens in all.

    >>> in_turn({"a": [1, 2, 3], "b": [7]}, 1, 3).ravel().tolist()
    [1, 7, 2]
    """
    windows = [cut(ids, length, len(ids), name) for name, ids in texts.items()]
    turns = chain.from_iterable(zip_longest(*windows))
    count = max(1, tokens // length)
    return np.stack([window for window in turns if window is not None][:count])


def load(args: argparse.Namespace) -> Bench:
    """Reads the model and all texts, so that a text of no use is refused before the work."""
    checkpoint, effort = models_checkpoint.load(args.model), effort_of(args)

    def ids(path: Path) -> list[int]:
        size = checkpoint.config.vocab_size
        return files.tokenize(files.read_text(path), checkpoint.tokenizer, size, str(path))

    def windows(path: Path) -> np.ndarray:
        return cut(ids(path), args.length, args.windows, str(path))

    names = [path.stem for path in args.others]
    if len({*names, MAIN}) <= len(names):
        raise UserError(
            f"--others: files named {', '.join(names)}; expected different names, none of them"
            f" {MAIN}; rename one"
        )
    calibration = {path.name: ids(path) for path in args.calibration}
    if len(calibration) < len(args.calibration):
        raise UserError(
            f"--calibration: files named {', '.join(p.name for p in args.calibration)}; expected"
            " different names, by which rows tell them apart; rename one"
        )
    if effort.steps:
        in_turn(calibration, effort.length, effort.length)
    others = {path.stem: windows(path) for path in args.others}
    return Bench(checkpoint, windows(args.text), calibration, args.own, others)


class Watch(Observer):
    """Prints every fiftieth step.

    Attributes:
      marks: stage, step and time (s) of each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[int, int, float]] = []

    def learned(self, stage: int, step: int, steps: int, loss: float, held_out: float) -> None:
        self.marks.append((stage, step, time.perf_counter()))
        if step == 1 or step % 50 == 0:
            line = f"  stage {stage} step {step}/{steps} loss {loss:.4f} held-out {held_out:.4f}"
            print(line, flush=True)

    def say(self, message: str) -> None:
        print(f"  {message}", flush=True)


Check = Callable[[Bench, pipeline.Quantized], Row]
"""Further readings of a quantized model."""


def measure(
    bench: Bench,
    recipe: Recipe,
    effort: Effort,
    batch: int,
    simulate: bool,
    check: Check | None = None,
) -> Row:
    """Quantizes by a recipe; perplexities, KL and top-1 agreement, and how learning went.

    A recipe that diverges is a result too: a row with `error` and no readings, or, where it
    does not at lower rates (`learn.stages.slowed`), with `retreats`.
    """
    config, tokenizer = bench.checkpoint.config, bench.checkpoint.tokenizer
    start = time.perf_counter()
    params = pipeline.prepare(config, bench.checkpoint.params, recipe)
    text = bench.text(params, recipe, effort)
    watch = Watch()
    try:  # around this alone: any other mistake of the user ends the run
        made = pipeline.quantize(
            config, params, recipe, text, starts_of(tokenizer), effort=effort, watch=watch
        )
    except UserError as error:
        return {"recipe": recipe.name, "fake_quant": None, "error": str(error)}
    seconds = time.perf_counter() - start
    with jax.default_matmul_precision("highest"):
        scores = _scores(bench, recipe, made, batch, simulate)
    steps = [b[2] - a[2] for a, b in pairwise(watch.marks) if a[0] == b[0]]
    return {
        "recipe": recipe.name,
        **scores,
        **(check(bench, made) if check else {}),
        "retreats": [h.retreats for h in made.histories],
        "prefix": list(made.model.prefix),
        "trials": dataclasses.asdict(made.prefix)["trials"] if made.prefix else None,
        "seconds": round(seconds, 1),
        "step_seconds": round(float(np.median(steps)), 4) if steps else None,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "held_out_kl": [h.held_out for h in made.histories],
        "domains": [h.domains for h in made.histories],
        "loss": [[round(x, 5) for x in h.loss] for h in made.histories],
        "device": str(jax.devices()[0]),
    }


def _scores(
    bench: Bench, recipe: Recipe, made: pipeline.Quantized, batch: int, simulate: bool
) -> Row:
    model = made.model
    original = float_logits(model.config, recipe.bits, made.reference)
    fake_quant = fake_quant_logits(model)
    if simulate:
        program = compile_model(model, model.decoder(bench.held_out.shape[1]), "litert_ref")
        last = integer_logits(model, lambda ids: run(program, ids)["head.logits"])
    else:
        last = fake_quant
    texts = {MAIN: bench.held_out, **bench.others}
    found = {name: compare(original, last, windows, batch) for name, windows in texts.items()}
    main = found.pop(MAIN)
    if simulate:
        gap = compare(fake_quant, last, bench.held_out, batch)
        readings = {
            "fake_quant": gap.reference,
            "simulator": gap.other,
            "gap_stderr": gap.stderr,
            "gap_kl": gap.divergence.kl,
        }
    else:
        readings = {"fake_quant": main.other}
    return {
        **readings,
        "kl": main.divergence.kl,
        "top1": main.divergence.top1,
        "others": {name: [x.reference, x.other] for name, x in found.items()},
        "others_kl": {name: x.divergence.kl for name, x in found.items()},
        "others_top1": {name: x.divergence.top1 for name, x in found.items()},
    }


def float_perplexity(bench: Bench, recipe: Recipe, batch: int) -> float:
    """Perplexity of the original float model: no prefix but its own BOS."""
    config, starts = bench.checkpoint.config, starts_of(bench.checkpoint.tokenizer)
    params = pipeline.prepare(config, bench.checkpoint.params, recipe)
    params = add_prefix(config, recipe.bits, params, starts.bos)
    logits = float_logits(config, recipe.bits, params)
    with jax.default_matmul_precision("highest"):
        return measure_perplexity.perplexity(logits, bench.held_out, batch)


def settings_of(args: argparse.Namespace, bench: Bench) -> Row:
    """The settings that all rows share."""
    return {
        "model": bench.checkpoint.sha256[:12],
        "text": files.digest(args.text)[:12],
        "calibration": " ".join(files.digest(path)[:12] for path in args.calibration)
        + (f" own {args.own}" if args.own else ""),
        "windows": args.windows,
        "length": args.length,
    }


def recipe_job(
    args: argparse.Namespace, bench: Bench, name: str, recipe: Recipe, **labels: str
) -> Job:
    """Job of a recipe at the effort of the command line; labels are settings of the caller."""
    effort, simulate = effort_of(args), not args.no_simulator
    # Recipes and efforts change from one version to the next under the same names.
    all_settings = json.dumps([recipe.to_json(), dataclasses.asdict(effort)], sort_keys=True)
    settings = {
        **settings_of(args, bench),
        "effort": effort.name,
        "steps": effort.steps,
        "seed": recipe.seed,
        "scored": "simulator" if simulate else "fake_quant",
        "others_of": " ".join(files.digest(path)[:12] for path in args.others),
        "settings": hashlib.sha256(all_settings.encode()).hexdigest()[:12],
        **({"checked": True} if args.check else {}),
        **labels,
    }
    check = None
    if args.check:  # where nothing is checked, LiteRT need not be there
        from checks import checked as check
    return Job(name, settings, lambda: measure(bench, recipe, effort, args.batch, simulate, check))


def float_job(args: argparse.Namespace, bench: Bench, recipe: Recipe) -> Job:
    def score() -> Row:
        return {"recipe": "float", "fake_quant": float_perplexity(bench, recipe, args.batch)}

    return Job("float", settings_of(args, bench), score)
