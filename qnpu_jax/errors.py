"""The one exception that the command line prints as a line: a mistake of the caller."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the caller: the message names the file or tensor, expected, got, and the way
    out.

    The command line prints it as one line and exits with status 2.
    """
