"""Columns rounded one after the other: the algebra, small cases by hand, and less error."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnpu_jax.calibrate import gptq_columns
from qnpu_jax.calibrate.gptq_columns import inverse_factor

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def round_columns(*arrays: Any, factors: tuple[float, ...] = (1.0,)) -> Any:
    found = jax.jit(lambda w, s, q, h: gptq_columns.round_columns(w, s, q, h, factors))(*arrays)
    return jax.tree.map(np.asarray, found)


def hessian(seed: int, k: int, tokens: int = 512) -> np.ndarray:
    """Of inputs with a few strong common directions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, 4)) @ rng.normal(size=(4, k)) + rng.normal(size=(tokens, k)) / 4
    return x.T @ x / tokens


def grid(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and qmax of each row."""
    qmax = np.full(len(w), 2.0 ** (bits - 1) - 1, np.float32)
    return (np.abs(w).max(axis=1) / qmax).astype(np.float32), qmax


def nearest(w: np.ndarray, scale: np.ndarray, qmax: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(w / scale[:, None]), -qmax[:, None], qmax[:, None])


def output_error(w_q: np.ndarray, w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """(w_q - w) H (w_q - w)^T of each row."""
    return np.einsum("nk,kl,nl->n", w_q - w, h, w_q - w)


@given(SEEDS)
@settings(max_examples=20)
def test_the_factor_is_triangular_and_its_square_is_the_inverse(seed):
    h = hessian(seed, 40)
    u = np.asarray(inverse_factor(jax.numpy.asarray(h)))
    np.testing.assert_array_equal(u, np.triu(u))
    np.testing.assert_allclose(u.T @ u @ h, np.eye(40), atol=1e-9)  # float64, condition below 1e4


def test_moments_of_no_use_give_no_code():
    w, one = np.ones((1, 2)), np.ones(1, np.float32)
    for h in (np.diag([1.0, -1.0]), np.full((2, 2), np.nan)):
        assert np.isnan(round_columns(w, one, 7 * one, h).codes).all()


@given(SEEDS)
@settings(max_examples=10)
def test_correlated_inputs_lose_less_than_half_as_much(seed):
    """Not promised for each row, because columns are rounded greedily, but for all together."""
    w, h = np.random.default_rng(seed).normal(size=(24, 96)), hessian(seed, 96)
    scale, qmax = grid(w, 4)
    codes, _, same = round_columns(w, scale, qmax, h)
    np.testing.assert_array_equal(same, scale)
    before = output_error(nearest(w, scale, qmax) * scale[:, None], w, h)
    after = output_error(codes * same[:, None], w, h)
    assert after.sum() < 0.5 * before.sum()


@pytest.mark.slow
@given(SEEDS, st.sampled_from([1, 5, 64, 150]))  # a program each
@settings(max_examples=10)
def test_uncorrelated_inputs_leave_the_nearest_codes(seed, k):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(5, k))
    scale, qmax = grid(w, 8)
    codes, real, _ = round_columns(w, scale, qmax, np.diag(rng.uniform(0.1, 10, k)))
    np.testing.assert_array_equal(codes, nearest(w, scale, qmax))
    np.testing.assert_allclose(real * scale[:, None], w, rtol=1e-6)  # one float32 rounding


def test_two_columns_by_hand():
    """0.4 becomes 0, which moves the second weight by 0.4 H_01 / H_11: to the best of all codes."""
    w = np.asarray([[0.4, 0.3], [7.0, 0.3], [9.0, -6.9]])
    h = np.asarray([[2.0, 0.9], [0.9, 1.0]])
    codes, real, _ = round_columns(w, np.ones(3, np.float32), np.full(3, 7, np.float32), h)
    np.testing.assert_allclose(real, [[0.4, 0.66], [7.0, 0.3], [9.0, -5.1]], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[0, 1], [7, 0], [7, -5]])
    every = np.stack(np.meshgrid(*[np.arange(-7.0, 8.0)] * 2), -1).reshape(-1, 2)
    for row, found in zip(w, codes, strict=True):
        np.testing.assert_array_equal(every[output_error(every, row[None], h).argmin()], found)


def test_the_column_of_most_curvature_is_rounded_first():
    one, seven = np.ones(1, np.float32), np.full(1, 7, np.float32)
    h = np.asarray([[1.0, 0.9], [0.9, 2.0]])
    codes, real, _ = round_columns(np.asarray([[0.3, 0.4]]), one, seven, h)
    np.testing.assert_allclose(real, [[0.66, 0.4]], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[1, 0]])


@pytest.mark.slow
@given(SEEDS)
@settings(max_examples=10)
def test_each_row_takes_the_factor_of_least_error(seed):
    w, h = np.random.default_rng(seed).normal(size=(12, 70)), hessian(seed, 70)
    scale, qmax = grid(w, 4)
    factors = (1.0, 0.7, 0.85)
    codes, _, chosen = round_columns(w, scale, qmax, h, factors=factors)
    alone = [round_columns(w, scale, qmax, h, factors=(f,)) for f in factors]
    errors = np.stack([output_error(r.codes * r.scale[:, None], w, h) for r in alone])
    # The loop sums in float32.
    np.testing.assert_allclose(
        output_error(codes * chosen[:, None], w, h), errors.min(0), rtol=1e-3
    )
    assert len(set(np.round(chosen / scale, 3))) > 1
