"""The main job: a model in, a proved integer .tflite out, with every number that the user is told.

The simulator comes in as an argument (`Simulator`): this package never imports it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

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
    verify,
)
from qnpu_jax.config import ModelConfig, Recipe, UserError
from qnpu_jax.freeze import IntegerModel
from qnpu_jax.graph import is_identity
from qnpu_jax.litert import LiteRT
from qnpu_jax.models import Checkpoint, Tokenizer
from qnpu_jax.pipeline import Clock, Track

PACKAGES = ("qnpu", "jax", "jaxlib", "numpy", "ai-edge-litert", "flatbuffers", "gguf", "tokenizers")


class Simulator(Protocol):
    """A simulated model of one length."""

    def logits(self, ids: np.ndarray) -> Any:
        """Codes of the logits, (T, V) for ids (T,)."""
        ...

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        """Codes of every tensor by global name."""
        ...

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        """Largest absolute accumulator of a run that gave these tensors, by global name."""
        ...


Simulate = Callable[[IntegerModel, int], Simulator]
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
    logits: Literal["all", "last"] = "all"
    eval_tokens: int = 2048
    overwrite: bool = False


def run(job: Job, simulate: Simulate, clock: Clock, track: Track) -> dict[str, Any]:
    """Quantizes, writes, proves and measures; returns the report, which is also in the folder.

    Raises:
      UserError: any mistake of the caller; nothing is left behind then.
    """
    artifacts.check_writable(job.out, job.overwrite)
    if job.prefill < 2:
        raise UserError(f"prefill: {job.prefill} is too short; expected at least 2 tokens")
    with clock.stage("load"):
        checkpoint = models.load(job.model)
        _check_length(checkpoint.config, job)
        held_out, eval_source = _held_out(job, checkpoint)
    with clock.stage("fold, rotate"):
        params = pipeline.prepare(checkpoint.config, checkpoint.params, job.recipe)
    with clock.stage("calibration text"):
        windows, source = _calibration(job, checkpoint, params, track)
    quantized = pipeline.quantize(
        checkpoint.config, params, job.recipe, windows, checkpoint.tokenizer.bos_id, clock, track
    )
    with artifacts.writing(job.out, job.overwrite) as folder:
        with clock.stage("write"):
            _write(folder, quantized.model, checkpoint.tokenizer, job, source)
        report = {
            "model": {"source": checkpoint.source, "sha256": checkpoint.sha256},
            "recipe": job.recipe.name,
            "prefill": job.prefill,
            "logits": job.logits,
            "held_out": eval_source,
            "prefix": dataclasses.asdict(quantized.prefix) if quantized.prefix else None,
            "ranges": quantized.ranges,
            **prove(quantized.model, folder / artifacts.MODEL, held_out[0], simulate, clock),
            "perplexity": _perplexities(job, quantized, folder, held_out, simulate, clock, track),
            "bytes": (folder / artifacts.MODEL).stat().st_size,
            "seconds": {k: round(v, 2) for k, v in clock.seconds.items()},
        }
        files = [p for p in sorted(folder.iterdir()) if p.is_file()]
        report["sha256"] = {p.name: artifacts.digest(p) for p in files}
        artifacts.write_json(folder / artifacts.REPORT, report)
    return report


def _check_length(config: ModelConfig, job: Job) -> None:
    longest = job.recipe.max_prefix if job.recipe.prefix == "auto" else 0
    if job.prefill + longest > config.max_positions:
        raise UserError(
            f"prefill: {job.prefill} tokens and a prefix of up to {longest}; expected at most the"
            f" model's {config.max_positions} positions; choose a shorter --prefill"
        )


def _held_out(job: Job, checkpoint: Checkpoint) -> tuple[np.ndarray, str]:
    if job.eval_text is None:
        texts, source = [corpus.default_text()], "pydoc_data.topics"
    else:
        texts, source = corpus.read_text(job.eval_text), str(job.eval_text)
    ids = corpus.tokenize(texts, checkpoint.tokenizer, checkpoint.config.vocab_size, source)
    count = max(1, job.eval_tokens // job.prefill)
    return corpus.windows(ids, job.prefill, count, source), Path(source).name


def _calibration(
    job: Job, checkpoint: Checkpoint, params: Any, track: Track
) -> tuple[np.ndarray, dict[str, str]]:
    recipe, config, tokenizer = job.recipe, checkpoint.config, checkpoint.tokenizer
    length = recipe.calibration_length
    count = max(1, recipe.calibration_tokens // length)
    if job.calibration is not None:
        source = str(job.calibration)
        texts = corpus.read_text(job.calibration)
        ids = corpus.tokenize(texts, tokenizer, config.vocab_size, source)
        windows = corpus.windows(ids, length, count, source)
        return windows, {
            "calibration": job.calibration.name,
            "sha256": corpus.digest(job.calibration),
        }
    windows = generate.calibration_windows(
        config, recipe.bits, params, tokenizer, count * length, length, recipe.seed,
        lambda steps, n: track(steps, n, "calibration text"),
    )  # fmt: skip
    return windows, {"calibration": "generated by the model"}


def _write(
    folder: Path, model: IntegerModel, tokenizer: Tokenizer, job: Job, source: dict[str, str]
) -> None:
    freeze.save(model, folder)
    tokenizer.save(folder / artifacts.TOKENIZER)
    tflite.write(model, folder / artifacts.MODEL, job.prefill, job.logits)
    versions = {p: _version(p) for p in PACKAGES}
    settings = {
        "recipe": job.recipe.to_json(),
        "prefill": job.prefill,
        "logits": job.logits,
        "inputs": source,
        "versions": {"python": platform.python_version(), **versions},
    }
    artifacts.write_json(folder / artifacts.RECIPE, settings)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prove(
    model: IntegerModel, file: Path, ids: np.ndarray, simulate: Simulate, clock: Clock
) -> dict[str, Any]:
    """Compares every tensor of the file, in LiteRT's reference kernels, with the simulator's.

    Args:
      ids: (T,) real text of the file's length.

    Returns:
      Report entries `verify` (tensors, elements, differing, differences) and `accumulators`.
    """
    with clock.stage("verify"):
        runner = LiteRT(file, "ref", keep_tensors=True)
        simulator = simulate(model, runner.tokens)
        runner.run(ids)
        tensors = simulator.tensors(ids)
        comparison = verify.compare(runner.tensors(), tensors, op_names(model, len(ids)))
    with clock.stage("accumulators"):
        dec = model.decoder(len(ids))
        bounds = accumulators.proved_bounds(dec, model.codes, model.zero_point)
        observed = simulator.accumulators(tensors)
    return {
        "verify": {
            "tensors": comparison.tensors,
            "elements": comparison.elements,
            "differing": comparison.differing,
            "differences": [str(d) for d in comparison.differences],
        },
        "accumulators": [
            {**dataclasses.asdict(b), "needed": b.needed, "observed": observed.get(b.tensor)}
            for b in bounds
        ],
    }


def op_names(model: IntegerModel, tokens: int) -> dict[str, str]:
    """The op behind every tensor of the written file, by global name; dropped identities left
    out."""
    return {
        (f"layers.{i}.{node.output}" if graph.prefix == "layers." else graph.prefix + node.output):
        type(node.op).__name__
        for graph in model.decoder(tokens).graphs
        for i in range(graph.layers)
        for node in graph.nodes
        if not is_identity(graph, node, i)
    }  # fmt: skip


def _perplexities(
    job: Job,
    quantized: pipeline.Quantized,
    folder: Path,
    windows: np.ndarray,
    simulate: Simulate,
    clock: Clock,
    track: Track,
) -> dict[str, float]:
    model, plan = quantized.model, job.recipe.bits
    file = folder / artifacts.MODEL
    if job.logits == "last":  # scoring needs every position, which this file does not give
        file = folder / "all-positions.tflite"
        tflite.write(model, file, job.prefill)
    runner = LiteRT(file, "ref")
    readings: dict[str, evaluation.Logits] = {
        "float": evaluation.float_logits(model.config, plan, quantized.params),
        "fake-quant": evaluation.fake_quant_logits(model),
        "simulator": evaluation.integer_logits(model, simulate(model, job.prefill).logits),
        "LiteRT": evaluation.integer_logits(model, runner.run),
    }
    scores = {}
    for name, logits in readings.items():
        with clock.stage(f"score {name}"):
            progress = lambda items, n, name=name: track(items, n, f"score {name}")  # noqa: E731
            scores[name] = evaluation.perplexity(logits, windows, track=progress)
    if job.logits == "last":
        file.unlink()
    return scores
