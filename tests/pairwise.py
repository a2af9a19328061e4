"""Full products of test parameters, of which only some rows run every time: rows in which every
pair of levels of two factors occurs, or every level. The others are marked `nightly`."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]


def _pairs(row: Sequence[int]) -> set[tuple]:
    return set(itertools.combinations(enumerate(row), 2))


def pairs(*factors: Sequence[Any]) -> list[Row]:
    """A covering array of strength 2: each next row holds the most pairs that are still missing."""
    product = list(itertools.product(*(range(len(f)) for f in factors)))
    missing, chosen = set[tuple]().union(*map(_pairs, product)), []
    while missing:
        best = max(product, key=lambda row: len(_pairs(row) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return [tuple(f[i] for f, i in zip(factors, row, strict=True)) for row in chosen]


def levels(*factors: Sequence[Any]) -> list[Row]:
    """Rows in which every level of every factor occurs: as many as the longest factor has."""
    count = max(map(len, factors))
    return [tuple(f[i % len(f)] for f in factors) for i in range(count)]


def often(values: Sequence[Any], always: Sequence[Any]) -> list[Any]:
    """The values as parameters of a test, `nightly` but for those of `always`."""
    assert all(v in values for v in always)
    return [pytest.param(v, marks=() if v in always else pytest.mark.nightly) for v in values]


def parametrize(
    names: tuple[str, ...],
    *factors: Sequence[Any],
    choose: Callable[..., list[Row]] = pairs,
) -> pytest.MarkDecorator:
    """Every row of the product, `nightly` but for the chosen ones."""
    chosen = choose(*factors)
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*row, marks=() if row in chosen else pytest.mark.nightly)
            for row in itertools.product(*factors)
        ],
    )
