"""Given text mixed with the model's own, windows of the two in turn by their shares."""

from __future__ import annotations

import hashlib
import math
import numbers
from typing import Any

import numpy as np
from jaxtyping import Int

from qnpu_jax.errors import UserError
from qnpu_jax.text.excerpts import Excerpt, Material


def check_share(share: Any, given: bool) -> None:
    """Checks the share of the model's own text beside a given one.

    Args:
      given: whether there is a given text.

    Raises:
      UserError: no number from 0 to 1; a share of own text where there is no other.
    """
    number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not number or not 0 <= float(share) <= 1:
        raise UserError(f"own-share: expected a number from 0 to 1; got {share!r}; change it")
    if share and not given:
        raise UserError(
            f"own-share: {share} beside no other text; expected a calibration text to mix with the"
            " model's own; give one, or leave the share out, as all text is the model's own then"
        )


def mixed(given: Material, own: Material, share: float) -> Material:
    """Mixes windows to calibrate with, to learn from and to judge by.

    Args:
      given, own: of `excerpts.given` and `excerpts.written`, for the same recipe and effort.
      share: of own windows, 0 to 1.

    Returns:
      Of each kind as many windows as the longer of the two has, where the shorter one begins again
      when it is used up; those of one alone where the other has none of the kind.
    """
    pairs = ((given.learning, own.learning), (given.end, own.end))
    others = (_mixed(a, b, share) if a and b else a or b for a, b in pairs)
    return Material(_mixed(given.calibration, own.calibration, share), *others)


def _mixed(given: Excerpt, own: Excerpt, share: float) -> Excerpt:
    windows = in_turn(given.windows, own.windows, share)
    pool = None
    if given.pool is not None or own.pool is not None:
        a, b = (x.windows if x.pool is None else x.pool for x in (given, own))
        pool = _without_repeats(in_turn(a, b, share), len(windows))
        pool = pool if len(pool) > len(windows) else None
    sha256 = hashlib.sha256(f"{given.sha256} {own.sha256} {share}".encode()).hexdigest()
    count = len(windows)
    source = f"{given.source}, {math.floor(count * share)} of {count} windows {own.source}"
    return Excerpt(source, sha256, windows, pool)


def _without_repeats(pool: Int[np.ndarray, "n t"], first: int) -> Int[np.ndarray, "m t"]:
    """Leaves out windows behind the `first` ones that stand before: reading them again adds nothing
    but their weight."""
    _, earliest = np.unique(pool, axis=0, return_index=True)
    return pool[np.union1d(np.arange(min(first, len(pool))), earliest)]


def in_turn(
    given: Int[np.ndarray, "n t"], own: Int[np.ndarray, "m t"], share: float
) -> Int[np.ndarray, "k t"]:
    """Takes windows of two texts in turn: of the first k, floor(k share) are of the second.

    Takes as many as the longer of them has; one that is used up begins again.

    >>> given, own = np.asarray([[1], [2]]), np.asarray([[7], [8], [9], [10]])
    >>> in_turn(given, own, 0.5).ravel().tolist(), in_turn(given, own, 0.25).ravel().tolist()
    ([1, 7, 2, 8], [1, 2, 1, 7])
    """
    rows: list[np.ndarray] = []
    for k in range(max(len(given), len(own))):
        owned = math.floor((k + 1) * share)
        text, at = (own, owned - 1) if owned > math.floor(k * share) else (given, k - owned)
        rows.append(text[at % len(text)])
    return np.stack(rows)
