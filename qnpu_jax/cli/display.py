"""How a run goes, on stderr: a bar on a terminal, lines elsewhere."""

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

from qnpu_jax import progress

SECONDS = 30.0
"""Between two lines about a stage, where stderr is no terminal."""


class Display(progress.Observer):
    """Shows the running stage on stderr.

    A terminal shows a bar. Elsewhere every stage has a line when it begins, which says how long the
    run has taken so far, and one every SECONDS where its steps are counted.
    """

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
        self._learning: tuple[int, int] | None = None  # stage and step
        self._first, self._since = 0, 0.0
        self._began = time.monotonic()
        self._shown: float | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announces a stage. Its bar only pulses, until `track` knows how many steps there are."""
        now = time.monotonic()
        after = f"; {now - self._began:.0f} s so far" if now - self._began >= 1 else ""
        self._line(f"{name}{after}", now)
        self._task = self._progress.add_task(name, total=None)
        try:
            with super().stage(name):
                yield
        finally:
            self._progress.remove_task(self._task)

    def track(self, items: Iterable[Any], length: int, what: str) -> Iterable[Any]:
        """Shows the running stage's steps, and the time left."""
        task, since = self._task, time.monotonic()
        self._progress.update(task, description=what, total=length, completed=0)
        # rich's own `track` starts a thread, which Ctrl-C may orphan
        for done, item in enumerate(items):
            now = time.monotonic()
            if self._due(now):
                left = _left(now - since, done, length)
                self._line(f"{what}: {done} of {length}, {left}", now)
            yield item
            self._progress.advance(task)

    def learned(self, stage: int, step: int, steps: int, loss: float, held_out: float) -> None:
        """Shows step, loss, the best held-out KL and the time left in the stage."""
        now = time.monotonic()
        # The first step of a stage, or of one that begins anew, compiles: it tells no time.
        if self._learning is None or (stage, step) <= self._learning or stage > self._learning[0]:
            self._first, self._since, self._shown = step, now, None
            self._progress.reset(self._task, total=steps, completed=step)
        self._learning = stage, step
        what = f"learn {stage + 1}: {step}/{steps}, loss {loss:.3g}, KL {held_out:.3g}"
        self._progress.update(self._task, completed=step, description=what)
        if step == steps or self._due(now):
            left = _left(now - self._since, step - self._first, steps - self._first)
            self._line(
                f"learning, stage {stage + 1}: step {step} of {steps}, loss {loss:.4g}, held-out KL"
                f" {held_out:.4g}, {left}",
                now,
            )

    def _due(self, now: float) -> bool:
        return self._shown is None or now - self._shown >= SECONDS

    def _line(self, message: str, now: float) -> None:
        """Says something that a terminal's bar shows."""
        if not self._console.is_terminal:
            self._shown = now
            self.say(message)

    def say(self, message: str) -> None:
        """One line, above the bar if there is one."""
        self._console.print(f"qnpu: {message}", markup=False, highlight=False, soft_wrap=True)


def _left(seconds: float, done: int, length: int) -> str:
    """The time that the rest of `length` steps takes if `done` of them took `seconds`."""
    return f"{seconds / done * (length - done):.0f} s left" if done else "..."
