"""The main job of `qnpu quantize`: a model in; a proved integer .tflite and a report out.

The simulator comes in as an argument (`integer.Simulate`), so that tests can hand in a wrong one.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qnpu_jax import artifacts, models, pipeline
from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.integer import IntegerModel, Simulate, storage
from qnpu_jax.learn import (
    Checkpoints,
    History,
    Store,
    check_checkpoints,
    last_checkpoint,
    learns,
    schedule,
)
from qnpu_jax.measure import perplexity
from qnpu_jax.models import Checkpoint
from qnpu_jax.output import OutputFolder
from qnpu_jax.progress import Clock, Observer
from qnpu_jax.proof import PrefillProof, prove_prefill
from qnpu_jax.recipes import EFFORTS, Effort, Recipe
from qnpu_jax.text import Texts, check_share, excerpts, files, mixed, starts_of
from qnpu_jax.tflite import LiteRT, check_prefill, write_prefill
from qnpu_jax.transform import prefix_length, rotations_of

PACKAGES = (
    "qnpu", "jax", "jaxlib", "numpy", "optax", "ai-edge-litert", "flatbuffers", "gguf", "tokenizers"
)  # fmt: skip
POINTS = 200
"""Largest number of losses that the report gives of a stage; of longer stages it gives means over
equal numbers of steps."""


@dataclass(frozen=True)
class Job:
    """A request to `qnpu quantize`.

    Attributes:
      model: name or path that `models.load` takes.
      out: output folder, new or empty.
      effort: how much is learned.
      calibration: file of text or JSONL to calibrate with and learn from; None lets the model write
        its own.
      own_share: of windows that the model writes itself, beside those of `calibration`; 0 to 1.
      eval_text: file of text that is scored; None takes `pydoc_data.topics`.
      prefill: static length of the signature, tokens.
      logits: positions that the signature gives logits of.
      eval_tokens: tokens scored, at least one window.
      overwrite: replace an earlier output folder.
      checkpoints: folder that keeps learning until the job is done; None takes <out>.checkpoints.
    """

    model: str
    recipe: Recipe
    out: Path
    effort: Effort = EFFORTS["none"]
    calibration: Path | None = None
    own_share: float = 0.0
    eval_text: Path | None = None
    prefill: int = 128
    logits: Positions = "all"
    eval_tokens: int = 2048
    overwrite: bool = False
    checkpoints: Path | None = None

    def learning(self) -> Effort | None:
        """Effort of the run, None where the recipe learns nothing at it."""
        return self.effort if learns(self.recipe, self.effort) else None

    def checkpoint_folder(self) -> Path:
        if self.checkpoints is not None:
            return self.checkpoints
        out = self.out if self.out.name not in ("", "..") else self.out.resolve()
        return out.with_name(f"{out.name}.checkpoints")


def run(job: Job, simulate: Simulate, watch: Observer) -> dict[str, Any]:
    """Quantizes, writes, proves and measures; returns the report, which is also in the folder.

    Raises:
      UserError: any mistake of the caller. Nothing is left behind then but checkpoints, where
        something was learned: the same job goes on from them.
    """
    _check_request(job)
    recipe = job.recipe
    with watch.stage("load"):
        checkpoint = models.load(job.model)
        config = checkpoint.config
        _check_model(config, job)
        _check_checkpoints(job, _asked(job) | _found(checkpoint))
        scored, judges = excerpts.scored_and_judged(
            job.eval_text, checkpoint, job.prefill, job.eval_tokens, job.learning()
        )
        found = None
        if job.calibration is not None:
            found = excerpts.given(job.calibration, checkpoint, recipe, job.learning())
    with watch.stage("fold, rotate"):
        params = pipeline.prepare(config, checkpoint.params, recipe, consume=True)
    if found is None or job.own_share:
        with watch.stage("calibration text"):
            own = excerpts.written(
                checkpoint, params, recipe, job.learning(), _steps(watch, "calibration text")
            )
            found = own if found is None else mixed(found, own, job.own_share)
    text, starts = Texts(scored, *found, judges), starts_of(checkpoint.tokenizer)
    with _kept(job, checkpoint, text, watch) as store:
        made = pipeline.quantize(
            config, params, recipe, text.windows(), starts,
            effort=job.effort, store=store, watch=watch,
        )  # fmt: skip
        del params  # `made` has them, and lets them go
        scores = _score_floats(job, made, text.scored.windows, watch)
        with artifacts.writing(job.out, job.overwrite) as folder:
            with watch.stage("write"):
                _write(folder, made.model, job, checkpoint, text)
            windows = text.scored.windows
            measured = _measure(job, made.model, folder, windows, scores, simulate, watch)
            report = _report(job, checkpoint, text, made, measured, folder, watch)
            artifacts.write_json(folder / artifacts.REPORT, report)
    return report


@contextmanager
def _kept(job: Job, checkpoint: Checkpoint, text: Texts, watch: Observer) -> Iterator[Store | None]:
    """Opens the store of checkpoints while the block runs.

    The folder is removed when the block ends well, or fails before a first checkpoint.
    """
    if job.learning() is None:
        yield None
        return
    folder = job.checkpoint_folder()
    store = Checkpoints(folder, _asked(job) | _found(checkpoint) | text.digests())
    if kept := resumes(job):
        watch.say(f"goes on from stage {kept[0]}, step {kept[1]}, as kept in {folder}")
    else:
        watch.say(f"learns, and keeps checkpoints in {folder} until it is done")
    try:
        yield store
    except BaseException:
        if not resumes(job):
            store.remove()
        raise
    store.remove()


def resumes(job: Job) -> tuple[int, int] | None:
    """Stage (from 1) and step that the same job would go on from, None where nothing is kept."""
    if job.learning() is None:
        return None
    found = last_checkpoint(job.checkpoint_folder())
    return (found[0] + 1, found[1]) if found else None


def _asked(job: Job) -> dict[str, Any]:
    """Settings of the caller that decide what is learned."""
    return {"recipe": job.recipe.to_json(), "effort": dataclasses.asdict(job.effort)}


def _found(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about the model that decide what is learned."""
    return {"model": checkpoint.sha256, "config": dataclasses.asdict(checkpoint.config)}


