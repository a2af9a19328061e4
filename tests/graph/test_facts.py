"""Each fact about norms, activation and factors computes what a direct reference computes."""

import dataclasses

import facts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.recipes import RECIPES
from qnpu_jax.transform.channel_scales import (
    Diagonal,
    channel_peaks,
    identity_diagonal,
    scale_channels,
    smoothquant,
)
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.rotate import random_rotation, rotate

every = pytest.mark.parametrize("fact", list(facts.FACTS))
IDS = tiny.random_ids((tiny.TOKENS,), 3)


def logits(config, params) -> np.ndarray:
    dec = decoder(config, RECIPES["w8a8"].bits, len(IDS))
    on_device = {n: jnp.asarray(x, jnp.float32) for n, x in params.items()}
    return np.asarray(jax.jit(lambda p: forward(dec, p, jnp.asarray(IDS)))(on_device))


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


@every
def test_the_float_graph_is_the_reference(fact):
    """Sums of up to 40 float32 terms at 2^-24, through 2 layers whose norms spread them; a fact
    read wrongly moves logits by more than 1%."""
    config = facts.FACTS[fact]
    params = facts.checkpoint(config)
    expected = facts.reference(config, params, IDS)
    assert error(logits(config, fold_norms(config, params)), expected) <= 1e-5


@pytest.mark.parametrize("name", ["norms", "qk_norm", "activation", "query_scale", "embed_scale"])
def test_the_reference_reads_every_fact(name):
    """Without one of Gemma's facts the logits are others: the test above can fail."""
    config = facts.FACTS["both, qk head, gelu"]
    params = facts.checkpoint(config)
    other = facts.replace(config, **{name: getattr(facts.BASE, name)})
    got = facts.reference(other, params, IDS)
    assert error(got, facts.reference(config, params, IDS)) > 0.01


def scaled(config, params):
    rng, one = np.random.default_rng(1), identity_diagonal(config)
    factors = {n: 2.0 ** rng.uniform(-2, 2, np.shape(x)) for n, x in one.given().items()}
    return scale_channels(config, params, Diagonal(**factors), np.float64)


def rotated(config, params):
    return rotate(config, params, random_rotation(config, 5), np.float64)


@every
@pytest.mark.parametrize("transform", [rotated, scaled])
def test_transforms_leave_the_logits_alone(fact, transform):
    """To 1e-10 of the range in float64: no approximation. In float32 weights are rounded once."""
    config, raw = facts.FACTS[fact], facts.checkpoint(facts.FACTS[fact])
    folded = fold_norms(config, raw, np.float64)
    changed = transform(config, folded)
    for name in ("layers.attn.v.weight", "layers.attn.o.weight"):
        assert np.abs(changed[name] - folded[name]).max() > 0.05, "nothing happened"
    expected = facts.reference(config, raw, IDS)
    assert error(facts.reference(*facts.as_checkpoint(config, folded), IDS), expected) <= 1e-12
    assert error(facts.reference(*facts.as_checkpoint(config, changed), IDS), expected) <= 1e-10
    assert error(logits(config, changed), expected) <= 1e-4


@pytest.mark.parametrize("fact", ["both, qk head, gelu", "both, residual scale"])
def test_smoothing_balances_the_inputs_that_no_rotation_reaches(fact):
    """At alpha 1 every channel of a block's input has one peak; the logits stay."""
    config = facts.FACTS[fact]
    folded = fold_norms(config, facts.checkpoint(config))
    loud = folded["layers.mlp.norm.gamma"]
    loud[:, 0, 3] *= 100
    dec = decoder(config, RECIPES["w8a8"].bits, tiny.TOKENS)
    peaks = channel_peaks(dec, folded, facts.TEXT)
    assert peaks.attn_in is not None and peaks.mlp_in is not None
    assert (peaks.mlp_in.argmax(axis=1) == 3).all()
    smooth = scale_channels(config, folded, smoothquant(config, folded, peaks, 1.0))
    after = channel_peaks(dec, smooth, facts.TEXT)
    for x in (after.attn_in, after.mlp_in, after.attn_out, after.mlp_out):
        assert x is not None
        # Peaks are divided by themselves: what is left is rounding of float32.
        np.testing.assert_allclose(x / x[:, :1], 1, rtol=1e-4)
    assert error(logits(config, smooth), logits(config, folded)) <= 1e-4


@every
def test_scales_of_queries_and_keys_go_where_no_norm_erases_them(fact):
    config = facts.FACTS[fact]
    folded = fold_norms(config, facts.checkpoint(config), np.float64)
    one = identity_diagonal(config)
    changed = scale_channels(config, folded, dataclasses.replace(one, q_k=2 * one.q_k), np.float64)
    moved = {n for n in folded if not np.array_equal(changed[n], folded[n])}
    normed = {"layers.attn.q_norm.gamma", "layers.attn.k_norm.gamma"}
    linears = {"layers.attn.q.weight", "layers.attn.k.weight"}
    expected = (normed, linears) if config.qk_norm else (linears, normed)
    assert expected[0] <= moved
    assert not expected[1] & moved


@every
def test_r1_is_drawn_and_taken_only_where_it_merges(fact):
    config = facts.FACTS[fact]
    rotation, r1 = random_rotation(config, 5), random_rotation(facts.BASE, 5).r1
    folded = fold_norms(config, facts.checkpoint(config))
    assert (rotation.r1 is None) == (config.norms != "before")
    if not config.merges_r1:
        with pytest.raises(UserError, match="R1: does not merge"):
            rotate(config, folded, facts.replace(rotation, r1=r1))


@pytest.mark.parametrize("gamma", ["attn.post_norm", "attn.q_norm"])
def test_a_gamma_narrower_than_its_product_is_refused(gamma):
    """The simulator's kernels would read its codes as 16 bits."""
    rules = ((f"layers.*.{gamma}.gamma", 8), *RECIPES["w8a8"].bits.rules)
    with pytest.raises(UserError, match=rf"layers\.0\.{gamma}\.gamma: the plan gives it 8 bits"):
        decoder(facts.FACTS["both, qk head, gelu"], BitPlan(rules), 4)


@every
def test_a_missing_gamma_is_named(fact):
    config = facts.FACTS[fact]
    params, folded = facts.checkpoint(config), fold_norms(config, facts.checkpoint(config))
    for name in [n for n in params if n.endswith(".gamma")]:
        with pytest.raises(UserError, match=f"{name}: missing"):
            fold_norms(config, {n: x for n, x in params.items() if n != name})
    for name in [n for n in folded if n.endswith(".gamma")]:
        with pytest.raises(UserError, match=f"{name}: missing"):
            rotate(
                config, {n: x for n, x in folded.items() if n != name}, random_rotation(config, 0)
            )
