"""`qnpu bench`: latency measured on this CPU, estimated for a Snapdragon, measured on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from qnpu_jax.choices import Delegate
from qnpu_jax.cli import importing
from qnpu_jax.cli.options import Context, Folder, Prefill, Profile, Threads, check_unused
from qnpu_jax.errors import UserError

app = typer.Typer()

Rounds = Annotated[int, typer.Option(min=1, help="Calls of each signature.")]
OnPhone = Annotated[bool, typer.Option("--adb", help="On an attached phone, with --binary.")]
Serial = Annotated[str | None, typer.Option(help="Which phone, where several are.")]
Binary = Annotated[Path | None, typer.Option(help="LiteRT's benchmark_model, built for the phone.")]
Delegates = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(get_args(Delegate))}; repeatable; cpu.")
]
Libraries = Annotated[
    list[Path] | None, typer.Option(help="Shared library to push along; repeatable.")
]
File = Annotated[Path | None, typer.Option(help="File for the phone, as of `qnpu compile`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the adb commands, run none.")]


@app.command()
def bench(
    folder: Folder,
    prefill: Prefill = 128,
    context: Context = 512,
    threads: Threads = 1,
    rounds: Rounds = 15,
    on_phone: OnPhone = False,
    serial: Serial = None,
    binary: Binary = None,
    delegate: Delegates = None,
    library: Libraries = None,
    model: File = None,
    dry_run: DryRun = False,
    profile: Profile = "plain",
) -> None:
    """Measures latency on this CPU, beside float32, and estimates Snapdragons'.

    Prefill and decode, over a KV cache. With --adb, on a phone instead.
    No phone was at hand when this was written: those runs are untested.
    """
    if not (on_phone or dry_run):
        for name, value in (("binary", binary), ("serial", serial), ("model", model)):
            check_unused(name, value, None, "this CPU, without --adb")
        for name, several in (("delegate", delegate), ("library", library)):
            check_unused(name, " ".join(map(str, several or ())), "", "this CPU, without --adb")
        _on_cpu(folder, profile, prefill, context, threads, rounds)
        return
    if binary is None:
        raise UserError(
            "--binary: missing; expected LiteRT's benchmark_model for the phone's CPU; build or"
            " download it, and give its path"
        )
    for name in delegate or []:
        if name not in get_args(Delegate):
            expected = ", ".join(get_args(Delegate))
            raise UserError(f"--delegate {name}: expected one of {expected}; correct it")
    if model is not None:
        check_unused("profile", profile, "plain", f"--model {model}, which has its own")
    with importing():
        from qnpu_jax import deploy
        from qnpu_jax.latency import PhoneRequest
        from qnpu_jax.output import OutputFolder
    asked = deploy.CachedFile(prefill, context, profile)
    file = model or deploy.cached_file(OutputFolder.open(folder), asked)
    delegates: Any = tuple(delegate or ["cpu"])
    options = (delegates, tuple(library or ()), serial, threads, rounds)
    _on_phone(PhoneRequest(file, binary, *options), dry_run)


def _on_cpu(
    folder: Path, profile: Profile, prefill: int, context: int, threads: int, rounds: int
) -> None:
    with importing():
        from qnpu_jax.cli.display import Display
        from qnpu_jax.cli.latency_tables import print_cpu, print_estimates
        from qnpu_jax.latency import time_against_float
        from qnpu_jax.output import OutputFolder
        from qnpu_jax.tflite import FORMS
    with Display() as watch, watch.stage("measure"):
        form = FORMS[profile](OutputFolder.open(folder).model)
        rows = time_against_float(
            form,
            prefill,
            context,
            threads,
            rounds,
            lambda steps, length: watch.track(steps, length, "measure"),
        )
    print_cpu(rows, threads)
    print_estimates(form.model, prefill, context)


def _on_phone(request: Any, dry_run: bool) -> None:
    """Runs a `PhoneRequest`, or prints what would be run."""
    from qnpu_jax.cli.latency_tables import print_phone
    from qnpu_jax.latency import PhoneTiming, adb, phone, time_on_phone

    phone.check_request(request)
    if dry_run:
        for command in phone.commands(request, phone.signatures(request.model)):
            typer.echo(adb.quoted(command))
        return
    timings: list[PhoneTiming] = []
    try:
        timings.extend(time_on_phone(request))
    finally:  # what was measured before an error
        if timings:
            print_phone(timings)
