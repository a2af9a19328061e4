"""The main job: a model in, a proved integer .tflite out, with every number that the user is told.

The simulator comes in as an argument (`Simulate`): this package never imports it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from qnpu_jax import (
    accumulators,
    artifacts,
    corpus,
    evaluation,
    freeze,
    generate,
    models,
    pipeline,
    tflite,
)
from qnpu_jax.config import ModelConfig, Recipe, UserError
from qnpu_jax.decoder import decoder
from qnpu_jax.evaluate import Params
from qnpu_jax.freeze import IntegerModel
from qnpu_jax.graph import TensorSpec
from qnpu_jax.litert import LiteRT
from qnpu_jax.models import Checkpoint, Tokenizer
from qnpu_jax.pipeline import Clock, Track
from qnpu_jax.verify import compare, op_names

PACKAGES = ("qnpu", "jax", "jaxlib", "numpy", "ai-edge-litert", "flatbuffers", "gguf", "tokenizers")

Positions = Literal["all", "last"]
"""Of which positions a signature gives logits."""


@runtime_checkable
class Simulator(Protocol):
    """A simulated model of one length."""

    def logits(self, ids: np.ndarray) -> Any:
        """Codes of the logits, (T or 1, V) for ids (T,)."""
        ...

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        """Codes of every tensor by global name."""
        ...

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        """Largest absolute accumulator of a run that gave these tensors, by global name."""
        ...


Simulate = Callable[[IntegerModel, int, Positions], Simulator]
"""Makes the simulator of a model for a length."""


@dataclass(frozen=True)
class Job:
    """What `qnpu quantize` was asked for.

    Attributes:
      model: a name or path that `models.load` takes.
      calibration: text or JSONL; None lets the model write its own.
      eval_text: held-out text; None takes `pydoc_data.topics`.
      prefill: static length of the signature.
      logits: of all positions, or of the last only.
      eval_tokens: held-out tokens scored, at least one window.
    """

    model: str
    recipe: Recipe
    out: Path
    calibration: Path | None = None
    eval_text: Path | None = None
    prefill: int = 128
    logits: Positions = "all"
    eval_tokens: int = 2048
    overwrite: bool = False


@dataclass(frozen=True)
class Text:
    """Windows (N, T) of token ids, and where they are from: a name and a hash of the source."""

    source: str
    sha256: str
    windows: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256, "tokens": self.windows.size}


def run(job: Job, simulate: Simulate, clock: Clock, track: Track) -> dict[str, Any]:
    """Quantizes, writes, proves and measures; returns the report, which is also in the folder.

    Raises:
      UserError: any mistake of the caller; nothing is left behind then.
    """
    _check_request(job)
    recipe = job.recipe
    with clock.stage("load"):
        checkpoint = models.load(job.model)
        config, bos = checkpoint.config, checkpoint.tokenizer.bos_id
        _check_model(config, job)
        held_out = _held_out(job, checkpoint)
        calibration = _calibration(job, checkpoint)
    with clock.stage("fold, rotate"):
        params = pipeline.prepare(config, checkpoint.params, recipe)
    if calibration is None:
        with clock.stage("calibration text"):
            calibration = _generate(job, checkpoint, params, track)
    made = pipeline.quantize(config, params, recipe, calibration.windows, bos, clock, track)
    with artifacts.writing(job.out, job.overwrite) as folder:
        with clock.stage("write"):
            _write(folder, made.model, job, checkpoint, calibration, held_out)
        report = {
            "format": artifacts.FORMAT,
            "model": checkpoint.source,
            "recipe": recipe.name,
            "prefill": job.prefill,
            "logits": job.logits,
            "bytes": (folder / artifacts.MODEL).stat().st_size,
            "calibration": calibration.to_json(),
            "held_out": held_out.to_json(),
            **_measure(job, made, folder, held_out.windows, simulate, clock, track),
            "seconds": {k: round(v, 2) for k, v in clock.seconds.items()},
            "prefix": dataclasses.asdict(made.prefix) if made.prefix else None,
            "ranges": artifacts.columns(made.ranges),
            "sha256": artifacts.digests(folder),
        }
        artifacts.write_json(folder / artifacts.REPORT, report)
    return report


def _check_request(job: Job) -> None:
    """What can be wrong before the model is read, which takes a while."""
    _check_prefill(job.prefill)
    if job.eval_tokens < job.prefill:
        raise UserError(
            f"eval-tokens: {job.eval_tokens} is less than one window; expected at least the"
            f" prefill length {job.prefill}; raise --eval-tokens or choose a shorter --prefill"
        )
    artifacts.check_writable(job.out, job.overwrite)
    for path in (job.calibration, job.eval_text):
        if path is not None:
            corpus.read_text(path)


def _check_prefill(prefill: int) -> None:
    if prefill < 2:
        raise UserError(f"prefill: {prefill} is too short; expected at least 2; raise --prefill")


def _check_model(config: ModelConfig, job: Job) -> None:
    """What a recipe and a length ask of a model."""
    longest = job.recipe.max_prefix if job.recipe.prefix == "auto" else 0
    lengths = {"prefill": job.prefill, "calibration_length": job.recipe.calibration_length}
    for name, length in lengths.items():
        if length + longest > config.max_positions:
            raise UserError(
                f"{name}: {length} tokens after a prefix of up to {longest}; expected at most the"
                f" model's {config.max_positions} positions; choose a shorter {name}"
            )
    for graph in decoder(config, job.recipe.bits, job.prefill, longest).graphs:
        for spec in graph.tensors:
            if not re.search(r"\.i\d+$", spec.name):  # widened for a tensor that is checked too
                _check_bits(graph.prefix, spec)


def _check_bits(prefix: str, spec: TensorSpec) -> None:
    """Kernels take 4 or 8-bit weights, 32 or 64-bit biases and 8 or 16-bit activations; what enters
    an activation as a constant (embedding, prefix) is stored in 8 bits."""
    match spec.kind, spec.name.rpartition(".")[2]:
        case "param", "bias":
            allowed = (32, 64)
        case "param", "weight" if prefix != "embed.":
            allowed = (4, 8)
        case "param", _:
            allowed = (8,)
        case _:
            allowed = (8, 16)
    for bits in spec.quant.bits if spec.quant else ():
        if bits not in allowed:
            raise UserError(
                f"{prefix}{spec.name}: the bit plan gives it {bits} bits; expected"
                f" {' or '.join(map(str, allowed))}; correct the rule that matches it"
            )


def _held_out(job: Job, checkpoint: Checkpoint) -> Text:
    count = job.eval_tokens // job.prefill
    return _text(job.eval_text, checkpoint.tokenizer, checkpoint.config, job.prefill, count)


def _calibration(job: Job, checkpoint: Checkpoint) -> Text | None:
    if job.calibration is None:
        return None
    count, length = _calibration_shape(job.recipe)
    return _text(job.calibration, checkpoint.tokenizer, checkpoint.config, length, count)


def _calibration_shape(recipe: Recipe) -> tuple[int, int]:
    """Windows, and tokens of each."""
    length = recipe.calibration_length
    return max(1, recipe.calibration_tokens // length), length


def _text(
    path: Path | None, tokenizer: Tokenizer, config: ModelConfig, length: int, count: int
) -> Text:
    """Windows of a file, by default of Python's documentation."""
    if path is None:
        name = source = "pydoc_data.topics"
        texts = [corpus.default_text()]
        sha256 = hashlib.sha256(texts[0].encode()).hexdigest()
    else:
        name, source = path.name, str(path)
        texts, sha256 = corpus.read_text(path), corpus.digest(path)
    ids = corpus.tokenize(texts, tokenizer, config.vocab_size, source)
    return Text(name, sha256, corpus.windows(ids, length, count, source))


