"""The one exception that the command line prints as a line: a mistake of the caller."""

from __future__ import annotations


def is_text(value: str) -> bool:
    """Tells whether a string can be written as UTF-8.

    It holds no half of a surrogate pair, which Python makes of bytes that it cannot read.

    >>> is_text("caf" + chr(0xE9)), is_text(chr(0xDCFF))
    (True, False)
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class UserError(Exception):
    """A mistake of the caller: the message names the file or tensor, expected, got, and the way
    out.

    The command line prints it as one line and exits with status 2.
    """
