"""Commands for a phone through Android's adb, as lists of arguments, and how to run them."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence

from qnpu_jax.errors import UserError

TIMEOUT = 1800
"""Seconds that a command may take. benchmark_model ends its runs after 150; a push of a large file
can take longer."""
RunCommand = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
"""Runs a command. Everything that the command prints, errors included, is in `stdout`."""


def adb(serial: str | None, *args: str) -> list[str]:
    """Returns an adb command, for one phone if a serial is given.

    Example:
      >>> adb("R5CT", "devices")
      ['adb', '-s', 'R5CT', 'devices']
    """
    return ["adb", *(["-s", serial] if serial else []), *args]


def shell(serial: str | None, *args: str) -> list[str]:
    """Returns a command that runs in the phone's shell.

    The shell splits the command line once more, so arguments are quoted for it.

    Example:
      >>> shell(None, "rm", "-rf", "/data/a b")
      ['adb', 'shell', "rm -rf '/data/a b'"]
    """
    return adb(serial, "shell", shlex.join(args))


def quoted(command: Sequence[str]) -> str:
    """Returns a command as a line that can be pasted into a shell."""
    return shlex.join(command)


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command as a process and waits for its end.

    Raises:
      UserError: there is no such program, or it takes longer than TIMEOUT.
    """
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,  # otherwise adb shell reads what the user types
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except (FileNotFoundError, PermissionError):
        raise UserError(
            f"{command[0]}: not found on PATH; expected Android's adb; install the platform-tools"
            " (Debian: apt install adb), or only look at the commands with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{quoted(command)}: no end after {TIMEOUT} s; expected one; unlock the phone and"
            " check its cable"
        ) from None


def pick(listing: str, serial: str | None) -> str:
    """Returns the serial of the phone to use.

    Args:
      listing: output of `adb devices`: a heading, then a serial, a tab and a state per line.
      serial: the phone that the user asks for; None for the only one.

    Raises:
      UserError: no phone is connected, several are and none is named, or the phone is not ready or
        does not trust this computer.

    Example:
      >>> pick("List of devices attached\\nR5CT\\tdevice\\n", None)
      'R5CT'
    """
    states = dict(line.split("\t", 1) for line in listing.splitlines() if "\t" in line)
    if serial is None and len(states) > 1:
        raise UserError(
            f"adb: {len(states)} devices ({', '.join(states)}); expected one; choose with --serial"
        )
    chosen = serial or next(iter(states), None)
    if chosen is None or chosen not in states:
        raise UserError(
            f"adb: {'no device' if chosen is None else f'device {chosen} is not'} connected, got"
            f" {list(states)}; expected one; connect a phone with USB debugging on, and look at"
            " `adb devices`"
        )
    state = states[chosen].strip()
    if state == "unauthorized":
        raise UserError(
            f"adb: device {chosen} is unauthorized; expected one that trusts this computer; unlock"
            " the phone and accept its question about USB debugging"
        )
    if state != "device":
        raise UserError(
            f"adb: device {chosen} is in state {state!r}; expected 'device'; reconnect it, or run"
            " `adb kill-server` and try again"
        )
    return chosen
