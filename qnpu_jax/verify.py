"""Two runs of one model compared, tensor by tensor, code by code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Where two tensors of one name disagree.

    Attributes:
      op: the operation that makes the tensor.
      count, size: elements that differ, of how many.
      largest: largest absolute difference (codes).
      index: first index that differs; `expected` and `got` are the codes there.
    """

    tensor: str
    op: str
    count: int
    size: int
    largest: int
    index: tuple[int, ...]
    expected: int
    got: int

    def __str__(self) -> str:
        return (
            f"{self.tensor} ({self.op}): {self.count} of {self.size} differ, by at most"
            f" {self.largest};"
            f" first at {list(self.index)}: LiteRT {self.expected}, simulator {self.got}"
        )


@dataclass(frozen=True)
class Comparison:
    """Tensors and elements compared, and every difference."""

    tensors: int
    elements: int
    differences: tuple[Difference, ...]

    @property
    def differing(self) -> int:
        """Elements that differ, over all tensors."""
        return sum(d.count for d in self.differences)


def compare(
    expected: Iterable[tuple[str, np.ndarray]],
    got: Mapping[str, np.ndarray],
    ops: Mapping[str, str],
) -> Comparison:
    """Compares every tensor in `expected` that an op makes with the tensor of that name in `got`.

    Args:
      expected: names and codes; names without an op (constants, inputs) are passed over.
      got: codes by name.
      ops: the op that makes each tensor, by name; each must appear in `expected`, or be an identity
        that the writer dropped, which its consumers then cover.

    Raises:
      KeyError: `got` lacks a tensor.
    """
    tensors = elements = 0
    differences = []
    for name, a in expected:
        if name not in ops:
            continue
        tensors, elements = tensors + 1, elements + a.size
        found = _difference(name, ops[name], a, np.asarray(got[name]))
        if found is not None:
            differences.append(found)
    return Comparison(tensors, elements, tuple(differences))


def _difference(name: str, op: str, a: np.ndarray, b: np.ndarray) -> Difference | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return Difference(
            name,
            f"{op}, {a.dtype}{a.shape} against {b.dtype}{b.shape}",
            a.size,
            a.size,
            0,
            (),
            0,
            0,
        )
    distance = np.abs(a.astype(np.int64) - b.astype(np.int64))
    count = int(np.count_nonzero(distance))
    if count == 0:
        return None
    first = tuple(int(i) for i in np.argwhere(distance)[0])
    return Difference(
        name, op, count, a.size, int(distance.max()), first, int(a[first]), int(b[first])
    )
