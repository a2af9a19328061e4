"""`qnpu bench`: latency measured on this CPU, estimated for a Snapdragon, measured on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qnpu_jax import deploy
from qnpu_jax.cli.display import Display
from qnpu_jax.cli.options import Context, Folder, Prefill, Profile, Threads, check_unused
from qnpu_jax.errors import UserError
from qnpu_jax.integer import IntegerModel
from qnpu_jax.latency import Timing, adb, cpu, phone, roofline
from qnpu_jax.output import OutputFolder
from qnpu_jax.tflite import PROFILES, Integers, cached_decoder

app = typer.Typer()


@app.command()
def bench(
    folder: Folder,
    prefill: Prefill = 128,
    context: Context = 512,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each signature.")] = 15,
    on_phone: Annotated[
        bool, typer.Option("--adb", help="On an attached phone, with --binary.")
    ] = False,
    serial: Annotated[str | None, typer.Option(help="Which phone, where several are.")] = None,
    binary: Annotated[
        Path | None, typer.Option(help="LiteRT's benchmark_model, built for the phone.")
    ] = None,
    delegate: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(phone.DELEGATES)}; repeatable; cpu."),
    ] = None,
    library: Annotated[
        list[Path] | None, typer.Option(help="Shared library to push along; repeatable.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="File for the phone, as of `qnpu compile`.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the adb commands, run none.")
    ] = False,
    profile: Profile = "plain",
) -> None:
    """Latency of prefill and decode: on this CPU beside float32, and estimated for Snapdragons.

    With --adb, on a phone instead. No phone was at hand when this was written: those runs are
    untested.
    """
    if not (on_phone or dry_run):
        _host(PROFILES[profile](OutputFolder.open(folder).model), prefill, context, threads, rounds)
        return
    if binary is None:
        raise UserError(
            "--binary: missing; expected LiteRT's benchmark_model for the phone's CPU; build or"
            " download it, and give its path"
        )
    if model is not None:
        check_unused("profile", profile, "plain", f"--model {model}, which has its own")
    file = model or deploy.deployed(OutputFolder.open(folder), prefill, context, profile)
    delegates: Any = tuple(delegate or ["cpu"])  # `phone.check` refuses others
    options = (delegates, tuple(library or ()), serial, threads, rounds)
    _phone(phone.Request(file, binary, *options), dry_run)


def _host(stored: Integers, prefill: int, context: int, threads: int, rounds: int) -> None:
    with Display() as watch, watch.stage("measure"):
        rows = cpu.compare(
            stored,
            prefill,
            context,
            threads,
            rounds,
            lambda steps, length: watch.track(steps, length, "measure"),
        )
    _print_host(rows, threads)
    _print_estimates(stored.model, prefill, context)


def _phone(request: phone.Request, dry_run: bool) -> None:
    phone.check(request)
    if dry_run:
        for command in phone.commands(request, phone.signatures(request.model)):
            typer.echo(adb.quoted(command))
        return
    timings: list[Timing] = []
    try:
        timings.extend(phone.run(request))
    finally:  # what was measured before an error
        if timings:
            _print_phone(timings)


def _print_phone(timings: Sequence[Timing]) -> None:
    columns = ("delegate", "signature", "ms", "tokens/s", "delegated")
    table = _table("on the phone", columns, texts=2)
    for t in timings:
        speed = (f"{1000 * t.average:.2f}", f"{t.tokens_per_second:.1f}")
        table.add_row(t.delegate, t.signature, *speed, str(t.delegation))
    Console(soft_wrap=False).print(table)


def _print_host(rows: Sequence[cpu.Row], threads: int) -> None:
    title = f"this CPU, {threads} thread{'s' * (threads > 1)}, LiteRT's default kernels, medians"
    table = _table(title, ("model", "signature", "ms", "tokens/s", "times float32"), texts=2)
    faster = cpu.speedups(rows)
    for r in rows:
        ratio = f"{faster[r.signature]:.2f}" if r.reader == cpu.INTEGERS else ""
        speed = (f"{1000 * r.median:.2f}", f"{r.tokens_per_second:.1f}")
        table.add_row(r.reader, r.signature, *speed, ratio)
    Console(soft_wrap=False).print(table)


def _print_estimates(model: IntegerModel, prefill: int, context: int) -> None:
    table = _table(
        "estimates, not measurements: the larger of bytes / bandwidth and MACs / rate",
        ("SoC", "signature", "ms", "tokens/s", "bound by", "fit's error"),
        texts=2,
    )
    for name in roofline.SOCS:
        for key, tokens in ((f"prefill_{prefill}", prefill), ("decode", 1)):
            dec = cached_decoder(model, tokens, context)
            found = roofline.estimate(
                roofline.soc(name), roofline.least_bytes(dec), roofline.macs(dec)
            )
            speed = (f"{1000 * found.seconds:.2f}", f"{tokens / found.seconds:.0f}")
            table.add_row(name, key, *speed, found.limit, f"{100 * found.error:.0f}%")
    console = Console(soft_wrap=False)
    console.print(table)
    table = _table(
        "the same estimate of published runs, each left out of its fit (tokens/s)",
        ("SoC", "model", "phase", "estimate", "published", "error"),
        texts=3,
    )
    for v in roofline.validation():
        values = (f"{v.predicted:.1f}", f"{v.measured:.1f}", f"{100 * v.error:+.1f}%")
        table.add_row(v.soc, v.model, v.phase, *values)
    console.print(table)


def _table(title: str, columns: Sequence[str], texts: int) -> Table:
    """A table whose first `texts` columns are not numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < texts else "right")
    return table
