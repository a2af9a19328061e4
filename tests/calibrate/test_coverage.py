"""Windows chosen by coverage: the greedy rule, its guarantee, and peaks of a real graph."""

import itertools

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from qnpu_jax.calibrate.coverage import choose_windows, window_peaks
from qnpu_jax.calibrate.statistics import collect_statistics
from qnpu_jax.graph import decoder

SEEDS = st.integers(0, 2**32 - 1)


def drawn(seed: int, windows: int = 9, tensors: int = 12) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=(windows, tensors)))


def covered(peaks: np.ndarray, chosen: list[int], weights: np.ndarray) -> float:
    """F as its equation has it."""
    most = np.quantile(peaks, 0.99, axis=0)
    return float(np.minimum(1, peaks[chosen].max(axis=0) / most) @ weights / weights.sum())


@given(SEEDS, st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_greedy_reaches_its_share_of_the_best_choice(seed, count):
    peaks, weights = drawn(seed), drawn(seed + 1, 1)[0]
    found = choose_windows(peaks, count, weights)
    chosen = found.windows.tolist()
    assert len(set(chosen)) == count
    f = [covered(peaks, chosen[: i + 1], weights) for i in range(count)]
    np.testing.assert_allclose(found.coverage, f, rtol=1e-12)
    best = max(
        covered(peaks, list(c), weights) for c in itertools.combinations(range(len(peaks)), count)
    )
    assert (1 - 1 / np.e) * best <= found.coverage[-1] <= best + 1e-12
    assert (np.diff(found.coverage) >= 0).all()
    steps = (found.gains @ weights / weights.sum()).cumsum()
    np.testing.assert_allclose(steps, found.coverage, rtol=1e-9)


def test_a_tensor_that_is_always_zero_counts_as_covered():
    peaks = np.array([[0.0, 1.0], [0.0, 4.0], [0.0, 2.0]])
    found = choose_windows(peaks, 9, quantile=1.0)
    assert found.windows.tolist() == [1, 0, 2]  # then nothing is gained: the earlier first
    np.testing.assert_array_equal(found.coverage, 1.0)


@pytest.mark.slow
def test_peaks_are_those_of_the_statistics():
    config, params = tiny.prepared("gqa_llama3")
    dec = decoder(config, tiny.PLANS["w8a8"], tiny.TOKENS)
    windows = tiny.random_ids((5, tiny.TOKENS), 3)
    peaks = window_peaks(dec, params, windows)
    assert peaks.values.shape == (5, len(peaks.names))
    stats = collect_statistics(dec, params, windows)
    every = dict(zip(peaks.names, peaks.values.max(axis=0), strict=True))
    expected = {
        graph.global_name(layer, name.removeprefix(graph.prefix)): max(-s.low, s.high)
        for graph in dec.graphs
        for name, kept in stats.items()
        if name.startswith(graph.prefix)
        for layer, s in enumerate(kept)
    }
    assert every.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(every[name], x, rtol=1e-6, err_msg=name)
