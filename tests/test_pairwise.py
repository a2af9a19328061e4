"""Covering arrays cover: what stands in place of a full product has every pair of levels."""

import itertools

import pairwise
import pytest


@pytest.mark.parametrize(("sizes", "most"), [((3, 9, 3), 27), ((3, 2, 4, 3), 14), ((4, 2, 2), 8)])
def test_every_pair_of_levels_occurs(sizes, most):
    factors = [[f"{i}.{level}" for level in range(size)] for i, size in enumerate(sizes)]
    rows = pairwise.pairs(*factors)
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        found = {(row[i], row[j]) for row in rows}
        assert found == set(itertools.product(first, second))
    assert len(rows) == len(set(rows)) <= most
    assert rows == pairwise.pairs(*factors), "the same rows in every run"


def test_every_level_occurs():
    rows = pairwise.levels("abcde", "xy")
    assert rows == [("a", "x"), ("b", "y"), ("c", "x"), ("d", "y"), ("e", "x")]


def test_no_row_of_the_product_is_lost():
    (names, rows), factors = (
        pairwise.parametrize(("a", "b"), "123", "xy", choose=pairwise.levels).args,
        ("123", "xy"),
    )
    assert names == ("a", "b")
    assert [row.values for row in rows] == list(itertools.product(*factors))
    always = [row.values for row in rows if not row.marks]
    assert always == [("1", "x"), ("2", "y"), ("3", "x")]
    assert all(mark.name == "nightly" for row in rows for mark in row.marks)
