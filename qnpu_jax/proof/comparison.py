"""Two runs of one model compared, tensor by tensor, code by code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder, is_identity


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
    """Tensors and elements compared, and every difference.

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
        """Elements that differ, over all tensors."""
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
    """Compares the tensors that ops make, every one of them.

    Args:
      expected: names and codes by LiteRT; names without an op (constants, inputs) are passed over.
      got: codes by the simulator, by name.
      ops: the op that makes each tensor, by name, without identities that the writer dropped.

    Raises:
      UserError: a tensor of `ops` that either lacks, or of another shape or type: the two did not
        run the same model.
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
    """The op behind every tensor of the written file, by global name; dropped identities left
    out."""
    return {
        graph.global_name(i, node.output): type(node.op).__name__
        for graph in dec.graphs
        for i in range(graph.layers)
        for node in graph.nodes
        if not is_identity(graph, node, i)
    }
