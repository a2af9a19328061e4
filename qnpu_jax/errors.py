"""The one exception that the command line prints as a line: a mistake of the caller; and what its
message says of a misspelt name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


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


NEAREST = 3
"""Names that `nearest` gives, at most."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Names the tensors that a misspelt name or pattern is likest, as the end of a message.

    A pattern for all layers or KV heads is compared with such patterns.

    Args:
      known: global names.

    Returns:
      `; nearest: ..`, or nothing where none is near.

    Example:
      >>> nearest("layers.*.mlp.atc", ["layers.0.mlp.act", "layers.1.mlp.act", "head.logits"])
      '; nearest: layers.*.mlp.act'
      >>> nearest("?", ["head.logits"])
      ''
    """
    names = list(known)
    for scope in ("layers.", "kv"):
        if f"{scope}*." in name:
            names = [re.sub(rf"(^|\.){scope}\d+\.", rf"\1{scope}*.", n) for n in names]
    found = get_close_matches(name, dict.fromkeys(names), NEAREST)
    return f"; nearest: {', '.join(found)}" if found else ""
