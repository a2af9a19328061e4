"""The `qnpu` command: parse, call, print. The only module that imports the simulator."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qnpu_jax import artifacts, corpus, freeze, job, models, tflite
from qnpu_jax.config import UserError, load_recipe
from qnpu_jax.decoder import decoder
from qnpu_jax.models import Tokenizer
from qnpu_jax.pipeline import Clock
from sim import run as simulator
from sim.observe import observed_accumulators

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turns a decoder LLM into an integer-only .tflite, proved in a bit-exact simulator.",
)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output folder.")]
Text = Annotated[
    Path | None, typer.Option(help="Plain text or JSONL; default: Python's own documentation.")
]


class Simulated:
    """`job.Simulator` by `sim`."""

    def __init__(self, model: freeze.IntegerModel, tokens: int) -> None:
        self._model = model
        self._program = simulator.compile_model(model, model.decoder(tokens), "litert_ref")

    def logits(self, ids: np.ndarray) -> Any:
        return simulator.run(self._program, ids)["head.logits"]

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        kept = simulator.run(self._program, ids, keep=lambda _: True)
        return {name: np.asarray(codes) for name, codes in kept.items()}

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        return observed_accumulators(self._model, self._program.decoder, tensors)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="smollm2-135m, a .gguf, a Hugging Face folder, or org/name.")
    ],
    out: Annotated[Path, typer.Option(help="Output folder, new or empty.")],
    recipe: Annotated[str, typer.Option(help="w8a8, w4a8, w8a16, w4a16, or a JSON file.")] = "w8a8",
    calibration: Annotated[
        Path | None, typer.Option(help="Plain text or JSONL; default: the model writes its own.")
    ] = None,
    eval_text: Text = None,
    eval_tokens: Annotated[int, typer.Option(min=2, help="Held-out tokens scored.")] = 2048,
    prefill: Annotated[int, typer.Option(help="Static length of the signature, tokens.")] = 128,
    logits: Annotated[str, typer.Option(help="Logits of `all` positions, or the `last`.")] = "all",
    overwrite: Overwrite = False,
) -> None:
    """Quantizes a model, writes it, and proves that simulator and LiteRT agree on every element."""
    if logits not in ("all", "last"):
        raise UserError(f"logits: {logits!r}; expected all or last")
    console = Console()
    clock = Clock()
    request = job.Job(
        model,
        load_recipe(recipe),
        out,
        calibration,
        eval_text,
        prefill,
        logits,
        eval_tokens,
        overwrite,
    )
    with _progress() as progress:
        report = job.run(request, Simulated, clock, _tracker(progress))
    _print_report(console, report, out)
    _fail_on_difference(report["verify"])


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Output folder of `qnpu quantize`.")],
    text: Text = None,
) -> None:
    """Compares every tensor of out/model.tflite, in LiteRT's reference kernels, with the
    simulator's."""
    report = artifacts.read_report(out)
    model = freeze.load(out)
    tokenizer = Tokenizer.load(out / artifacts.TOKENIZER)
    texts = [corpus.default_text()] if text is None else corpus.read_text(text)
    source = "pydoc_data.topics" if text is None else str(text)
    ids = corpus.tokenize(texts, tokenizer, model.config.vocab_size, source)
    window = corpus.windows(ids, report["prefill"], 1, source)[0]
    found = job.prove(model, out / artifacts.MODEL, window, Simulated, Clock())["verify"]
    console = Console()
    console.print(
        f"{found['tensors']} tensors, {found['elements']} elements compared:"
        f" {found['differing']} differ"
    )
    _fail_on_difference(found)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Output folder of `qnpu quantize`.")],
    file: Annotated[Path, typer.Argument(help="The .tflite to write.")],
    prefill: Annotated[int, typer.Option(help="Static length of the signature, tokens.")] = 128,
    logits: Annotated[str, typer.Option(help="Logits of `all` positions, or the `last`.")] = "all",
) -> None:
    """Writes the frozen model of a folder again, with another prefill length."""
    if logits not in ("all", "last"):
        raise UserError(f"logits: {logits!r}; expected all or last")
    if file.exists():
        raise UserError(f"{file}: exists; expected a new file; choose another name")
    artifacts.read_report(out)
    with artifacts.new_file(file) as partial:
        tflite.write(freeze.load(out), partial, prefill, logits)
    Console().print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


@app.command()
def graph(
    model: Annotated[str, typer.Argument(help="As for quantize.")] = "smollm2-135m",
    recipe: Annotated[str, typer.Option(help="As for quantize.")] = "w8a8",
    prefill: Annotated[int, typer.Option(help="Tokens.")] = 128,
    prefix: Annotated[int, typer.Option(help="Tokens of constant keys and values.")] = 2,
) -> None:
    """Prints the quantized decoder: embed graph, one layer, head graph."""
    config = models.load_params(model)[0]
    for part in decoder(config, load_recipe(recipe).bits, prefill, prefix).graphs:
        typer.echo(str(part))


@app.command(name="recipe")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A named recipe or a file.")] = "w8a8",
) -> None:
    """Prints a recipe as JSON, to start one's own from."""
    typer.echo(json.dumps(load_recipe(name).to_json(), indent=1))


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _tracker(progress: Progress) -> Any:
    def track(items: Iterable[Any], length: int, what: str) -> Iterable[Any]:
        return progress.track(items, total=length, description=what)

    return track


def _print_report(console: Console, report: dict[str, Any], out: Path) -> None:
    scores = Table(
        title=f"{report['model']['source']} {report['recipe']}: perplexity on {report['held_out']}"
    )
    for name in report["perplexity"]:
        scores.add_column(name, justify="right")
    scores.add_row(*(f"{v:.2f}" for v in report["perplexity"].values()))
    console.print(scores)
    stages = Table("stage", "seconds", box=None)
    for name, seconds in report["seconds"].items():
        stages.add_row(name, f"{seconds:.1f}")
    stages.add_row("total", f"{sum(report['seconds'].values()):.1f}")
    console.print(stages)
    for line in _facts(report):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"wrote {out}", highlight=False)


def _facts(report: dict[str, Any]) -> Iterable[str]:
    checked = report["verify"]
    size = report["bytes"] / 1e6
    yield f"size                {size:.1f} MB ({artifacts.MODEL}, prefill {report['prefill']})"
    prefix = report["prefix"]
    if prefix:
        yield (
            f"prefix              tokens {list(prefix['tokens'])}: largest token over the median"
            f" {max(prefix['before']):.0f} -> {max(prefix['after']):.0f}, residual peak"
            f" {prefix['peak_before']:.0f} -> {prefix['peak_after']:.0f}"
        )
    widest = max(report["accumulators"], key=lambda b: b["needed"] - b["available"])
    yield (
        f"accumulators        none can overflow; closest {widest['tensor']}: {widest['needed']} of"
        f" {widest['available']} bits"
    )
    yield (
        f"differing elements  {checked['differing']} of {checked['elements']} in"
        f" {checked['tensors']}"
        " tensors (LiteRT reference kernels against the simulator)"
    )


def _fail_on_difference(found: dict[str, Any]) -> None:
    for line in found["differences"]:
        typer.echo(line, err=True)
    if found["differing"]:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit status 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        sys.exit(_one_line(error))


def _one_line(error: UserError) -> int:
    print(" ".join(f"qnpu: {error}".split()), file=sys.stderr)
    return 2