def _generate(job: Job, checkpoint: Checkpoint, params: Params, track: Track) -> Text:
    count, length = _calibration_shape(job.recipe)
    windows = generate.calibration_windows(
        checkpoint.config, job.recipe.bits, params, checkpoint.tokenizer,
        count * length, length, job.recipe.seed, _steps(track, "calibration text"),
    )  # fmt: skip
    return Text("written by the model", hashlib.sha256(windows.tobytes()).hexdigest(), windows)


def _steps(track: Track, what: str) -> Callable[[Iterable[int], int], Iterable[int]]:
    return lambda steps, length: track(steps, length, what)


def _write(
    folder: Path,
    model: IntegerModel,
    job: Job,
    checkpoint: Checkpoint,
    calibration: Text,
    held_out: Text,
) -> None:
    freeze.save(model, folder)
    checkpoint.tokenizer.save(folder / artifacts.TOKENIZER)
    tflite.write(model, folder / artifacts.MODEL, job.prefill, job.logits)
    settings = {
        "recipe": job.recipe.to_json(),
        "prefill": job.prefill,
        "logits": job.logits,
        "inputs": {
            "model": {"source": checkpoint.source, "sha256": checkpoint.sha256},
            "calibration": calibration.to_json(),
            "held_out": held_out.to_json(),
        },
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
    }
    artifacts.write_json(folder / artifacts.RECIPE, settings)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _measure(
    job: Job,
    made: pipeline.Quantized,
    folder: Path,
    windows: np.ndarray,
    simulate: Simulate,
    clock: Clock,
    track: Track,
) -> dict[str, Any]:
    """Report entries of the proof, and `perplexity` of the four readings of the model."""
    model, file = made.model, folder / artifacts.MODEL
    with clock.stage("verify"):
        runner = LiteRT(file, "ref", keep_tensors=True)
        simulator = simulate(model, job.prefill, job.logits)
    proof = prove(model, runner, simulator, windows[0], clock)
    if job.logits == "last":  # scoring needs every position, which this file does not give
        with clock.stage("write"):
            file = folder / "all-positions.tflite"
            tflite.write(model, file, job.prefill)
            runner = LiteRT(file, "ref")
            file.unlink()
        simulator = simulate(model, job.prefill, "all")
    readings: dict[str, evaluation.Logits] = {
        "float": evaluation.float_logits(model.config, model.plan, made.params),
        "fake-quant": evaluation.fake_quant_logits(model),
        "simulator": evaluation.integer_logits(model, simulator.logits),
        "LiteRT": evaluation.integer_logits(model, runner.run),
    }
    scores = {}
    for name, logits in readings.items():
        with clock.stage(f"score {name}"):
            progress = _steps(track, f"score {name}")
            scores[name] = evaluation.perplexity(logits, windows, track=progress)
    return {"perplexity": scores, **proof}


