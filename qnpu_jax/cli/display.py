"""What the command shows: on stderr how a run goes, on stdout what came out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from qnpu_jax import artifacts, progress

SECONDS = 30.0
"""Between two lines about learning, where stderr is no terminal."""


class Display(progress.Observer):
    """Shows the running stage on stderr: as a bar where that is a terminal; elsewhere only learning
    is worth a line, now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:16}"),
            BarColumn(10),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            speed_estimate_period=300.0,
        )
        self._task = TaskID(0)
        self._learning: int | None = None
        self._first, self._since = 0, 0.0
        self._shown: float | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage: its bar only pulses, until `track` knows how many steps there are."""
        self._task = self._progress.add_task(name, total=None)
        try:
            with super().stage(name):
                yield
        finally:
            self._progress.remove_task(self._task)

    def track(self, items: Iterable[Any], length: int, what: str) -> Iterable[Any]:
        """Shows the running stage's steps."""
        task = self._task
        self._progress.update(task, description=what, total=length, completed=0)
        for item in items:  # rich's own `track` starts a thread, which Ctrl-C may orphan
            yield item
            self._progress.advance(task)

    def learned(self, stage: int, step: int, steps: int, loss: float, held_out: float) -> None:
        """Shows step, loss, the best held-out KL and the time left in the stage."""
        now = time.monotonic()
        if stage != self._learning:  # its first step compiles, which says nothing of the others
            self._learning, self._first, self._since, self._shown = stage, step, now, None
            self._progress.reset(self._task, total=steps, completed=step)
        what = f"learn {stage + 1}: {step}/{steps}, loss {loss:.3g}, KL {held_out:.3g}"
        self._progress.update(self._task, completed=step, description=what)
        due = step == steps or self._shown is None or now - self._shown >= SECONDS
        if due and not self._console.is_terminal:
            self._shown = now
            done = step - self._first
            left = f"{(now - self._since) / done * (steps - step):.0f} s left" if done else "..."
            self.say(
                f"learning, stage {stage + 1}: step {step} of {steps}, loss {loss:.4g}, held-out KL"
                f" {held_out:.4g}, {left}"
            )

    def say(self, message: str) -> None:
        """One line, above the bar if there is one."""
        self._console.print(f"qnpu: {message}", markup=False, highlight=False, soft_wrap=True)


def print_report(report: dict[str, Any]) -> None:
    """The table that `qnpu quantize` ends with."""
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
    return "", f"stage {stage['stage']}", f"{taken}, held-out KL {kls[0]:.4g} -> {min(kls):.4g}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
