"""The commands about NPUs: compile, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from qnpu_jax.choices import EthosU, FormName, Snapdragon
from qnpu_jax.cli import importing
from qnpu_jax.cli.options import Context, EvalText, Folder, Prefill, Profile, check_unused
from qnpu_jax.errors import UserError

DEFAULT: FormName = "hexagon"
"""Of what is compiled for Hexagon."""

app = typer.Typer()
SNAPDRAGONS = f"Snapdragon: {', '.join(get_args(Snapdragon))}."
Soc = Annotated[str, typer.Option(help=SNAPDRAGONS)]
Target = Annotated[str, typer.Option(help=f"{SNAPDRAGONS} Ethos-U: {', '.join(get_args(EthosU))}.")]
ShareWeights = Annotated[
    bool,
    typer.Option(
        "--share-weights",
        help="One copy of the weights for both signatures; LiteRT: not on phones.",
    ),
]


@app.command()
def compile(
    folder: Folder,
    soc: Target = "SM8650",
    prefill: Prefill = 128,
    context: Context = 512,
    profile: Profile = DEFAULT,
    share_weights: ShareWeights = False,
) -> None:
    """Compiles for a Snapdragon's Hexagon NPU or an Arm Ethos-U.

    Qualcomm's compiler (extra: qnn) counts DDR bytes; Arm's vela (extra:
    ethos) estimates latency. Exit status 1 where not every op is on the
    NPU, in one partition.
    """
    with importing():
        from qnpu_jax import deploy
        from qnpu_jax.cli import compiler_tables
        from qnpu_jax.cli.display import Display
        from qnpu_jax.output import OutputFolder
    deploy.check_target(soc)
    if soc in get_args(EthosU):
        check_unused("profile", profile, DEFAULT, f"{soc}, which has a form of its own")
        _compile_for_arm(folder, soc, prefill, context, share_weights)
        return
    with Display() as clock, clock.stage("compile"):
        opened = OutputFolder.open(folder)
        asked = deploy.CachedFile(prefill, context, profile)
        made = deploy.compile_for_hexagon(opened, soc, asked, share=share_weights)
    compiler_tables.print_for_hexagon(made)
    typer.echo(f"wrote {made.path}")
    _exit(whole=all(s.whole for s in made.signatures))


def _compile_for_arm(folder: Path, soc: str, prefill: int, context: int, share: bool) -> None:
    from qnpu_jax import deploy
    from qnpu_jax.cli import compiler_tables
    from qnpu_jax.cli.display import Display
    from qnpu_jax.output import OutputFolder

    if share:
        raise UserError(
            f"--share-weights: not for {soc}, whose signatures are files of their own; expected a"
            " Snapdragon; leave it out"
        )
    with Display() as clock, clock.stage("compile"):
        made = deploy.compile_for_arm(OutputFolder.open(folder), soc, prefill, context)
    compiler_tables.print_for_arm(soc, made, prefill)
    for found in made.values():
        typer.echo(f"wrote {found.path}")
    _exit(whole=all(c.placement.whole for c in made.values()))


def _exit(*, whole: bool) -> None:
    if not whole:
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
    """Runs Qualcomm's Hexagon emulator beside the simulator (extra: qnn).

    Single ops and whole layers are compared in codes and in relative
    error, the model in perplexity.
    """
    with importing():
        from qnpu_jax import deploy
        from qnpu_jax.cli import compiler_tables
        from qnpu_jax.cli.display import Display
        from qnpu_jax.output import OutputFolder
        from qnpu_jax.proof import Simulated
    chosen = [0] if layers is None else layers
    asked = deploy.EmulationRequest(soc, tuple(chosen), windows, tokens, eval_text, profile)
    with Display() as watch:
        found = deploy.emulate(OutputFolder.open(folder), asked, Simulated, watch)
    if chosen:
        compiler_tables.print_differences(found.ops, found.layers, soc)
    if windows:
        typer.echo(f"perplexity of {windows} x {tokens} tokens, {soc}: {found.text}")
