"""Windows: arrays (N, T) of token ids, N pieces of text of T tokens each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from qnpu_jax.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, without BOS, by what they are for.

    Attributes:
      calibration: sets ranges and rounds weights.
      learning: is learned from; no rows where nothing is learned.
      held_out: decides which step of learning is kept; from another domain than the other two. No
        rows where nothing is learned.
    """

    calibration: Int[np.ndarray, "n t"]
    learning: Int[np.ndarray, "m u"]
    held_out: Int[np.ndarray, "k u"]

    @staticmethod
    def of(calibration: Int[np.ndarray, "n t"]) -> Windows:
        """Windows to calibrate with, and none to learn from.

        >>> Windows.of(np.arange(6).reshape(2, 3)).learning.shape
        (0, 3)
        """
        return Windows(calibration, calibration[:0], calibration[:0])


def cut(
    ids: Sequence[int], length: int, count: int, source: str
) -> Int32[np.ndarray, "n {length}"]:
    """Cuts a text into windows from its start; what is left over at its end is not used.

    >>> cut([5, 6, 7, 8, 9], length=2, count=8, source="a.txt").tolist()
    [[5, 6], [7, 8]]

    Args:
      ids: token ids of the whole text.
      length: tokens of a window.
      count: at most this many windows.
      source: the file or the name of the text, for messages.

    Raises:
      UserError: the text is too short for one window.
    """
    available = len(ids) // length
    if available == 0:
        raise UserError(
            f"{source}: {len(ids)} tokens are too few; expected at least {length} (one window);"
            " give a longer text or choose a shorter window"
        )
    n = min(count, available)
    return np.asarray(ids[: n * length], np.int32).reshape(n, length)
