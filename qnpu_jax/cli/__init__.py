"""The `qnpu` command: `commands` parses and calls, `display` shows. Only this package imports the
simulator.

This file only starts them: what they import takes seconds, in which Ctrl-C must do what it does at
any other time.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit status after Ctrl-C (128 + SIGINT)."""
NOTHING = "interrupted, nothing is left behind"


def main() -> None:
    """Entry point."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # not ignored, as under nohup
        signal.signal(signal.SIGINT, _leave)
    from qnpu_jax.cli.commands import call

    signal.signal(signal.SIGINT, usual)
    try:
        status = call()
    except KeyboardInterrupt:
        status = complain(NOTHING, INTERRUPTED)
    sys.exit(status)


def _leave(*_: Any) -> NoReturn:
    """Ends the process at once: KeyboardInterrupt, raised while jaxlib is imported, crashes it."""
    complain(NOTHING)
    os._exit(INTERRUPTED)


def complain(message: str, status: int = 2) -> int:
    """One line on stderr; returns the exit status."""
    sys.stderr.write(f"qnpu: {' '.join(message.split())}\n")
    return status
