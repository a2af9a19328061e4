"""The commands: parse, call, print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from typer.exceptions import TyperException

from qnpu_jax import artifacts, freeze, job, models
from qnpu_jax.cli import INTERRUPTED, complain
from qnpu_jax.cli.display import Display, megabytes, print_report
from qnpu_jax.config import UserError
from qnpu_jax.decoder import decoder
from qnpu_jax.proof import Positions
from qnpu_jax.recipes import EFFORTS, load_recipe
from sim import run as simulator
from sim.observe import observed_accumulators

SHOWN = 20
"""Differing tensors that are named: the first says most."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turns a decoder LLM into an integer-only .tflite, proved in a bit-exact simulator.",
    epilog="Exit status: 0; 1 where simulator and LiteRT differ; 2 for a mistake in the input.",
)
Model = Annotated[
    str, typer.Argument(help="smollm2-135m, a .gguf file, a Hugging Face folder, or org/name.")
]
EffortName = Literal["none", "fast", "full"]
Folder = Annotated[Path, typer.Argument(help="Output folder of `qnpu quantize`.")]
RecipeName = Annotated[
    str,
    typer.Option(
        help="w8a8, w4a8, w8a16 or w4a16, one of these after a method (quarot-w4a8), or a JSON file"
        " (see `qnpu recipe`)."
    ),
]
Prefill = Annotated[int, typer.Option(help="Tokens that the signature takes.")]
Logits = Annotated[Positions, typer.Option(help="Positions to give logits of.")]
EvalText = Annotated[
    Path | None, typer.Option(help="Held-out text or JSONL; without it, Python's documentation.")
]


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder, new or empty.")],
    recipe: RecipeName = "w8a8",
    effort: Annotated[
        EffortName, typer.Option(help="How much is learned: fast is for two CPU cores, full a GPU.")
    ] = "fast",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text or JSONL to learn from; without it, the model writes its own."),
    ] = None,
    eval_text: EvalText = None,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to score.")] = 2048,
    prefill: Prefill = 128,
    logits: Logits = "all",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output folder.")
    ] = False,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Where learning is kept until it is done; without it, OUT.checkpoints."),
    ] = None,
) -> None:
    """Quantizes a model, learns what it can, writes it, and proves it.

    Every tensor of the file, run by LiteRT, must equal the simulator's in every element. Killed
    while it learns, the same command goes on from the last checkpoint.
    """
    request = job.Job(
        model=model,
        recipe=load_recipe(recipe),
        out=out,
        effort=EFFORTS[effort],
        calibration=calibration,
        eval_text=eval_text,
        prefill=prefill,
        logits=logits,
        eval_tokens=eval_tokens,
        overwrite=overwrite,
        checkpoints=checkpoints,
    )
    with Display() as display, _resumable(request):
        report = job.run(request, Simulated, display)
    print_report(report)
    typer.echo(f"wrote {out}")
    _fail_on_difference(report["verify"])


@app.command()
def verify(folder: Folder, text: EvalText = None) -> None:
    """Compares every tensor of a folder's model.tflite, run by LiteRT, with the simulator's."""
    with Display() as clock:
        found = job.check(folder, text, Simulated, clock)["verify"]
    typer.echo(_verdict(found))
    _fail_on_difference(found)


@app.command()
def export(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="The .tflite to write.")],
    prefill: Prefill = 128,
    logits: Logits = "all",
) -> None:
    """Writes the model of a folder again, with a signature of another length."""
    with Display() as clock, clock.stage("write"):
        job.export(folder, file, prefill, logits)
    typer.echo(f"wrote {file}, {megabytes(file.stat().st_size)}")


@app.command()
def graph(
    model: Model = "smollm2-135m",
    recipe: RecipeName = "w8a8",
    prefill: Prefill = 128,
    prefix: Annotated[int, typer.Option(help="Tokens of constant keys and values.")] = 2,
) -> None:
    """Prints the quantized decoder: embed graph, one layer, head graph."""
    plan = load_recipe(recipe).bits
    config = models.load_params(model)[0]
    for part in decoder(config, plan, prefill, prefix).graphs:
        typer.echo(str(part))


@app.command(name="recipe")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A named recipe or a file.")] = "w8a8",
) -> None:
    """Prints a recipe as JSON, to start one's own from."""
    typer.echo(artifacts.layout(load_recipe(name).to_json()))


class Interrupted(Exception):
    """Ctrl-C, and what the user should know."""


@contextmanager
def _resumable(request: job.Job) -> Iterator[None]:
    """Tells who interrupts a run what is kept of it."""
    try:
        yield
    except KeyboardInterrupt:
        if not (kept := job.resumes(request)):
            raise
        stage, step = kept
        raise Interrupted(
            f"interrupted; the same command goes on from stage {stage}, step {step}, kept in"
            f" {request.checkpoint_folder()}"
        ) from None


class Simulated:
    """`job.Simulator` by `sim`."""

    def __init__(self, model: freeze.IntegerModel, tokens: int, logits: Positions = "all") -> None:
        self._model = model
        dec = model.decoder(tokens, logits=logits)
        self._program = simulator.compile_model(model, dec, "litert_ref")

    def logits(self, ids: np.ndarray) -> Any:
        return simulator.run(self._program, ids)["head.logits"]

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        kept = simulator.run(self._program, ids, keep=lambda _: True)
        return {name: np.asarray(codes) for name, codes in kept.items()}

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        return observed_accumulators(self._model, self._program.decoder, tensors)


def _verdict(found: dict[str, Any]) -> str:
    return (
        f"{found['differing']:,} of {found['elements']:,} elements differ, in"
        f" {len(found['differences']):,} of {found['tensors']:,} tensors"
        " (simulator against LiteRT's reference kernels)"
    )


def _fail_on_difference(found: dict[str, Any]) -> None:
    lines = found["differences"]
    for line in lines[:SHOWN]:
        typer.echo(line, err=True)
    if len(lines) > SHOWN:
        typer.echo(f"... and {len(lines) - SHOWN:,} more", err=True)
    if found["differing"]:
        raise typer.Exit(1)


def call() -> int:
    """Runs the command line; returns the exit status. A user's mistake is one line on stderr.

    Raises:
      KeyboardInterrupt: nothing is left behind.
    """
    try:
        status = app(standalone_mode=False, prog_name="qnpu")
    except Interrupted as interrupted:
        return complain(str(interrupted), INTERRUPTED)
    except UserError as error:
        return complain(str(error))
    except TyperException as error:  # a misspelt option, a missing argument
        message = error.format_message().rstrip(".?")
        return complain(f"{message}; see `qnpu --help`") if message else 2
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror or error}; check the file")
    if status == INTERRUPTED:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt
    return status or 0
