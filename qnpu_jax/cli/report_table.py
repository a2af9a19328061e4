"""The table that `qnpu quantize` ends with, and what is said where simulator and LiteRT differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from qnpu_jax import artifacts
from qnpu_jax.choices import KernelSet
from qnpu_jax.cli.tables import megabytes
from qnpu_jax.proof import Comparison

SHOWN = 20
"""Differing tensors that are named: the first says most."""
KERNELS: dict[KernelSet, str] = {
    "ref": "LiteRT's reference kernels",
    "opt": "LiteRT's optimized kernels",
    "xnn": "LiteRT's XNNPACK",
    "tf": "TensorFlow's reference kernels",
}


def show(report: dict[str, Any]) -> None:
    """Prints a report of `qnpu quantize` as one table, in groups."""
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
        ("size", artifacts.MODEL, megabytes(report["bytes"])),
        ("", "signature", f"prefill of {report['prefill']} tokens, logits {report['logits']}"),
    ]
    yield [
        ("accumulators", "overflow", "none can, by proof from the weights"),
        ("", "closest", f"{closest['needed']} of {closest['available']} bits: {closest['tensor']}"),
    ]
    if rotations := report["rotations"]:
        first, *rest = rotations.items()
        yield [("rotations", *first), *(("", *row) for row in rest)]
    if report["norms"] == "twice":
        yield [("norms", "taken twice", "some tokens are over 30 times as long as the median one")]
    if (channels := report["mlp_channels"])["added"]:
        added = f"{channels['added']} to {channels['original']:,}, copies of the loudest"
        yield [("MLP", "channels added", added)]
    if prefix:
        yield _prefix_rows(prefix)
    if report["learned"]:
        yield [("learning", "effort", report["effort"]), *map(_stage_row, report["learned"])]
    taken = [*seconds.items(), ("total", sum(seconds.values()))]
    times = [("", stage, f"{value:.1f}") for stage, value in taken]
    yield [("seconds", *times[0][1:]), *times[1:]]


def _prefix_rows(prefix: dict[str, Any]) -> list[tuple[str, str, str]]:
    before, after = max(prefix["before"]), max(prefix["after"])
    none = "none needed" if prefix["ok"] else "none helps"
    rows = [
        ("prefix", "tokens", ", ".join(map(str, prefix["tokens"])) or none),
        ("", "outliers", f"{before:.0f} -> {after:.0f} times the median token"),
    ]
    if not prefix["ok"]:
        said = (
            f"no prefix tames the outliers: {after:.0f} times the median token; ranges by min-max"
        )
        rows.append(("", "warning", said))
    return rows


def _stage_row(stage: dict[str, Any]) -> tuple[str, str, str]:
    kls = stage["held_out_kl"]
    taken = f"{stage['taken']} of {stage['steps']} steps"
    if retreats := stage.get("retreats"):
        taken += f" at 1/{4**retreats} of its rates, as it diverged"
    return "", f"stage {stage['stage']}", f"{taken}, held-out KL {kls[0]:.4g} -> {min(kls):.4g}"


def verdict(found: Comparison, kernels: KernelSet = "ref") -> str:
    """How many elements and tensors differ, as one line."""
    return f"{found} (simulator against {KERNELS[kernels]})"


def fail_on_difference(differences: Sequence[str]) -> None:
    """Ends the command with status 1 where an element differs, after the first tensors that do."""
    for line in differences[:SHOWN]:
        typer.echo(line, err=True)
    if len(differences) > SHOWN:
        typer.echo(f"... and {len(differences) - SHOWN:,} more", err=True)
    if differences:
        raise typer.Exit(1)