def _report(
    job: Job,
    checkpoint: Checkpoint,
    text: Texts,
    made: pipeline.Quantized,
    measured: Measured,
    folder: Path,
    watch: Observer,
) -> dict[str, Any]:
    return {
        "format": artifacts.FORMAT,
        "model": checkpoint.source,
        "recipe": job.recipe.name,
        "effort": job.effort.name,
        "prefill": job.prefill,
        "logits": job.logits,
        "bytes": (folder / artifacts.MODEL).stat().st_size,
        **text.to_json(),
        **measured.to_json(),
        "seconds": {k: round(v, 2) for k, v in watch.seconds.items()},
        "rotations": rotations_of(checkpoint.config) if job.recipe.rotation != "none" else {},
        "norms": "twice" if made.model.config.double_norms else "once",
        "mlp_channels": {
            "original": checkpoint.config.intermediate_size,
            "added": job.recipe.split_channels,
        },
        "prefix": dataclasses.asdict(made.prefix) if made.prefix else None,
        **({"coverage": dataclasses.asdict(made.coverage)} if made.coverage else {}),
        "learned": _learned(job, made.histories),
        "ranges": artifacts.columns(made.ranges),
        "sha256": artifacts.digests(folder),
    }


def _learned(job: Job, histories: list[History]) -> list[dict[str, Any]]:
    """One entry per stage that learned: losses (means of `every` steps) and held-out KLs."""
    planned = [(i, n) for i, (_, n) in enumerate(schedule(job.recipe, job.effort)) if n]
    out = []
    for (stage, steps), history in zip(planned, histories, strict=True):
        every = max(1, -(-len(history.loss) // POINTS))
        parts = [history.loss[i : i + every] for i in range(0, len(history.loss), every)]
        out.append({
            "stage": stage + 1,
            "steps": steps,
            "taken": len(history.loss),
            **({"retreats": history.retreats} if history.retreats else {}),
            "every": every,
            "loss": [_short(sum(part) / len(part)) for part in parts],
            "evaluated": [step for step, _ in history.held_out],
            "held_out_kl": [_short(kl) for _, kl in history.held_out],
            "domains": {name: [*map(_short, kls)] for name, kls in history.domains.items()},
        })  # fmt: skip
    return out


def _short(x: float) -> float:
    return float(f"{x:.5g}")


def _check_request(job: Job) -> None:
    """Refuses what can be known to be wrong before the model is read, which takes a while."""
    check_prefill(job.prefill)
    check_share(job.own_share, job.calibration is not None)
    if job.eval_tokens < job.prefill:
        raise UserError(
            f"eval-tokens: {job.eval_tokens} is less than one window; expected at least the"
            f" prefill length {job.prefill}; raise --eval-tokens or choose a shorter --prefill"
        )
    artifacts.check_writable(job.out, job.overwrite)
    _check_checkpoints(job, _asked(job))
    for path in (job.calibration, job.eval_text):
        if path is not None:
            files.read_text(path)


def _check_checkpoints(job: Job, inputs: dict[str, Any]) -> None:
    """Refuses a folder of checkpoints that belongs to another run, as far as `inputs` tell."""
    if job.learning() is None:
        return
    folder, out = job.checkpoint_folder().resolve(), job.out.resolve()
    if out in (folder, *folder.parents) or folder in out.parents:
        raise UserError(
            f"{job.checkpoints}: overlaps with the output folder {job.out}; expected a folder"
            " beside it; choose another --checkpoints"
        )
    check_checkpoints(job.checkpoint_folder(), inputs)


def _check_model(config: ModelConfig, job: Job) -> None:
    """Refuses lengths that the model has not enough positions for."""
    asked = {"prefill": job.prefill, "calibration_length": job.recipe.calibration_length}
    if effort := job.learning():
        asked[f"effort {effort.name}"] = effort.length
    pipeline.check_model(config, job.recipe, asked)


def _steps(watch: Observer, what: str) -> Callable[[Iterable[int], int], Iterable[int]]:
    return lambda steps, length: watch.track(steps, length, what)


def _write(
    folder: Path, model: IntegerModel, job: Job, checkpoint: Checkpoint, text: Texts
) -> None:
    storage.save(model, folder)
    checkpoint.tokenizer.save(folder / artifacts.TOKENIZER)
    write_prefill(model, folder / artifacts.MODEL, job.prefill, job.logits)
    settings = {
        **_asked(job),
        "prefill": job.prefill,
        "logits": job.logits,
        "inputs": {
            "model": {"source": checkpoint.source, "sha256": checkpoint.sha256},
            **text.to_json(),
        },
        "versions": {
            "python": platform.python_version(),
            **{p: artifacts.version(p) for p in PACKAGES},
        },
    }
    artifacts.write_json(folder / artifacts.RECIPE, settings)


@dataclass(frozen=True)
class Measured:
    """Quality of a written model, and the proof of its file.

    Attributes:
      perplexity: of each reading: the original float model, it after the prefix if there is one,
        fake-quant, simulator, LiteRT.
      proof: of the file that was written.
    """

    perplexity: Mapping[str, float]
    proof: PrefillProof

    def to_json(self) -> dict[str, Any]:
        """The entries `perplexity`, `verify` and `accumulators` of report.json."""
        return {"perplexity": dict(self.perplexity), **self.proof.to_json()}


def _score_floats(
    job: Job, made: pipeline.Quantized, windows: np.ndarray, watch: Observer
) -> dict[str, float]:
    """Scores the float readings, after which `made` has no float parameters any more.

    They, those of fake-quant, and the integers of simulator and LiteRT are each as large as all
    else: one after the other.
    """
    model, scores = made.model, {}
    read = partial(perplexity.float_logits, model.config, model.plan)

    def score(name: str, logits: perplexity.Logits) -> None:
        scores[name] = _score(name, logits, windows, watch)

    score("float", read(made.reference))
    if prefix_length(made.prefixed) != prefix_length(made.reference):  # else its own BOS, or none
        score("with prefix", read(made.prefixed))
    for params in (made.params, made.reference, made.prefixed):
        params.clear()
    score("fake-quant", perplexity.fake_quant_logits(model))
    return scores


def _score(name: str, logits: perplexity.Logits, windows: np.ndarray, watch: Observer) -> float:
    with watch.stage(f"score {name}"):
        progress = _steps(watch, f"score {name}")
        return perplexity.perplexity(logits, windows, track=progress)


def _measure(
    job: Job,
    model: IntegerModel,
    folder: Path,
    windows: np.ndarray,
    scores: dict[str, float],
    simulate: Simulate,
    watch: Observer,
) -> Measured:
    """Proves the file, and scores the integers beside the float readings."""
    file, scores = folder / artifacts.MODEL, dict(scores)
    with watch.stage("verify"):
        runner = LiteRT(file, "ref", keep_tensors=True)
        simulator = simulate(model, job.prefill, job.logits)
    proof = prove_prefill(model, runner, simulator, windows[0], watch)
    if job.logits == "last":  # scoring needs every position, which this file does not give
        with watch.stage("write"):
            file = folder / "all-positions.tflite"
            write_prefill(model, file, job.prefill)
            runner = LiteRT(file, "ref")
            file.unlink()
        simulator = simulate(model, job.prefill, "all")
    for name, run_on in (("simulator", simulator.logits), ("LiteRT", runner.run)):
        logits = perplexity.integer_logits(model, run_on)
        scores[name] = _score(name, logits, windows, watch)
    return Measured(scores, proof)


def verify_folder(
    folder: OutputFolder,
    text: Path | None,
    simulate: Simulate,
    clock: Clock,
    kernels: KernelSet = "ref",
) -> PrefillProof:
    """Runs `prove_prefill` on a folder that `run` wrote, on any text.

    Args:
      kernels: LiteRT's; `simulate` gives the simulator of the same ones.

    Raises:
      UserError: the text is too short.
    """
    with clock.stage("load"):
        model = folder.model
        runner = LiteRT(folder.tflite, kernels, keep_tensors=True)
        read = excerpts.tokenized(text, folder.tokenizer, model.config.vocab_size)
        ids = read.first(runner.tokens, runner.tokens).windows[0]
        simulator = simulate(model, runner.tokens, runner.logits)
    return prove_prefill(model, runner, simulator, ids, clock)
