"""Comparison of two runs of one model, tensor by tensor and code by code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder, is_identity


@dataclass(frozen=True)
class Difference:
    """Disagreement of two tensors of one name.

    Attributes:
      tensor: global name.
      op: the op that makes the tensor.
      count: number of elements that differ.
      size: number of elements.
      largest: largest absolute difference, in codes.
      index: first index that differs.
      expected, got: codes there, by LiteRT and by the simulator.
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
    """Result of a comparison.

    Attributes:
      tensors, elements: how many were compared.
      differences: one for each tensor that differs.

    Example:
      >>> print(Comparison(tensors=3, elements=1024, differences=()))
      0 of 1,024 elements differ, in 0 of 3 tensors
    """

    tensors: int
    elements: int
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """The entry `verify` of report.json: counts, and each difference as one line."""
        return {
            "tensors": self.tensors,
            "elements": self.elements,
            "differing": self.differing,
            "differences": [str(d) for d in self.differences],
        }

    def __str__(self) -> str:
        return (
            f"{self.differing:,} of {self.elements:,} elements differ, in"
            f" {len(self.differences):,} of {self.tensors:,} tensors"
        )

    @property
    def differing(self) -> int:
        """Number of elements that differ, over all tensors."""
        return sum(d.count for d in self.differences)

    @staticmethod
    def of_all(parts: Iterable[Comparison]) -> Comparison:
        """Adds several comparisons up."""
        found = list(parts)
        return Comparison(
            sum(c.tensors for c in found),
            sum(c.elements for c in found),
            tuple(d for c in found for d in c.differences),
        )


def compare_tensors(
    expected: Iterable[tuple[str, np.ndarray]],
    got: Mapping[str, np.ndarray],
    ops: Mapping[str, str],
) -> Comparison:
    """Compares every tensor that an op makes.

    Args:
      expected: names and codes by LiteRT. Names that are not in `ops` (constants, inputs) are
        passed over.
      got: codes by the simulator, by name.
      ops: op of each tensor to compare, by name (`op_names`).

    Raises:
      UserError: a tensor of `ops` that one of the runs lacks, or that has two shapes or types: the
        runs are not of the same model.
    """
    missing = dict(ops)
    elements = 0
    differences = []
    for name, a in expected:
        if name not in ops:
            continue
        missing.pop(name, None)
        if name not in got:
            raise _not_the_same(name, ops[name], _kind(a), "nothing")
        elements += a.size
        if found := _difference(name, ops[name], a, np.asarray(got[name])):
            differences.append(found)
    for name, op in missing.items():
        raise _not_the_same(name, op, "nothing", _kind(got[name]) if name in got else "nothing")
    return Comparison(len(ops), elements, tuple(differences))


def _difference(name: str, op: str, a: np.ndarray, b: np.ndarray) -> Difference | None:
    if _kind(a) != _kind(b):
        raise _not_the_same(name, op, _kind(a), _kind(b))
    distance = np.abs(a.astype(np.int64) - b.astype(np.int64))
    count = int(np.count_nonzero(distance))
    if count == 0:
        return None
    first = tuple(int(i) for i in np.argwhere(distance)[0])
    return Difference(
        name, op, count, a.size, int(distance.max()), first, int(a[first]), int(b[first])
    )


def _kind(x: np.ndarray) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _not_the_same(tensor: str, op: str, a: str, b: str) -> UserError:
    return UserError(
        f"{tensor} ({op}): LiteRT has {a}, the simulator {b}; expected the same; the .tflite is of"
        " another model: write it again with `qnpu quantize` or `qnpu export`"
    )


def op_names(dec: Decoder) -> dict[str, str]:
    """Returns the op that makes each tensor of a written file, by global name.

    Ops that change nothing are left out, as the writer drops them.
    """
    return {
        graph.global_name(i, node.output): type(node.op).__name__
        for graph in dec.graphs
        for i in range(graph.layers)
        for node in graph.nodes
        if not is_identity(graph, node, i)
    }
