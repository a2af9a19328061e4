"""A difference is found, counted and located; a tensor that is not compared is an error."""

import numpy as np
import pytest

from qnpu_jax.errors import UserError
from qnpu_jax.proof.comparison import Difference, compare_tensors

A = np.arange(12, dtype=np.int8).reshape(3, 4)
B = np.arange(4, dtype=np.int16)
OPS = {"a": "FullyConnected", "b": "Add"}


def test_equal():
    inputs = [("ids", B), ("a", A), ("a.weight", A), ("b", B)]
    found = compare_tensors(inputs, {"a": A.copy(), "b": B.copy(), "more": B}, OPS)
    assert (found.tensors, found.elements, found.differing) == (2, 16, 0)
    assert found.differences == ()


def test_differences_are_counted_and_located():
    a, b = A.copy(), B.copy()
    a[1, 2], a[2, 0] = -128, 9
    b[3] = -32768
    found = compare_tensors([("a", A), ("b", B)], {"a": a, "b": b}, OPS)
    assert found.differing == 3
    assert found.differences == (
        Difference("a", "FullyConnected", 2, 12, 134, (1, 2), 6, -128),
        Difference("b", "Add", 1, 4, 32771, (3,), 3, -32768),  # no int16 overflow
    )
    assert str(found.differences[0]) == (
        "a (FullyConnected): 2 of 12 differ, by at most 134; first at [1, 2]: LiteRT 6,"
        " simulator -128"
    )


@pytest.mark.parametrize(
    ("expected", "got", "message"),
    [
        ([("a", A)], {"a": A, "b": B}, r"b \(Add\): LiteRT has nothing, the simulator int16\[4\];"),
        ([("a", A)], {"a": A}, r"b \(Add\): LiteRT has nothing, the simulator nothing;"),
        ([("a", A), ("b", B)], {"a": A}, r"LiteRT has int16\[4\], the simulator nothing"),
        ([("a", A), ("b", B)], {"a": A[:2], "b": B}, r"int8\[3, 4\], the simulator int8\[2, 4\]"),
        ([("a", A), ("b", B)], {"a": A, "b": A[0]}, r"int16\[4\], the simulator int8\[4\]"),
    ],
)  # fmt: skip
def test_nothing_passes_silently(expected, got, message):
    with pytest.raises(UserError, match=message):
        compare_tensors(expected, got, OPS)
