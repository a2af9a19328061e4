"""The `qnpu` command. A file of commands declares their options and calls; tables are in files of
their own.

Files of commands import neither JAX nor anything that does, so that `qnpu --help` is quick; each
command imports what it needs inside `importing`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit status after Ctrl-C, and after a request to end."""
LATER = 0.01
"""Seconds until a signal comes again that cannot be heeded now."""
NOTHING = "interrupted, nothing is left behind"


class Interrupted(Exception):
    """Ctrl-C in a run that left something behind: the message says what, and how to go on."""


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    with importing():
        from qnpu_jax.cli.commands import call
    asked_to_end = []

    def end(number: int, frame: FrameType | None) -> None:
        if _ignores(frame):
            threading.Timer(LATER, os.kill, (os.getpid(), number)).start()
            return
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
            asked_to_end.append(number)
        raise KeyboardInterrupt  # what was begun is cleared away as after Ctrl-C

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    try:
        status = call()
    except KeyboardInterrupt:
        status = complain(NOTHING, INTERRUPTED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would only spoil the last line
    if status != INTERRUPTED:
        sys.exit(status)
    # The interpreter's own end crashes where XLA was interrupted while it compiled.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(TERMINATED if asked_to_end else status)


def _ignores(frame: FrameType | None) -> bool:
    """Tells whether an exception raised in this frame would only be printed: JAX's callback of the
    garbage collector is on the stack."""
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            return True
        frame = frame.f_back
    return False


@contextmanager
def importing() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the process at once while the block imports, which takes seconds:
    KeyboardInterrupt, raised while jaxlib is imported, crashes it, or is swallowed."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _leave(number: int, _: Any) -> NoReturn:
    complain(NOTHING)
    os._exit(128 + number)


def complain(message: str, status: int = 2) -> int:
    """Writes one line on stderr and returns the exit status."""
    sys.stderr.write(f"qnpu: {' '.join(message.split())}\n")
    return status