def prove(
    model: IntegerModel, runner: LiteRT, simulator: Simulator, ids: np.ndarray, clock: Clock
) -> dict[str, Any]:
    """Compares every tensor of a file, in LiteRT's reference kernels, with the simulator's.

    Args:
      runner: of the file, with its tensors kept.
      simulator: of the same length and positions.
      ids: (T,) real text.

    Returns:
      Report entries `verify` (tensors, elements, differing, differences) and `accumulators`: proved
      bounds (codes, bits) and the largest that this run saw.
    """
    with clock.stage("verify"):
        runner.run(ids)
        tensors = simulator.tensors(ids)
        comparison = compare(runner.tensors(), tensors, op_names(model, len(ids), runner.logits))
    with clock.stage("accumulators"):
        dec = model.decoder(len(ids), logits=runner.logits)
        bounds = accumulators.proved_bounds(dec, model.codes, model.zero_point)
        seen = simulator.accumulators(tensors)
    rows = [dataclasses.asdict(b) | {"needed": b.needed, "seen": seen[b.tensor]} for b in bounds]
    closest = min(rows, key=lambda row: row["available"] - row["needed"])
    return {
        "verify": {
            "tensors": comparison.tensors,
            "elements": comparison.elements,
            "differing": comparison.differing,
            "differences": [str(d) for d in comparison.differences],
        },
        "accumulators": {"closest": closest, "all": artifacts.columns(rows)},
    }


def check(out: Path, text: Path | None, simulate: Simulate, clock: Clock) -> dict[str, Any]:
    """`prove` for a folder that `run` wrote, on any text.

    Raises:
      UserError: not such a folder, a file of it changed since, or the text is too short.
    """
    artifacts.read_report(out)
    with clock.stage("load"):
        model = freeze.load(out)
        runner = LiteRT(out / artifacts.MODEL, "ref", keep_tensors=True)
        tokenizer = Tokenizer.load(out / artifacts.TOKENIZER)
        ids = _text(text, tokenizer, model.config, runner.tokens, 1).windows[0]
        simulator = simulate(model, runner.tokens, runner.logits)
    return prove(model, runner, simulator, ids, clock)


def export(out: Path, file: Path, prefill: int, logits: Positions) -> None:
    """Writes the model of a folder that `run` wrote to `file`, for another length.

    Raises:
      UserError: not such a folder, `file` exists, or the model has fewer positions.
    """
    _check_prefill(prefill)
    with artifacts.new_file(file) as partial:
        artifacts.read_report(out)
        tflite.write(freeze.load(out), partial, prefill, logits)
