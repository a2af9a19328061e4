"""The command line, and the commands about models: quantize, verify, export, generate, graph."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.exceptions import TyperException

from qnpu_jax.choices import EffortName
from qnpu_jax.cli import (
    INTERRUPTED,
    Interrupted,
    bench,
    compilers,
    complain,
    diagnose,
    importing,
    plan,
    proof,
    recipe,
    text,
)
from qnpu_jax.cli.options import (
    Context,
    EvalText,
    Folder,
    Kernels,
    Logits,
    Model,
    Prefill,
    Profile,
    RecipeName,
    Threads,
    check_unused,
)
from qnpu_jax.errors import UserError, is_text

PACKAGED_CONTEXT = 512
"""Positions of the KV cache of a `.litertlm`."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turns a decoder LLM into an integer-only .tflite, proved in a bit-exact simulator.",
    epilog="Exit status: 0; 1 where simulator and LiteRT differ; 2 for a mistake in the input.",
)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"qnpu {metadata.version('qnpu')}")
        raise typer.Exit
    return asked


@app.callback()
def _before(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of `qnpu` itself, without a command."""


app.add_typer(compilers.app)
app.add_typer(bench.app)
app.add_typer(diagnose.app)
app.add_typer(plan.app)
app.add_typer(proof.app)
app.add_typer(recipe.app)
app.add_typer(text.app)

Effort = Annotated[
    EffortName, typer.Option(help="How much is learned: fast is for two CPU cores, full a GPU.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Text or JSONL to learn from; without it, the model writes its own."),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(help="Where learning is kept until it is done; without it, OUT.checkpoints."),
]


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Output folder, new or empty.")],
    recipe: RecipeName = "w8a8",
    effort: Effort = "fast",
    calibration: Calibration = None,
    own_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of windows the model writes, beside --calibration."),
    ] = 0.0,
    eval_text: EvalText = None,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to score.")] = 2048,
    prefill: Prefill = 128,
    logits: Logits = "all",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output folder.")
    ] = False,
    checkpoints: Checkpoints = None,
) -> None:
    """Quantizes a model, learns what it can, writes it, and proves it.

    Every tensor of the file, run by LiteRT, must equal the simulator's in
    every element. Killed while it learns, the same command goes on from
    the last checkpoint.
    """
    with importing():
        from qnpu_jax import job, recipes
        from qnpu_jax.cli import report_table
        from qnpu_jax.cli.display import Display
        from qnpu_jax.cli.interruption import resumable
        from qnpu_jax.proof import Simulated
    request = job.Job(
        model=model, recipe=recipes.load_recipe(recipe), out=out, effort=recipes.EFFORTS[effort],
        calibration=calibration, own_share=own_share, eval_text=eval_text, prefill=prefill,
        logits=logits, eval_tokens=eval_tokens, overwrite=overwrite, checkpoints=checkpoints,
    )  # fmt: skip
    with Display() as display, resumable(request):
        report = job.run(request, Simulated, display)
    report_table.show(report)
    typer.echo(f"wrote {out}")
    report_table.fail_on_difference(report["verify"]["differences"])


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
    kernels: Kernels = "ref",
) -> None:
    """Compares every tensor of model.tflite, run by LiteRT, with the simulator's.

    With --context those of both signatures over a KV cache, which chunks
    and single steps fill.
    """
    with importing():
        from functools import partial

        from qnpu_jax import deploy, job
        from qnpu_jax.cli import report_table
        from qnpu_jax.cli.display import Display
        from qnpu_jax.output import OutputFolder
        from qnpu_jax.proof import Simulated
        from qnpu_jax.runtime import SimulatedBackend
    with Display() as clock:
        opened = OutputFolder.open(folder)
        if context is None:
            simulate = partial(Simulated, kernels=kernels)
            proof = job.verify_folder(opened, eval_text, simulate, clock, kernels)
        else:
            cached = partial(SimulatedBackend, kernels=kernels)
            asked = deploy.CachedFile(prefill, context)
            proof = deploy.verify_cached(opened, asked, eval_text, cached, clock, kernels)
            typer.echo(f"fed in steps of {', '.join(map(str, proof.steps))} tokens")
    typer.echo(report_table.verdict(proof.comparison, kernels))
    report_table.fail_on_difference([*map(str, proof.comparison.differences)])


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
    """Writes the model for another length, with a KV cache, or for LiteRT-LM."""
    with importing():
        from qnpu_jax import deploy
        from qnpu_jax.cli.display import Display
        from qnpu_jax.cli.tables import megabytes
        from qnpu_jax.output import OutputFolder
    with Display() as clock, clock.stage("write"):
        opened = OutputFolder.open(folder)
        if litertlm:
            slots = PACKAGED_CONTEXT if context is None else context
            deploy.package(opened, file, deploy.CachedFile(prefill, slots, profile))
        else:
            deploy.export(opened, file, prefill, logits, context, profile)
    typer.echo(f"wrote {file}, {megabytes(file.stat().st_size)}")


TopK = Annotated[int, typer.Option(help="Of the k likeliest; 0 for all.")]
TopP = Annotated[float, typer.Option(help="Of the likeliest up to this probability.")]
BackendName = Annotated[
    Literal["litert", "sim"], typer.Option(help="LiteRT on this CPU, or the simulator.")
]


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="What the user says, or with --raw any text.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without a chat.")] = False,
    system: Annotated[
        str | None, typer.Option(help="System message that the chat begins with.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    backend: BackendName = "litert",
    kernels: Kernels = "xnn",
    threads: Threads = 1,
    prefill: Prefill = 128,
    context: Context = 512,
    profile: Profile = "plain",
) -> None:
    """Generates text, and tells how many tokens a second."""
    with importing():
        from qnpu_jax import deploy, runtime
        from qnpu_jax.cli.display import Display
        from qnpu_jax.cli.streaming import stream
        from qnpu_jax.output import OutputFolder
    sampling = runtime.Sampling(temperature, top_k, top_p, seed)
    opened = OutputFolder.open(folder)
    if raw:
        check_unused("system", system, None, "--raw, which is no chat")
    said = [("system", system), ("user", prompt)]
    chat = [{"role": role, "content": text} for role, text in said if text is not None]
    ids = runtime.prompt_ids(opened.tokenizer, prompt if raw else chat, bos=not opened.prefix)
    runtime.check_room(len(ids), 0, context)
    with Display() as clock, clock.stage("load"):
        runner: runtime.Backend
        if backend == "sim":
            check_unused("profile", profile, "plain", "--backend sim, which reads no file")
            runner = runtime.SimulatedBackend(opened.model, prefill, context)
        else:
            file = deploy.cached_file(opened, deploy.CachedFile(prefill, context, profile))
            runner = runtime.LiteRTBackend(file, kernels, threads=threads)
    stream(runner, opened.tokenizer, ids, sampling, max_tokens, raw=raw)


@app.command()
def graph(
    model: Model = "smollm2-135m",
    recipe: RecipeName = "w8a8",
    prefill: Prefill = 128,
    prefix: Annotated[int, typer.Option(help="Tokens of constant keys and values.")] = 2,
) -> None:
    """Prints the quantized decoder: embed, one layer, head."""
    with importing():
        from qnpu_jax.graph import decoder
        from qnpu_jax.models import load_params
        from qnpu_jax.recipes import load_recipe
    asked, config = load_recipe(recipe), load_params(model)[0]
    width = config.intermediate_size + asked.split_channels
    config = replace(config, intermediate_size=width)
    for part in decoder(config, asked.bits, prefill, prefix).graphs:
        typer.echo(str(part))


def call() -> int:
    """Runs the command line; returns the exit status. A user's mistake is one line on stderr.

    Raises:
      KeyboardInterrupt: nothing is left behind.
    """
    if unreadable := [a for a in sys.argv[1:] if not is_text(a)]:
        return complain(f"argument {unreadable[0]!r}: not UTF-8; expected text; correct it")
    try:
        status = app(standalone_mode=False, prog_name="qnpu")
    except Interrupted as interrupted:
        return complain(str(interrupted), INTERRUPTED)
    except UserError as error:
        return complain(str(error))
    except TyperException as error:  # a misspelt option, a missing argument
        message = error.format_message().rstrip(".?")
        command = getattr(getattr(error, "ctx", None), "command_path", "qnpu")
        return complain(f"{message}; see `{command} --help`") if message else 2
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror or error}; check the file")
    if status == INTERRUPTED:  # what typer makes of Ctrl-C
        raise KeyboardInterrupt
    return status or 0
