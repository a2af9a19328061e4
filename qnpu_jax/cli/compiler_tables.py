"""Tables of `qnpu compile` and `qnpu compare`: what NPU compilers made, and how an NPU differs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import typer
from rich.table import Table

from qnpu_jax.cli.tables import megabytes, show, table
from qnpu_jax.compilers import CompiledForArm, CompiledForHexagon, LayerDifference, OpDifference


def print_for_arm(soc: str, made: dict[str, CompiledForArm], prefill: int) -> None:
    """Prints Arm's estimate of each signature, ops that the CPU runs, and what it supposes."""
    chip = soc.replace("ethos-u", "Ethos-U")
    shown = table(f"Arm's estimate for {chip}, not a phone", ("", *made), left=[""])
    columns = [_arm_column(c, 1 if name == "decode" else prefill) for name, c in made.items()]
    for label in columns[0]:
        shown.add_row(label, *(column[label] for column in columns))
    show(shown)
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


def _arm_column(c: CompiledForArm, tokens: int) -> dict[str, str]:
    """The cells of one signature, by label."""
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


def print_for_hexagon(made: CompiledForHexagon) -> None:
    """Prints what Qualcomm's compiler put on the NPU, and the DDR bytes that it counts."""
    columns = ("signature", "ops on the NPU", "partitions", "DDR read", "written", "spilled")
    shown = table(f"{made.soc}, Qualcomm's compiler", columns, left=["signature"])
    for s in made.signatures:
        moved = (s.traffic.read, s.traffic.write, s.traffic.spill + s.traffic.fill)
        shown.add_row(s.name, f"{s.on_npu} of {s.ops}", str(s.partitions), *map(megabytes, moved))
    show(shown)
    typer.echo(
        f"compiled in {made.seconds:.1f} s with {made.peak_bytes / 2**20:.0f} MiB; the file has"
        f" {megabytes(made.size)}; DDR bytes are those of one inference, by the compiler"
    )


def print_differences(
    ops: Sequence[OpDifference], layers: Sequence[LayerDifference], soc: str
) -> None:
    """Prints how Hexagon's emulator differs from the simulator, by kind of op and by layer."""
    show(_ops(ops, soc), _layers(layers))


def _ops(rows: Sequence[OpDifference], soc: str) -> Table:
    kinds: dict[str, list[OpDifference]] = defaultdict(list)
    for row in rows:
        kinds[row.op].append(row)
    columns = ("op", "tensors", "differ", "at most", "mean", "in")
    made = table(f"{soc} emulator less simulator, in codes", columns, left=["op", "in"])
    for op, group in sorted(kinds.items()):
        size = sum(r.size for r in group)
        worst = max(group, key=lambda r: r.largest)
        made.add_row(
            op,
            str(len(group)),
            f"{100 * sum(r.count for r in group) / size:.2f}%",
            str(worst.largest),
            f"{sum(r.shift * r.size for r in group) / size:+.3f}",
            worst.tensor if worst.largest else "",
        )
    return made


def _layers(rows: Sequence[LayerDifference]) -> Table:
    columns = ("layer", "simulator to float", "emulator to float", "between the two")
    made = table("relative error of what a layer adds", columns)
    for r in rows:
        made.add_row(str(r.layer), *(f"{x:.5f}" for x in (r.simulator, r.emulator, r.between)))
    return made
