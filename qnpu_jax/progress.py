"""Reports of a long run while it runs: progress, seconds per stage, messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Shows progress: wraps an iteration of known length, (items, length, what is iterated)."""


def untracked(items: Iterable[Any], _: int, __: str) -> Iterable[Any]:
    """Shows no progress."""
    return items


@dataclass
class Clock:
    """Clock of a run: seconds of each stage, in the order in which they began."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Observer(Clock):
    """Watches a run; this one keeps the time and shows nothing."""

    def track(self, items: Iterable[Any], length: int, what: str) -> Iterable[Any]:
        """Shows the progress of an iteration of known length."""
        return items

    def learned(self, stage: int, step: int, steps: int, loss: float, held_out: float) -> None:
        """Hears of every step of learning.

        Args:
          stage: number of the stage, the first is 0.
          step: steps taken, the first is 1.
          steps: steps of the stage.
          loss: loss of the step.
          held_out: lowest KL on held-out text so far, in nats.
        """

    def say(self, message: str) -> None:
        """Hears what the user should know at once."""


class Told(Observer):
    """An observer that passes progress on to a function.

    Args:
      tell: called with what runs, how much of it is done, and how much there is: 0 where a stage
        begins whose length is not known.

    Example:
      >>> watch = Told(print)
      >>> with watch.stage("calibrate"):
      ...     _ = list(watch.track("ab", 2, "windows"))
      calibrate 0 0
      windows 1 2
      windows 2 2
    """

    def __init__(self, tell: Callable[[str, int, int], object]) -> None:
        super().__init__()
        self._tell = tell

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tells that a stage begins, and keeps its seconds."""
        self._tell(name, 0, 0)
        with super().stage(name):
            yield

    def track(self, items: Iterable[Any], length: int, what: str) -> Iterator[Any]:
        """Tells of every item when it is done."""
        for done, item in enumerate(items, start=1):
            yield item
            self._tell(what, done, length)

    def learned(self, stage: int, step: int, steps: int, loss: float, held_out: float) -> None:
        """Tells of every step of a stage, of which the first is 1."""
        self._tell(f"learn, stage {stage + 1}", step, steps)
