"""Windows chosen by coverage: against all subsets, against plain greedy, and by hand."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import tiny

from qnpu_jax import pipeline
from qnpu_jax.calibrate.coverage import cover, window_peaks
from qnpu_jax.calibrate.statistics import collect_statistics
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.progress import Observer
from qnpu_jax.text.windows import Windows
from qnpu_jax.transform import Starts


def rows(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def random_peaks(seed: int, windows: int = 9) -> dict[str, np.ndarray]:
    """Peaks with heavy tails, as activations have them."""
    rng = np.random.default_rng(seed)
    return {
        "a": rng.lognormal(size=(windows, 1)).astype(np.float32),
        "layers.b": rng.lognormal(sigma=2, size=(windows, 4)).astype(np.float32),
        "layers.c": rng.exponential(size=(windows, 3)).astype(np.float32),
    }


def value(peaks, windows, quantile=1.0, weights=None) -> float:
    """F as its equation says, term by term."""
    total = norm = 0.0
    for name, found in peaks.items():
        for column in found.T.astype(np.float64):
            weight = (weights or {}).get(name, 1.0)
            total += weight * min(1.0, max(column[list(windows)]) / np.quantile(column, quantile))
            norm += weight
    return total / norm


def plain_greedy(peaks, count, **settings) -> list[int]:
    chosen: list[int] = []
    left = list(range(len(peaks["a"])))
    while left and len(chosen) < count:
        best = max(left, key=lambda s: value(peaks, [*chosen, s], **settings))
        chosen.append(best)
        left.remove(best)
    return chosen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "settings", [{}, {"quantile": 0.8}, {"weights": {"a": 5.0, "layers.c": 0.0}}]
)
def test_lazy_is_greedy_and_reaches_its_bound(seed, settings):
    peaks, count = random_peaks(seed), 3
    found = cover(peaks, count, **settings)
    assert list(found.windows) == plain_greedy(peaks, count, **settings)
    for i, reached in enumerate(found.curve):
        expected = value(peaks, found.windows[: i + 1], **settings)
        assert reached == pytest.approx(expected, rel=1e-12)  # sums in another order
    most = max(value(peaks, s, **settings) for s in combinations(range(9), count))
    assert (1 - 1 / math.e) * most <= found.curve[-1] <= most * (1 + 1e-12)


def test_by_hand():
    peaks = {"a": rows([[1], [4], [2]]), "layers.b": rows([[8, 0], [0, 1], [8, 3]])}
    found = cover(peaks, 5)
    assert found.windows == (2, 1, 0)  # all of the pool; window 0 serves nothing any more
    assert found.curve == pytest.approx((2.5 / 3, 1, 1), rel=1e-12)
    assert [x[:2] for x in found.serves[0]] == [("layers.b", 0), ("layers.b", 1), ("a", 0)]
    assert [x[:2] for x in found.serves[1]] == [("a", 0)]
    gains = [x.gain for some in found.serves for x in some]
    assert gains == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6], rel=1e-12)
    assert found.serves[2] == ()


def test_gains_fall_and_add_up():
    found = cover(random_peaks(1, windows=40), 40)
    steps = np.diff([0.0, *found.curve])
    assert (np.diff(steps) <= 1e-12).all()
    assert found.curve[-1] == pytest.approx(1, rel=1e-12)
    assert sorted(found.windows) == list(range(40))


def test_the_order_of_the_pool_does_not_matter():
    peaks, order = random_peaks(2, windows=30), np.random.default_rng(3).permutation(30)
    found, other = cover(peaks, 6), cover({n: x[order] for n, x in peaks.items()}, 6)
    assert found.windows == tuple(order[list(other.windows)])
    assert found.curve == other.curve and found.serves == other.serves


def test_equal_windows_and_tensors_of_zeros():
    peaks = {"a": np.ones((4, 2), np.float32), "dead": np.zeros((4, 1), np.float32)}
    found = cover(peaks, 2)
    assert found.windows == (0, 1) and found.curve == pytest.approx((1, 1))


def test_a_quantile_bounds_what_one_window_is_worth():
    """One wild window: with the maximum it is worth a window; below it, any of the others is."""
    peaks = {"a": rows([[1], [2], [100], [2]]), "b": rows([[1], [3], [0], [3]])}
    assert cover(peaks, 1).windows == (1,) and cover(peaks, 2).windows == (1, 2)
    assert cover(peaks, 2, quantile=0.5).curve[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count: expected at least 1 window; got 0"),
        ({"quantile": 1.5}, r"quantile: expected 0 to 1; got 1\.5"),
        ({"quantile": math.nan}, "quantile: expected 0 to 1; got nan"),
        ({"weights": {"z": 1.0}}, "weights: z has no peaks; expected some of a, layers.b"),
        ({"weights": {"a": -1.0}}, "expected finite ones of 0 or more"),
        ({"weights": {"a": 0.0, "layers.b": 0.0, "layers.c": 0.0}}, "one of them above 0"),
        ({"peaks": {}}, r"peaks: tensors with \[\] windows"),
        ({"peaks": {"a": np.ones((0, 1), np.float32)}}, r"peaks: tensors with \[0\] windows"),
        (
            {"peaks": {"a": np.ones((2, 1), np.float32), "b": np.ones((3, 1), np.float32)}},
            r"peaks: tensors with \[2, 3\] windows",
        ),
        ({"peaks": {"a": rows([[np.nan]])}}, "a: its peaks are not finite"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        cover(**{"peaks": random_peaks(0), "count": 1, **change})


@pytest.mark.parametrize("name", tiny.NAMES)
def test_peaks_are_the_extremes_of_statistics(name):
    dec, params, _ = tiny.calibrated(name, "w8a8")
    windows = tiny.random_ids((5, tiny.TOKENS), seed=1)
    peaks = window_peaks(dec, params, windows, batch=2)
    stats = collect_statistics(dec, params, windows)
    assert peaks.keys() == stats.keys()
    for tensor, x in peaks.items():
        bounds = [max(-s.low, s.high) for s in stats[tensor]]
        np.testing.assert_allclose(x.max(axis=0), bounds, rtol=1e-5)  # batches of other sizes
    alone = window_peaks(dec, params, windows[3:4])
    for tensor, x in alone.items():
        np.testing.assert_allclose(x[0], peaks[tensor][3], rtol=1e-4, atol=1e-6)
    assert len(cover(peaks, 2).windows) == 2


def test_peaks_without_a_prefix():
    dec, params, _ = tiny.calibrated("mha_tied", "w8a8", ())
    peaks = window_peaks(dec, params, tiny.random_ids((2, tiny.TOKENS)))
    assert peaks["layers.mlp.act"].shape == (2, dec.config.num_layers)
    assert peaks["head.logits"].shape == (2, 1)


def test_statistics_go_on_from_others():
    dec, params, _ = tiny.calibrated("mha_tied", "w8a8")
    windows = tiny.random_ids((6, tiny.TOKENS), seed=2)
    whole = collect_statistics(dec, params, windows, batch=2)
    parts = collect_statistics(dec, params, windows[:2], batch=2)
    assert collect_statistics(dec, params, windows[2:], batch=2, onto=parts) is parts
    for name, rows in whole.items():
        for a, b in zip(rows, parts[name], strict=True):
            assert (a.low, a.high, a.count, a.total) == (b.low, b.high, b.count, b.total)
            assert a.width == b.width
            np.testing.assert_array_equal(a.bins, b.bins)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_is_refused_by_name(value):
    """Its histogram would grow without end."""
    dec, params, _ = tiny.calibrated("mha_tied", "w8a8")
    broken = dict(params)
    broken["layers.mlp.down.bias"] = broken["layers.mlp.down.bias"].at[1, 0].set(value)
    with pytest.raises(UserError, match=r"^layers\.mlp\.down.*, layer 1: holds NaN or Inf on the"):
        collect_statistics(dec, broken, tiny.random_ids((2, tiny.TOKENS)))


def test_a_model_calibrated_from_a_pool_is_that_of_the_windows_chosen():
    config, params = tiny.prepared("gqa_llama3")
    recipe = replace(tiny.recipe("w8a8"), prefix="none", centre_keys=False)
    pool = tiny.random_ids((12, tiny.TOKENS), seed=3)
    text = Windows.of(pool[:3])
    wide = replace(recipe, calibration_tokens=3 * tiny.TOKENS, calibration_pool=pool.size)
    made = pipeline.quantize(config, params, wide, replace(text, pool=pool), Starts())
    assert made.coverage is not None and len(made.coverage.windows) == 3
    chosen = Windows.of(pool[sorted(made.coverage.windows)])
    again = pipeline.quantize(config, params, recipe, chosen, Starts())
    first = pipeline.quantize(config, params, recipe, text, Starts())
    assert again.coverage is None and made.ranges == again.ranges != first.ranges
    # Weights are rounded by what was chosen first, then by the others.
    dec = decoder(config, recipe.bits, tiny.TOKENS)
    held = {n: np.asarray(x) for n, x in params.items()}
    found, coverage = pipeline._chosen(dec, held, wide, replace(text, pool=pool), Observer())
    assert coverage is not None
    np.testing.assert_array_equal(found.pool[:3], found.calibration)
    assert sorted(map(tuple, found.pool.tolist())) == sorted(map(tuple, pool.tolist()))
    # A pool may be there for GPTQ's sake.
    other = pipeline.quantize(config, params, recipe, replace(text, pool=pool), Starts())
    assert other.coverage is None and other.ranges == first.ranges
