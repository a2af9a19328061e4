"""Windows: arrays (N, T) of token ids, N pieces of text of T tokens each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from qnpu_jax.errors import UserError


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, without BOS, by what they are for.

    Attributes:
      calibration: sets ranges.
      learning: is learned from; no rows where nothing is learned.
      held_out: decides which step of learning is kept; nothing is learned from it. No rows where
        nothing is learned.
      other: judges prefixes beside `calibration`, being of another domain; no rows where there is
        no such text.
      domains: rows of `held_out` that each domain has, by its name, in order; empty for one domain.
      pool: windows of the calibration text, the first of which are `calibration`: GPTQ reads them,
        and coverage chooses from them. No rows where `calibration` itself serves.
    """

    calibration: Int[np.ndarray, "n t"]
    learning: Int[np.ndarray, "m u"]
    held_out: Int[np.ndarray, "k u"]
    other: Int[np.ndarray, "j v"] = field(default_factory=lambda: np.zeros((0, 1), np.int32))
    domains: Mapping[str, int] = field(default_factory=dict)
    pool: Int[np.ndarray, "p w"] = field(default_factory=lambda: np.zeros((0, 1), np.int32))

    @staticmethod
    def learned(
        calibration: Int[np.ndarray, "n t"],
        learning: Int[np.ndarray, "m u"],
        held_out: Mapping[str, Int[np.ndarray, "_ u"]],
        other: Int[np.ndarray, "j v"],
    ) -> Windows:
        """Windows to calibrate with and to learn from, held-out ones by domain."""
        joined = np.concatenate([*held_out.values()])
        domains = {name: len(windows) for name, windows in held_out.items()}
        return Windows(calibration, learning, joined, other, domains)

    @staticmethod
    def of(
        calibration: Int[np.ndarray, "n t"], other: Int[np.ndarray, "j v"] | None = None
    ) -> Windows:
        """Windows to calibrate with, and none to learn from.

        >>> Windows.of(np.arange(6).reshape(2, 3)).learning.shape
        (0, 3)
        """
        none = calibration[:0]
        return Windows(calibration, none, none, none if other is None else other)


def token_ids(
    values: Any, vocab_size: int, source: str, ranks: tuple[int, ...] = (2,)
) -> Int32[np.ndarray, "..."]:
    """Checks token ids that a caller gives as arrays or nested lists.

    >>> token_ids([[5, 6], [7, 8]], vocab_size=9, source="windows").shape
    (2, 2)

    Args:
      values: (T,) or (N, T) integers from 0 to `vocab_size` - 1.
      source: what they are, for messages.
      ranks: numbers of axes that are taken.

    Raises:
      UserError: not such an array.
    """
    shapes = {1: "(T,)", 2: "(N, T)"}
    expected = f"expected integer token ids of shape {' or '.join(shapes[r] for r in ranks)}"
    try:
        ids = np.asarray(values)
    except ValueError:
        raise UserError(
            f"{source}: rows of unequal length; {expected}; cut them to one length"
        ) from None
    if ids.size == 0:
        raise UserError(f"{source}: no token; {expected}; give some")
    if ids.dtype.kind not in "iu":
        kind = ids.dtype.type.__name__
        raise UserError(
            f"{source}: {kind} values; {expected}; encode text with the model's tokenizer"
        )
    if ids.ndim not in ranks:
        raise UserError(f"{source}: shape {ids.shape}; {expected}; reshape them")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:  # indexing inside jit would silently take the last row of the table
        raise UserError(
            f"{source}: token {outside[0]} is outside the model's vocabulary of {vocab_size};"
            f" expected 0 to {vocab_size - 1}; take model and tokenizer of the same checkpoint"
        )
    return ids.astype(np.int32)


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
