"""The commands about NPUs: compile, compare."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qnpu_jax import deploy
from qnpu_jax.cli.display import Display, megabytes
from qnpu_jax.cli.options import Context, EvalText, Folder, Prefill
from qnpu_jax.cli.simulated import Simulated
from qnpu_jax.npu.compare import LayerDifference, OpDifference
from qnpu_jax.npu.hexagon import SOCS, Compiled
from qnpu_jax.npu.profile import DEFAULT, ProfileName

app = typer.Typer()
Profile = Annotated[
    ProfileName, typer.Option(help="hexagon: norms as the NPU's own op; plain: as for CPUs.")
]
Soc = Annotated[str, typer.Option(help=f"Snapdragon: {', '.join(SOCS)}.")]


@app.command()
def compile(
    folder: Folder,
    soc: Soc = "SM8650",
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
    """Compiles a model for a Snapdragon's Hexagon NPU with Qualcomm's compiler (extra: qnn).

    Exit status 1 where not every op is on the NPU, in one partition.
    """
    with Display() as clock, clock.stage("compile"):
        made = deploy.compiled(folder, soc, prefill, context, profile, share=share_weights)
    _print_compiled(made)
    typer.echo(f"wrote {made.path}")
    if not all(s.whole for s in made.signatures):
        typer.echo("not all of it is on the NPU: the CPU runs the rest", err=True)
        raise typer.Exit(1)


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
            folder, soc, chosen, windows, tokens, eval_text, Simulated, clock, profile
        )
    console = Console(soft_wrap=False)
    if chosen:
        console.print(_ops_table(found["ops"], soc))
        console.print(_layers_table(found["layers"]))
    if windows:
        scores = found["perplexity"]
        ratio = 100 * (scores["emulator"] / scores["simulator"] - 1)
        typer.echo(
            f"perplexity of {windows} x {tokens} tokens: simulator {scores['simulator']:.2f},"
            f" {soc} emulator {scores['emulator']:.2f} ({ratio:+.2f}%);"
            f" {100 * found['differing']:.1f}% of the logits' codes differ"
        )


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
