"""Commands for a phone, as lists of arguments, and what runs them."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence

from qnpu_jax.errors import UserError

TIMEOUT = 1800
"""Seconds for one command: benchmark_model ends its runs after 150, pushes can take longer."""
RunCommand = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]
"""Runs a command; all that it says, errors included, is in `stdout`."""


def adb(serial: str | None, *args: str) -> list[str]:
    """An adb command, of one phone if a serial is given."""
    return ["adb", *(["-s", serial] if serial else []), *args]


def shell(serial: str | None, *args: str) -> list[str]:
    """A command on the phone, quoted for its shell, which splits what it gets once more."""
    return adb(serial, "shell", shlex.join(args))


def quoted(command: Sequence[str]) -> str:
    """A command as one pastes it into a shell."""
    return shlex.join(command)


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The `RunCommand` that really runs.

    Raises:
      UserError: there is no such program, or it takes longer than TIMEOUT.
    """
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,  # adb shell would swallow what the user types
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
    """The serial of the phone to use.

    Args:
      listing: what `adb devices` says: a heading, then a serial, a tab and a state per line.
      serial: what the user asks for, None for the only one.

    Raises:
      UserError: none is ready, several are and none is named, or it does not trust this computer.
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
