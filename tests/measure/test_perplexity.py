"""Perplexity and divergence against sums written out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax.measure.perplexity import (
    Logits,
    compare,
    divergence,
    float_logits,
    mean_kl,
    perplexity,
)

WINDOWS = tiny.random_ids((5, 12))


def table(rows: np.ndarray) -> Logits:
    """A reading that looks only at the last token: logits are a row of a (V, V) table."""
    return lambda ids: rows[ids].astype(np.float32)


def random_table(seed: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (96, 96)).astype(np.float32)


def kl_by_definition(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """Mean over positions of sum p log(p / q), in float64."""
    p_logits, q_logits = p_logits.astype(np.float64), q_logits.astype(np.float64)
    log_p = p_logits - np.log(np.sum(np.exp(p_logits), axis=-1, keepdims=True))
    log_q = q_logits - np.log(np.sum(np.exp(q_logits), axis=-1, keepdims=True))
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


def test_perplexity_of_a_known_chain():
    """Token 1 follows token 0 with probability 1/4 and token 0 follows 1 with 1/2."""
    rows = np.log([[3 / 4, 1 / 4], [1 / 2, 1 / 2]])
    windows = np.array([[0, 1, 0], [0, 1, 0]], np.int32)
    expected = (1 / 4 * 1 / 2) ** (-1 / 2)
    for batch in (None, 1, 2):
        # 1e-6: float32
        assert perplexity(table(rows), windows, batch) == pytest.approx(expected, rel=1e-6)


def test_progress_counts_batches():
    seen = []

    def track(items, length):
        seen.append(length)
        return items

    perplexity(table(random_table(0)), WINDOWS, 2, track)
    divergence(table(random_table(0)), table(random_table(1)), WINDOWS, None, track)
    assert seen == [3, 5]


@pytest.mark.slow
def test_a_model_does_not_diverge_from_itself():
    config, params = tiny.prepared("gqa_llama3")
    logits = float_logits(config, tiny.PLANS["w8a8"], params)
    same = divergence(logits, logits, WINDOWS, 2)
    assert same.kl == 0.0
    assert same.top1 == 1.0


def test_divergence_by_hand():
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 log 3/2 + 1/4 log 1/2, and 0 after token 1."""
    p = np.log([[3 / 4, 1 / 4], [1 / 4, 3 / 4]])
    q = np.log([[1 / 2, 1 / 2], [1 / 4, 3 / 4]])
    found = divergence(table(p), table(q), np.array([[0, 1], [0, 0]], np.int32))
    one = 3 / 4 * np.log(3 / 2) + 1 / 4 * np.log(1 / 2)
    assert found.kl == pytest.approx(3 / 4 * one, rel=1e-6)  # float32
    assert found.top1 == 1.0  # of equal logits the first counts


@pytest.mark.parametrize("batch", [None, 2])
def test_divergence_by_definition(batch):
    p, q = random_table(0), random_table(1)
    found = divergence(table(p), table(q), WINDOWS, batch)
    expected = kl_by_definition(p[WINDOWS], q[WINDOWS])
    assert found.kl == pytest.approx(expected, rel=1e-5)  # float32 sums of 96 terms
    agree = np.argmax(p[WINDOWS], axis=-1) == np.argmax(q[WINDOWS], axis=-1)
    assert found.top1 == pytest.approx(float(np.mean(agree)))


@pytest.mark.parametrize("batch", [None, 2])
def test_a_comparison_is_the_three_readings_in_one_pass(batch):
    calls = {"p": 0, "q": 0}

    def counted(name: str, rows: np.ndarray) -> Logits:
        def read(ids: np.ndarray) -> np.ndarray:
            calls[name] += 1
            return table(rows)(ids)

        return read

    p, q = random_table(0), random_table(1)
    found = compare(counted("p", p), counted("q", q), WINDOWS, batch)
    assert calls == dict.fromkeys("pq", 5 if batch is None else 3)
    assert found.divergence == divergence(table(p), table(q), WINDOWS, batch)
    # Sums of float32 in another order.
    assert found.reference == pytest.approx(perplexity(table(p), WINDOWS, batch), rel=1e-6)
    assert found.other == pytest.approx(perplexity(table(q), WINDOWS, batch), rel=1e-6)
    logs = [
        np.log(perplexity(table(q), w, batch) / perplexity(table(p), w, batch))
        for w in WINDOWS[:, None]
    ]
    assert found.stderr == pytest.approx(np.std(logs, ddof=1) / np.sqrt(len(logs)), rel=1e-5)
    assert compare(table(p), table(q), WINDOWS[:1]).stderr == 0


def test_a_small_divergence_is_not_lost_in_rounding():
    """Logits 0.001 apart at 20: KL is 5e-7, less than the rounding of one log p (1e-6)."""
    p = random_table(0) + np.float32(20)
    q = p + random_table(1, spread=1e-3)
    found = divergence(table(p), table(q), WINDOWS)
    expected = kl_by_definition(p[WINDOWS], q[WINDOWS])
    assert 1e-7 < expected < 1e-6
    # 1%: log p is stored to 1e-6 of differences of 1e-3, an error that averages out.
    assert found.kl == pytest.approx(expected, rel=0.01)


def test_certainty_and_impossible_tokens():
    sure, turned = np.array([[200.0, -200.0]] * 2), np.array([[-200.0, 200.0]] * 2)
    ids = np.zeros((1, 3), np.int32)
    assert divergence(table(sure), table(turned), ids).kl == pytest.approx(400.0)
    never = np.array([[0.0, -np.inf]] * 2)
    assert divergence(table(never), table(never), ids).kl == 0.0
    half = np.zeros((2, 2))
    assert divergence(table(never), table(half), ids).kl == pytest.approx(np.log(2), rel=1e-6)
    assert divergence(table(half), table(never), ids).kl == np.inf


def test_mean_kl_by_hand():
    p, q = np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([[0.25, 0.75], [0.25, 0.75]])
    expected = (0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert float(mean_kl(jnp.log(p), jnp.log(q))) == pytest.approx(expected, rel=1e-5)
