"""Sums of products of bytes: exact by whichever instructions they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qnpu_sim import exact_dots
from qnpu_sim.exact_dots import BFLOAT16, INT8, dot, fastest

DIMS = (((1,), (1,)), ((), ()))


def extreme(rows: int, k: int, magnitude: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and weights of which each row's sum reaches its bound."""
    rng = np.random.default_rng(k)
    w = (magnitude * rng.choice([-1, 1], (rows, k))).astype(np.int8)
    x = np.where(w > 0, -128, 127).astype(np.int8)
    return np.concatenate([x, rng.integers(-128, 128, (3, k), np.int8)]), w


@pytest.mark.parametrize("k", [1, 576, 1032])
@pytest.mark.parametrize("how", [INT8, BFLOAT16])
def test_both_are_exact_up_to_the_proved_bound(how, k):
    x, w = extreme(40, k, 127)
    assert k * 127 * 128 < 2**24
    got = jax.jit(lambda x, w: dot(x, w, DIMS, how))(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_array_equal(got, x.astype(np.int64) @ w.astype(np.int64).T)


def test_bfloat16_needs_the_instructions_and_the_proof(monkeypatch):
    monkeypatch.setattr(exact_dots, "_bfloat16_is_faster", lambda: True)
    k = 2**24 // (128 * 127)  # 1032 weights of 127 stay below 2^24, one more may not
    assert fastest(np.full((2, k), -127, np.int8)) == BFLOAT16
    assert fastest(np.full((2, k + 1), -127, np.int8)) == INT8
    assert fastest(np.full((2, 8 * k), 15, np.int8)) == BFLOAT16
    monkeypatch.setattr(exact_dots, "_bfloat16_is_faster", lambda: False)
    assert fastest(np.ones((1, 1), np.int8)) == INT8


def test_past_the_bound_bfloat16_would_be_wrong():
    """Why there is a proof: an odd sum above 2^24 has no float32."""
    x = np.full((1, 1100), -127, np.int8)
    w = np.full((1, 1100), -127, np.int8)
    w[0, 0] = -126
    exact = int((x.astype(np.int64) @ w.astype(np.int64).T).item())
    assert exact % 2 and exact > 2**24
    assert dot(jnp.asarray(x), jnp.asarray(w), DIMS, BFLOAT16).item() != exact
