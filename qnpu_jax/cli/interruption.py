"""Ctrl-C in a run that can go on later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qnpu_jax import job
from qnpu_jax.cli import Interrupted


@contextmanager
def resumable(request: job.Job) -> Iterator[None]:
    """Tells who interrupts a run which step of it is kept.

    Raises:
      Interrupted: Ctrl-C, where a checkpoint is kept.
      KeyboardInterrupt: Ctrl-C, where nothing is left behind.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not (kept := job.resumes(request)):
            raise
        stage, step = kept
        raise Interrupted(
            f"interrupted; the same command goes on from stage {stage}, step {step}, kept in"
            f" {request.checkpoint_folder()}"
        ) from None
