"""The `qnpu` command: parse, call, print. The only module that imports the simulator."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.exceptions import TyperException

from qnpu_jax import artifacts, freeze, job, models
from qnpu_jax.config import UserError, load_recipe
from qnpu_jax.decoder import decoder
from qnpu_jax.pipeline import Clock
from sim import run as simulator
from sim.observe import observed_accumulators

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
Folder = Annotated[Path, typer.Argument(help="Output folder of `qnpu quantize`.")]
RecipeName = Annotated[
    str, typer.Option(help="w8a8, w4a8, w8a16, w4a16, or a JSON file (see `qnpu recipe`).")
]
Prefill = Annotated[int, typer.Option(help="Tokens that the signature takes.")]
Logits = Annotated[job.Positions, typer.Option(help="Positions to give logits of.")]
EvalText = Annotated[
    Path | None, typer.Option(help="Held-out text or JSONL; without it, Python's documentation.")
]


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder, new or empty.")],
    recipe: RecipeName = "w8a8",
    calibration: Annotated[
        Path | None, typer.Option(help="Text or JSONL; without it, the model writes its own.")
    ] = None,
    eval_text: EvalText = None,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to score.")] = 2048,
    prefill: Prefill = 128,
    logits: Logits = "all",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output folder.")
    ] = False,
) -> None:
    """Quantizes a model, writes it, and proves it.

    Every tensor of the file, run by LiteRT, must equal the simulator's in every element.
    """
    request = job.Job(
        model=model,
        recipe=load_recipe(recipe),
        out=out,
        calibration=calibration,
        eval_text=eval_text,
        prefill=prefill,
        logits=logits,
        eval_tokens=eval_tokens,
        overwrite=overwrite,
    )
    with Display() as clock:
        report = job.run(request, Simulated, clock, clock.track)
    _print_report(report)
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
    typer.echo(f"wrote {file}, {_megabytes(file.stat().st_size)}")


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


class Simulated:
    """`job.Simulator` by `sim`."""

    def __init__(
        self, model: freeze.IntegerModel, tokens: int, logits: job.Positions = "all"
    ) -> None:
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


class Display(Clock):
    """A clock that shows the running stage on stderr, where that is a terminal."""

    def __init__(self) -> None:
        super().__init__()
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:16}"),
            BarColumn(24),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = TaskID(0)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage: its bar only pulses, until `track` knows how many steps there are."""
        self._task = self._progress.add_task(name, total=None)
        try:
            with super().stage(name):
                yield
        finally:
            self._progress.remove_task(self._task)

    def track(self, items: Iterable[Any], length: int, what: str) -> Iterable[Any]:
        """Shows the running stage's steps."""
        self._progress.update(self._task, description=what)
        return self._progress.track(items, total=length, task_id=self._task)


def _print_report(report: dict[str, Any]) -> None:
    table = Table(
        title=f"{report['model']}, {report['recipe']}", title_justify="left", show_header=False
    )
    for group in _rows(report):
        for name, what, value in group:
            table.add_row(name, what, value)
        table.add_section()
    Console(soft_wrap=False).print(table)


def _rows(report: dict[str, Any]) -> Iterator[list[tuple[str, str, str]]]:
    """The groups of the table: name, what, value."""
    held_out, seconds, prefix = report["held_out"], report["seconds"], report["prefix"]
    scores = [("", name, f"{value:.2f}") for name, value in report["perplexity"].items()]
    text = f"{held_out['tokens']:,} tokens of {held_out['source']}"
    yield [("perplexity", "on", text), *scores]
    checked, closest = report["verify"], report["accumulators"]["closest"]
    yield [
        ("differing", "elements", f"{checked['differing']:,} of {checked['elements']:,}"),
        ("", "tensors", f"{len(checked['differences']):,} of {checked['tensors']:,}"),
        ("", "between", "simulator and LiteRT's reference kernels"),
    ]
    yield [
        ("size", artifacts.MODEL, _megabytes(report["bytes"])),
        ("", "signature", f"prefill of {report['prefill']} tokens, logits {report['logits']}"),
    ]
    yield [
        ("accumulators", "overflow", "none can, by proof from the weights"),
        ("", "closest", f"{closest['needed']} of {closest['available']} bits: {closest['tensor']}"),
    ]
    if prefix:
        before, after = max(prefix["before"]), max(prefix["after"])
        yield [
            ("prefix", "tokens", f"{', '.join(map(str, prefix['tokens'])) or 'none needed'}"),
            ("", "outliers", f"{before:.0f} -> {after:.0f} times the median token"),
        ]
    taken = [*seconds.items(), ("total", sum(seconds.values()))]
    times = [("", stage, f"{value:.1f}") for stage, value in taken]
    yield [("seconds", *times[0][1:]), *times[1:]]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _verdict(found: dict[str, Any]) -> str:
    return (
        f"{found['differing']:,} of {found['elements']:,} elements differ, in"
        f" {len(found['differences']):,} of {found['tensors']:,} tensors"
        " (simulator against LiteRT's reference kernels)"
    )


def _fail_on_difference(found: dict[str, Any]) -> None:
    for line in found["differences"]:
        typer.echo(line, err=True)
    if found["differing"]:
        raise typer.Exit(1)


INTERRUPTED = 130
"""What Ctrl-C makes of the exit status (128 + SIGINT)."""


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    try:
        status = app(standalone_mode=False, prog_name="qnpu")
        if status == INTERRUPTED:
            _complain("interrupted, nothing is left behind")
    except UserError as error:
        status = _complain(str(error))
    except TyperException as error:  # a misspelt option, a missing argument
        message = error.format_message().rstrip(".?")
        status = _complain(f"{message}; see `qnpu --help`") if message else 2
    except OSError as error:
        status = _complain(f"{error.filename}: {error.strerror or error}; check the file")
    sys.exit(status)


def _complain(message: str) -> int:
    print("qnpu:", *message.split(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
