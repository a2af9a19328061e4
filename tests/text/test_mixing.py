"""The model's own windows beside given ones."""

import math

import numpy as np
import pytest

from qnpu_jax.errors import UserError
from qnpu_jax.text.excerpts import Excerpt, Material
from qnpu_jax.text.mixing import check_share, in_turn, mixed


def excerpt(first: int, count: int, pool: int = 0) -> Excerpt:
    """Windows of one token: `first` and those after it."""
    ids = np.arange(first, first + max(count, pool))[:, None]
    return Excerpt(f"text {first}", "0" * 64, ids[:count], ids if pool else None)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_shares(share):
    found = in_turn(excerpt(0, 20).windows, excerpt(100, 20).windows, share).ravel()
    assert len(found) == 20
    for k in range(21):
        assert (found[:k] >= 100).sum() == math.floor(k * share)
    for some in (found[found < 100], found[found >= 100] - 100):
        np.testing.assert_array_equal(some, np.arange(len(some)))  # each in its own order


@pytest.mark.parametrize(("given", "own", "share"), [(3, 9, 0.5), (9, 3, 0.5), (1, 9, 0.25)])
def test_a_text_that_is_used_up_begins_again(given, own, share):
    found = in_turn(excerpt(0, given).windows, excerpt(100, own).windows, share).ravel()
    assert len(found) == 9
    assert (found >= 100).sum() == math.floor(9 * share)
    for some, count in ((found[found < 100], given), (found[found >= 100] - 100, own)):
        np.testing.assert_array_equal(some, np.arange(len(some)) % count)


def test_calibration_learning_and_pool():
    given = Material(excerpt(0, 4, pool=8), excerpt(10, 6), excerpt(20, 2))
    own = Material(excerpt(100, 4, pool=8), excerpt(110, 6), excerpt(120, 2))
    calibration, learning, end = mixed(given, own, 0.5)
    assert learning is not None and end is not None and calibration.pool is not None
    assert calibration.windows.ravel().tolist() == [0, 100, 1, 101]
    assert calibration.pool.ravel().tolist() == [0, 100, 1, 101, 2, 102, 3, 103]
    assert learning.windows.ravel().tolist() == [10, 110, 11, 111, 12, 112]
    assert end.windows.ravel().tolist() == [20, 120]
    assert calibration.source == "text 0, 2 of 4 windows text 100"
    assert calibration.sha256 != mixed(given, own, 0.25).calibration.sha256
    one = mixed(Material(given[0], None, None), Material(excerpt(100, 4), None, own[2]), 0.5)
    assert one.learning is None and one.end is own.end
    assert one.calibration.pool is not None  # own text has no more to choose from
    assert one.calibration.pool.ravel().tolist() == calibration.pool.ravel().tolist()


@pytest.mark.parametrize(("share", "windows"), [(0.5, [0, 100, 1, 101, 2, 3]), (1.0, None)])
def test_a_pool_repeats_no_window(share, windows):
    """Own text is used up after two: calibration begins it again, the rest of the pool does not."""
    given = Material(excerpt(0, 4, pool=8), None, None)
    calibration = mixed(given, Material(excerpt(100, 2), None, None), share).calibration
    assert len(calibration.windows) == 4
    found = None if calibration.pool is None else calibration.pool.ravel().tolist()
    assert found == windows


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan, True, "half", None])
def test_what_is_no_share(share):
    with pytest.raises(UserError, match="own-share: expected a number from 0 to 1; got"):
        check_share(share, given=True)


def test_a_share_of_own_text_alone():
    check_share(0.0, given=False)
    check_share(np.float32(0.5), given=True)
    with pytest.raises(UserError, match=r"own-share: 0\.5 beside no other text"):
        check_share(0.5, given=False)
