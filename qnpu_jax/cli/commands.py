"""The commands: parse, call, print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from qnpu_jax import artifacts, deploy, job
from qnpu_jax.cli import INTERRUPTED, bench, complain, instrument, npu, proof
from qnpu_jax.cli.display import Display, megabytes, print_report
from qnpu_jax.cli.options import Context, EvalText, Folder, Prefill, Profile, Threads, check_unused
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Positions, decoder
from qnpu_jax.models import checkpoint
from qnpu_jax.output import OutputFolder
from qnpu_jax.proof import Simulated
from qnpu_jax.recipes import EFFORTS, load_recipe
from qnpu_jax.runtime import (
    Backend,
    LiteRTBackend,
    Sampling,
    Session,
    SimulatedBackend,
    check_room,
    generation,
)
from qnpu_jax.tflite import KernelSet

SHOWN = 20
"""Differing tensors that are named: the first says most."""
PACKAGED_CONTEXT = 512
"""Positions of the KV cache of a `.litertlm`."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turns a decoder LLM into an integer-only .tflite, proved in a bit-exact simulator.",
    epilog="Exit status: 0; 1 where simulator and LiteRT differ; 2 for a mistake in the input.",
)
app.add_typer(npu.app)
app.add_typer(bench.app)
app.add_typer(instrument.app)
app.add_typer(proof.app)
Model = Annotated[
    str, typer.Argument(help="smollm2-135m, a .gguf file, a Hugging Face folder, or org/name.")
]
EffortName = Literal["none", "fast", "full"]
RecipeName = Annotated[
    str,
    typer.Option(
        help="w8a8, w4a8, w8a16 or w4a16, one of these after a method (quarot-w4a8), or a JSON file"
        " (see `qnpu recipe`)."
    ),
]
Logits = Annotated[Positions, typer.Option(help="Positions to give logits of.")]


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
def verify(
    folder: Folder,
    eval_text: EvalText = None,
    prefill: Prefill = 128,
    context: Annotated[
        int | None,
        typer.Option(
            help="Of the file with a KV cache of so many positions, which `generate` runs."
        ),
    ] = None,
    kernels: Annotated[
        KernelSet, typer.Option(help="LiteRT's: ref, opt, or xnn (XNNPACK, one op at a time).")
    ] = "ref",
) -> None:
    """Compares every tensor of a folder's model.tflite, run by LiteRT, with the simulator's; with
    --context those of both signatures over a KV cache, which chunks and single steps fill."""
    with Display() as clock:
        opened = OutputFolder.open(folder)
        if context is None:
            simulate = partial(Simulated, kernels=kernels)
            found = job.check(opened, eval_text, simulate, clock, kernels)["verify"]
        else:
            cached = partial(SimulatedBackend, kernels=kernels)
            found = deploy.verified(opened, prefill, context, eval_text, cached, clock, kernels)
            typer.echo(f"fed in steps of {', '.join(map(str, found['steps']))} tokens")
    typer.echo(_verdict(found, kernels))
    _fail_on_difference(found)


@app.command()
def export(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="The .tflite or .litertlm to write.")],
    prefill: Prefill = 128,
    logits: Logits = "all",
    context: Annotated[
        int | None,
        typer.Option(
            help="Positions of a KV cache: writes prefill_N and decode. Without it, one prefill."
        ),
    ] = None,
    litertlm: Annotated[
        bool,
        typer.Option(
            "--litertlm",
            help="A package for LiteRT-LM: model with a KV cache (512 positions, if --context does"
            " not say otherwise), tokenizer and chat template (extra: litertlm).",
        ),
    ] = False,
    profile: Profile = "plain",
) -> None:
    """Writes the model of a folder again: another length, with a KV cache, or for LiteRT-LM."""
    with Display() as clock, clock.stage("write"):
        opened = OutputFolder.open(folder)
        if litertlm:
            slots = PACKAGED_CONTEXT if context is None else context
            deploy.package(opened, file, prefill, slots, profile)
        else:
            deploy.export(opened, file, prefill, logits, context, profile)
    typer.echo(f"wrote {file}, {megabytes(file.stat().st_size)}")


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="What the user says, or with --raw any text.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without a chat.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Of the k likeliest; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Of the likeliest up to this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    backend: Annotated[
        Literal["litert", "sim"], typer.Option(help="LiteRT on this CPU, or the simulator.")
    ] = "litert",
    kernels: Annotated[
        KernelSet, typer.Option(help="LiteRT's: xnn (XNNPACK), opt, or ref.")
    ] = "xnn",
    threads: Threads = 1,
    prefill: Prefill = 128,
    context: Context = 512,
    profile: Profile = "plain",
) -> None:
    """Generates text from a quantized model, with what it needs a second."""
    sampling = Sampling(temperature, top_k, top_p, seed)
    opened = OutputFolder.open(folder)
    tokenizer = opened.tokenizer
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.encode(prompt) if raw else tokenizer.chat(messages, bos=False)
    check_room(len(ids), 0, context)
    with Display() as clock, clock.stage("load"):
        runner: Backend
        if backend == "sim":
            check_unused("profile", profile, "plain", "--backend sim, which reads no file")
            runner = SimulatedBackend(opened.model, prefill, context)
        else:
            file = deploy.deployed(opened, prefill, context, profile)
            runner = LiteRTBackend(file, kernels, threads=threads)
    speed = generation.Speed()
    made = generation.tokens(
        Session(runner), ids, runner.logit_scale, sampling, max_tokens, tokenizer.eos_ids, speed
    )
    for piece in generation.pieces(made, tokenizer):
        typer.echo(piece, nl=False)
    typer.echo()
    typer.echo(str(speed), err=True)


@app.command()
def graph(
    model: Model = "smollm2-135m",
    recipe: RecipeName = "w8a8",
    prefill: Prefill = 128,
    prefix: Annotated[int, typer.Option(help="Tokens of constant keys and values.")] = 2,
) -> None:
    """Prints the quantized decoder: embed graph, one layer, head graph."""
    plan = load_recipe(recipe).bits
    config = checkpoint.load_params(model)[0]
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


def _verdict(found: dict[str, Any], kernels: KernelSet = "ref") -> str:
    names = {"ref": "reference kernels", "opt": "optimized kernels", "xnn": "XNNPACK"}
    return (
        f"{found['differing']:,} of {found['elements']:,} elements differ, in"
        f" {len(found['differences']):,} of {found['tensors']:,} tensors"
        f" (simulator against LiteRT's {names[kernels]})"
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
