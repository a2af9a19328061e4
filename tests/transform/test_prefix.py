"""The prefix search: it finds the tokens that tame the outliers, or says that none do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax.config import LayerKind, ModelConfig
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES
from qnpu_jax.transform import prefix
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.prefix import CANDIDATES, OUTLIER_RATIO, add_prefix, find_prefix

PLAN = RECIPES["w8a8"].bits
ORDINARY, SINK, DECOY = range(3, 32), 1, 2
CONFIG = ModelConfig(
    family="llama", vocab_size=32, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=1,
    num_kv_heads=1, head_dim=4, max_positions=128, kinds=(LayerKind(100.0),),
)  # fmt: skip
CONSTANT, IS_SINK, TRIGGER = 0, 1, 2
"""Coordinates of the residual stream: 1 for every token; 1 for the sink; 1 for what grows a
massive activation."""


def sink_model() -> dict[str, jax.Array]:
    """Folded parameters of a layer in which SINK and DECOY grow massive activations, unless they
    see a SINK before themselves.

    Queries and the key of SINK lie in the RoPE pair of frequency 0.1 so that their score at
    distance d is about 400 sin(0.1 d - 0.05): negative for the token itself, large for the 31 that
    follow. The value of SINK takes the trigger away; SwiGLU squares what is left of it.
    """
    d, f = CONFIG.hidden_size, CONFIG.intermediate_size
    rng = np.random.default_rng(0)
    embed = np.zeros((32, d))
    embed[:, CONSTANT] = 1
    embed[SINK, IS_SINK] = 1
    embed[[SINK, DECOY], TRIGGER] = 1
    embed[:, 3:] = rng.normal(0, 0.2, (32, d - 3))
    names = {"attn.q": (4, d), "attn.k": (4, d), "attn.v": (4, d), "attn.o": (d, 4)}
    names |= {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    w = {n: np.zeros(s) for n, s in names.items()}
    q_bias = np.zeros(4)
    q_bias[[1, 3]] = -20 * np.sin(0.05), -20 * np.cos(0.05)  # pair 1 of a head is (1, 3)
    w["attn.k"][1, IS_SINK] = 40
    w["attn.v"][0, IS_SINK] = 1
    w["attn.o"][TRIGGER, 0] = -10
    w["mlp.gate"][:] = rng.normal(0, 1, (f, d))
    w["mlp.up"][:] = rng.normal(0, 1, (f, d))
    w["mlp.gate"][0] = w["mlp.up"][0] = 100 * np.eye(d)[TRIGGER]
    w["mlp.down"][:] = rng.normal(0, 1, (d, f))
    params = {"embed.weight": embed, "head.weight": embed, "head.bias": np.zeros(32)}
    for name, x in w.items():
        params[f"layers.{name}.weight"] = x[None]
        params[f"layers.{name}.bias"] = (q_bias if name == "attn.q" else np.zeros(len(x)))[None]
    return {n: jnp.asarray(x, jnp.float32) for n, x in params.items()}


def sink_windows(*, sinks: bool = True) -> np.ndarray:
    """Windows of 24 ordinary tokens, each with one SINK and, more often, a DECOY before it."""
    rng = np.random.default_rng(1)
    windows = rng.choice(ORDINARY, (8, 24)).astype(np.int32)
    windows[:, 3] = windows[:, 7] = DECOY
    if sinks:
        windows[:, 10] = SINK
    return windows


@pytest.mark.slow
def test_the_search_picks_the_sink_among_more_frequent_outliers():
    found = find_prefix(CONFIG, PLAN, sink_model(), sink_windows(), None, 4)
    assert found.tokens == (SINK,)
    assert max(found.before) > OUTLIER_RATIO >= max(found.after)
    assert found.peak_before > 10 * found.peak_after
    assert found.ok


def test_where_there_is_a_bos_it_comes_first():
    bos = int(ORDINARY[0])
    found = find_prefix(CONFIG, PLAN, sink_model(), sink_windows(), bos, 4)
    assert found.tokens == (bos, SINK)
    found = find_prefix(CONFIG, PLAN, sink_model(), sink_windows(), SINK, 4)
    assert found.tokens == (SINK,)


@pytest.mark.slow
def test_a_prefix_that_does_not_help_is_not_taken():
    """BOS is no sink here, and there is no place for one after it."""
    bos = int(ORDINARY[0])
    found = find_prefix(CONFIG, PLAN, sink_model(), sink_windows(), bos, 1)
    assert not found.ok
    assert found.tokens == ()
    assert max(found.after) > OUTLIER_RATIO
    assert (found.after, found.peak_after) == (found.before, found.peak_before)


@pytest.mark.slow
def test_outliers_that_no_prefix_tames_are_told():
    params = dict(sink_model())
    row = params["embed.weight"].at[DECOY].multiply(1000.0)
    found = find_prefix(CONFIG, PLAN, params | {"embed.weight": row}, sink_windows(), None, 3)
    assert not found.ok
    assert OUTLIER_RATIO < max(found.after) <= max(found.before)


@pytest.mark.parametrize(
    ("worst", "chosen"),
    [
        ([1000, 200, 500, 300], 1),
        ([1000, 200, 500, 100], 3),
        ([1000, 2000, 1000, 3000], 0),
        ([1000, 2000, 64, 1], 2),
    ],
)
def test_the_best_step_counts(monkeypatch, worst, chosen):
    """`worst` is the largest ratio after each length; a search that is ok ends."""

    def outliers(config, plan, params, windows, tokens, slots):
        n = len(tokens)
        return prefix._Outliers(np.asarray([1.0, worst[n]]), float(n), [SINK])

    monkeypatch.setattr(prefix, "_outliers", outliers)
    found = find_prefix(CONFIG, PLAN, sink_model(), sink_windows(), None, 3)
    assert len(found.tokens) == chosen
    assert (found.after, found.peak_after) == ((1.0, worst[chosen]), chosen)
    assert found.ok == (worst[chosen] <= OUTLIER_RATIO)


def test_text_without_outliers_needs_no_prefix():
    windows = np.where(sink_windows(sinks=False) == DECOY, ORDINARY[0], sink_windows(sinks=False))
    found = find_prefix(CONFIG, PLAN, sink_model(), windows.astype(np.int32), SINK, 4)
    assert found.tokens == () and found.before == found.after


@pytest.mark.slow
def test_places_that_a_prefix_does_not_fill_are_not_seen():
    config, params = load_params(tiny.GOLDEN / "gqa_llama3")
    params, windows = fold_norms(config, params), tiny.random_ids((2, tiny.TOKENS))
    found = [prefix._outliers(config, PLAN, params, windows, (1, 7), slots) for slots in (2, 5)]
    # Equal but for the order in which a longer row of keys is summed.
    np.testing.assert_allclose(found[0].ratio, found[1].ratio, rtol=1e-4)
    assert found[0].peak == pytest.approx(found[1].peak, rel=1e-4)


def test_prefix_rows_are_those_of_every_layer():
    config, params = load_params(tiny.GOLDEN / "gqa_llama3")
    params = fold_norms(config, params)
    with_prefix = add_prefix(config, PLAN, params, (1, 7, 3))
    for letter in "kv":
        name = f"layers.attn.prefix_{letter}"
        # A prefix is causal: a shorter one has the same first rows, up to the order of sums.
        rows, shorter = with_prefix[name], add_prefix(config, PLAN, params, (1, 7))[name]
        assert rows.shape == ((2, 2, 3, 24) if letter == "k" else (2, 2, 24, 3))
        if letter == "v":
            rows, shorter = (x.swapaxes(2, 3) for x in (rows, shorter))
        np.testing.assert_allclose(shorter, rows[:, :, :2], atol=1e-5 * np.abs(rows).max())
    assert {n: x for n, x in with_prefix.items() if ".prefix_" not in n}.keys() == params.keys()


def test_candidates_are_limited():
    """DECOYs more frequent than the sink fill the list of candidates before it."""
    params = dict(sink_model())
    decoys = np.asarray(ORDINARY[:CANDIDATES])
    embed = params["embed.weight"].at[decoys, TRIGGER].set(1.0)
    windows = sink_windows()
    windows[windows >= ORDINARY[CANDIDATES]] = ORDINARY[-1]
    windows[:, 12 : 12 + CANDIDATES] = decoys
    windows[:, :4] = decoys
    found = find_prefix(CONFIG, PLAN, params | {"embed.weight": embed}, windows, None, 1)
    assert not found.ok and found.tokens != (SINK,)


def test_reports_are_plain_numbers():
    found = dataclasses.asdict(find_prefix(CONFIG, PLAN, sink_model(), sink_windows(), None, 4))
    assert all(type(t) is int for t in found["tokens"])
    assert all(type(r) is float for r in (*found["before"], found["peak_before"]))
    assert found["ok"] is True
