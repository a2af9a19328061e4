"""The commands about NPUs: compile, compare."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qnpu_jax import deploy
from qnpu_jax.cli.display import Display, megabytes
from qnpu_jax.cli.options import Context, EvalText, Folder, Prefill, Profile, check_unused
from qnpu_jax.compilers import SOCS, Compiled, LayerDifference, OpDifference, ethos
from qnpu_jax.errors import UserError
from qnpu_jax.output import OutputFolder
from qnpu_jax.proof import Simulated
from qnpu_jax.tflite import DEFAULT

app = typer.Typer()
Soc = Annotated[str, typer.Option(help=f"Snapdragon: {', '.join(SOCS)}.")]
Target = Annotated[
    str,
    typer.Option(help=f"Snapdragon: {', '.join(SOCS)}. Ethos-U: {', '.join(ethos.ACCELERATORS)}."),
]


@app.command()
def compile(
    folder: Folder,
    soc: Target = "SM8650",
    prefill: Prefill = 128,
    context: Context = 512,
    profile: Profile = DEFAULT,
    share_weights: Annotated[
        bool,
        typer.Option(
            "--share-weights",
            help="One copy of the weights for both signatures; LiteRT: not on phones.",
        ),
    ] = False,
) -> None:
    """Compiles a model for a Snapdragon's Hexagon NPU with Qualcomm's compiler (extra: qnn), or for
    an Arm Ethos-U with vela (extra: ethos), which estimates its latency.

    Exit status 1 where not every op is on the NPU, in one partition.
    """
    deploy.check_target(soc)
    if soc in ethos.ACCELERATORS:
        check_unused("profile", profile, DEFAULT, f"{soc}, which has a form of its own")
        _compile_for_arm(folder, soc, prefill, context, share_weights)
        return
    with Display() as clock, clock.stage("compile"):
        made = deploy.compiled(
            OutputFolder.open(folder), soc, prefill, context, profile, share=share_weights
        )
    _print_compiled(made)
    typer.echo(f"wrote {made.path}")
    _exit(whole=all(s.whole for s in made.signatures))


@app.command()
def compare(
    folder: Folder,
    npu: Annotated[
        bool, typer.Option("--npu", help="The emulated NPU; `verify` is for LiteRT.")
    ] = True,
    soc: Soc = "SM8650",
    layers: Annotated[
        list[int] | None, typer.Option(help="Layer to compare op by op; repeatable; the first.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of a window of text.")] = 128,
    windows: Annotated[int, typer.Option(min=0, help="Scored; 0: layers only.")] = 3,
    eval_text: EvalText = None,
    profile: Profile = DEFAULT,
) -> None:
    """Runs ops, layers and the whole model in Qualcomm's Hexagon emulator, beside the simulator
    (extra: qnn)."""
    chosen = [0] if layers is None else layers
    with Display() as clock:
        found = deploy.emulated(
            OutputFolder.open(folder),
            soc,
            chosen,
            windows,
            tokens,
            eval_text,
            Simulated,
            clock,
            profile,
            clock.track,
        )
    console = Console(soft_wrap=False)
    if chosen:
        console.print(_ops_table(found["ops"], soc))
        console.print(_layers_table(found["layers"]))
    if windows:
        typer.echo(f"perplexity of {windows} x {tokens} tokens, {soc}: {found['text']}")


def _exit(*, whole: bool) -> None:
    if not whole:
        typer.echo("not all of it is on the NPU: the CPU runs the rest", err=True)
        raise typer.Exit(1)


def _compile_for_arm(folder: Path, soc: str, prefill: int, context: int, share: bool) -> None:
    if share:
        raise UserError(
            f"--share-weights: not for {soc}, whose signatures are files of their own; expected a"
            " Snapdragon; leave it out"
        )
    with Display() as clock, clock.stage("compile"):
        made = deploy.compiled_for_arm(OutputFolder.open(folder), soc, prefill, context)
    _print_arm(soc, made, prefill)
    for found in made.values():
        typer.echo(f"wrote {found.path}")
    _exit(whole=all(c.placement.whole for c in made.values()))


def _print_arm(soc: str, made: dict[str, ethos.Compiled], prefill: int) -> None:
    chip = soc.replace("ethos-u", "Ethos-U")
    table = Table(title=f"Arm's estimate for {chip}, not a phone", title_justify="left")
    table.add_column("")
    for name in made:
        table.add_column(name, justify="right")
    columns = [_arm_column(c, 1 if name == "decode" else prefill) for name, c in made.items()]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    Console(soft_wrap=False).print(table)
    for name, c in made.items():
        for op, count in c.placement.on_cpu.items():
            typer.echo(f"{name}: {count} {op} on the CPU: {c.reasons.get(op, 'no reason given')}")
    e = next(iter(made.values())).estimate
    typer.echo(
        f"all by Arm's compiler vela, in its model of {chip} at {e.clock / 1e9:.1f} GHz:"
        f" {e.sram / 2**20:.0f} MiB of SRAM at {e.sram_rate / 1e9:.0f} GB/s, DRAM at"
        f" {e.dram_rate / 1e9:.0f} GB/s ({e.system}, {e.memory_mode}); a CPU's ops are not"
        f" in it; compiled in {sum(c.compile_seconds for c in made.values()):.0f} s"
    )


def _arm_column(c: ethos.Compiled, tokens: int) -> dict[str, str]:
    """Of one signature, by label."""
    p, e = c.placement, c.estimate
    return {
        "ops on the NPU": f"{p.on_npu:,} of {p.ops:,}",
        "parts on the NPU": f"{p.parts:,}",
        "estimated latency": f"{1000 * e.seconds:.2f} ms",
        "estimated tokens/s": f"{tokens / e.seconds:.1f}",
        "NPU cycles": f"{e.npu_cycles:,}",
        "cycles with memory": f"{e.cycles:,}",
        "SRAM traffic": megabytes(e.sram_bytes),
        "DRAM traffic": megabytes(e.dram_bytes),
        "weights": megabytes(e.weights),
        "weights, encoded": megabytes(e.encoded),
        "constants": megabytes(p.constants),
        "arena": megabytes(p.arena),
        "SRAM used": megabytes(p.sram),
    }


def _print_compiled(made: Compiled) -> None:
    table = Table(title=f"{made.soc}, Qualcomm's compiler", title_justify="left")
    for name in ("signature", "ops on the NPU", "partitions", "DDR read", "written", "spilled"):
        table.add_column(name, justify="left" if name == "signature" else "right")
    for s in made.signatures:
        moved = (s.traffic.read, s.traffic.write, s.traffic.spill + s.traffic.fill)
        table.add_row(s.name, f"{s.on_npu} of {s.ops}", str(s.partitions), *map(megabytes, moved))
    Console(soft_wrap=False).print(table)
    typer.echo(
        f"compiled in {made.seconds:.1f} s with {made.peak_bytes / 2**20:.0f} MiB; the file has"
        f" {megabytes(made.size)}; DDR bytes are those of one inference, by the compiler"
    )


def _ops_table(rows: list[OpDifference], soc: str) -> Table:
    """Differences by kind of op."""
    kinds: dict[str, list[OpDifference]] = defaultdict(list)
    for row in rows:
        kinds[row.op].append(row)
    table = Table(title=f"{soc} emulator less simulator, in codes", title_justify="left")
    for name in ("op", "tensors", "differ", "at most", "mean", "in"):
        table.add_column(name, justify="left" if name in ("op", "in") else "right")
    for op, group in sorted(kinds.items()):
        size = sum(r.size for r in group)
        worst = max(group, key=lambda r: r.largest)
        table.add_row(
            op,
            str(len(group)),
            f"{100 * sum(r.count for r in group) / size:.2f}%",
            str(worst.largest),
            f"{sum(r.shift * r.size for r in group) / size:+.3f}",
            worst.tensor if worst.largest else "",
        )
    return table


def _layers_table(rows: list[LayerDifference]) -> Table:
    table = Table(title="relative error of what a layer adds", title_justify="left")
    for name in ("layer", "simulator to float", "emulator to float", "between the two"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(str(r.layer), *(f"{x:.5f}" for x in (r.simulator, r.emulator, r.between)))
    return table
