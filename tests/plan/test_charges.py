"""Charges of a mixed decoder against the KL itself, on tiny models."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax.calibrate import GptqSettings, gptq
from qnpu_jax.fakequant import under_roots
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import decoder, shared_widths
from qnpu_jax.graph.scales import resolve
from qnpu_jax.measure import mean_kl
from qnpu_jax.plan.charges import (
    arrays,
    charges,
    divergences,
    factors,
    mixed,
    rounded_pass,
    without,
)
from qnpu_jax.plan.groups import choices

IDS = tiny.random_ids((3, tiny.TOKENS), seed=9)


@functools.cache
def made(name: str, low: str = "w4a8", high: str = "w8a16"):
    """A mixed decoder, its float logits, and the low plan's parameters and scales."""
    dec, params, free = tiny.calibrated(name, low)
    fitted = gptq(dec, params, resolve(dec, free), IDS, GptqSettings(exact=False))
    free = {n: fitted.scales.get(n, q) for n, q in free.items()}
    above = decoder(dec.config, tiny.PLANS[high], tiny.TOKENS, dec.prefix)
    model = mixed(choices(dec, above), params, fitted.params, free)
    references = [forward(dec, params, jnp.asarray(ids)) for ids in IDS]
    return model, references, fitted.params, free


def low_and_high(model):
    n = len(model.choices.groups)
    return [False] * n, [True] * n


@pytest.mark.parametrize("name", ["gqa_llama3", "gemma3_tiny", "qwen2_tiny"])
def test_charges_sum_to_the_loss(name):
    """The integral is exact to the rule's order; 5% is what the planner's issue asks for."""
    model, references, *_ = made(name)
    low, _ = low_and_high(model)
    found = charges(model, IDS, references, low)
    lost = found.kl - found.base
    assert (lost > 0).all()
    np.testing.assert_allclose(found.groups.sum(1), lost, rtol=0.05)


@pytest.mark.parametrize("name", ["gqa_llama3", "gemma3_tiny"])
def test_a_charge_is_what_is_won_without_the_error(name):
    model, references, *_ = made(name)
    low, _ = low_and_high(model)
    found = charges(model, IDS, references, low)
    order = np.argsort(-found.groups.mean(0))[:20]
    left = [without(model, w, r, low, order.tolist()) for w, r in zip(IDS, references, strict=True)]
    fall = found.kl.mean() - np.mean(left, axis=0)
    charged = found.groups.mean(0)[order]
    assert np.corrcoef(fall, charged)[0, 1] > 0.9
    assert 0.7 < charged.sum() / fall.sum() < 1.3  # 72 tokens: errors are not independent here


@pytest.mark.parametrize("low", ["w4a8", "w4a8s8", "w4a8i8"])
def test_the_low_plan_is_fake_quant(low):
    """But for tensors of 16 bits, which count as exact; i8 has none."""
    model, references, params, free = made("gqa_llama3", low)
    dec = model.choices.low
    none, _ = low_and_high(model)
    scales = resolve(dec, free)
    for ids, reference, found in zip(
        IDS, references, divergences(model, IDS, references, none), strict=True
    ):
        logits = forward(dec, params, jnp.asarray(ids), scales)
        expected = float(mean_kl(reference, logits))
        assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("low", ["w4a8", "w4a8i8"])
def test_the_high_plan_is_fake_quant_of_what_is_no_choice(low):
    """8-bit weights, and no activation of a group rounded, nor what layers share with one: 16 bits
    count as exact."""
    model, references, _, free = made("gqa_llama3", low)
    _, high = low_and_high(model)
    chosen = {m.prefix + m.name for m in model.choices.index}
    dec = model.choices.low
    shared = shared_widths(dec.config).items()
    chosen |= {name for name, like in shared if f"{name.partition('.')[0]}.{like}" in chosen}
    assert ("layers.rope.cos" in chosen) == (low == "w4a8i8")
    scales = {n: q for n, q in resolve(dec, free).items() if n not in chosen}
    lost = divergences(model, IDS, references, high)
    for ids, reference, found in zip(IDS, references, lost, strict=True):
        logits = forward(dec, model.params, jnp.asarray(ids), scales)
        expected = float(mean_kl(reference, logits))
        assert found == pytest.approx(expected, rel=0.02)


def test_layers_that_are_no_choice_stay_low_beside_those_that_are():
    """A high plan that raises one layer's wide MLP: the other's is rounded as in the low plan."""
    model, references, params, free = made("gqa_llama3", "w8a8", "mixed")
    low, _ = low_and_high(model)
    chosen = {m.prefix + m.name for m in model.choices.index}
    assert chosen == {"layers.mlp.act", "layers.mlp.down"}
    assert {m.layer for m in model.choices.index} == {1}
    scales = dict(resolve(model.choices.low, free))
    for name in chosen:  # what 8 bits reach, in 16
        q = scales[name]
        scale, zero_point = np.array(q.scale), np.array(q.zero_point)
        scale[1] *= 256 / 2**15
        zero_point[1] = 0
        scales[name] = dataclasses.replace(q, scale=scale, zero_point=zero_point)
    found = charges(model, IDS, references, low)
    np.testing.assert_allclose(found.groups.sum(1), found.kl - found.base, rtol=0.05)
    for ids, reference, base in zip(IDS, references, found.base, strict=True):
        logits = forward(model.choices.high, params, jnp.asarray(ids), scales)
        expected = float(mean_kl(reference, logits))
        assert base == pytest.approx(expected, rel=0.02)


def test_a_raised_group_is_charged_nothing():
    model, references, *_ = made("gqa_llama3")
    low, _ = low_and_high(model)
    half = [i % 2 == 0 and g.kind == "weight" for i, g in enumerate(model.choices.groups)]
    found = charges(model, IDS, references, half)
    assert (found.groups[:, half] == 0).all()
    assert (found.groups[:, np.logical_not(half)] != 0).any(0).all()
    assert found.kl.mean() < divergences(model, IDS, references, low).mean()


def test_a_plan_that_raises_everything_charges_nothing():
    model, references, *_ = made("gqa_llama3")
    _, high = low_and_high(model)
    found = charges(model, IDS, references, high)
    assert (found.groups == 0).all()
    np.testing.assert_array_equal(found.kl, divergences(model, IDS, references, high))
    np.testing.assert_allclose(found.base, found.kl, rtol=1e-3)  # sums in another order


def test_factors_reach_every_tensor_of_a_group():
    model, *_ = made("gqa_llama3")
    found = model.choices
    one = [g.name == "layers.1.mlp.down.weight" for g in found.groups]
    at = factors(found, one)
    assert np.asarray(at["layers.mlp.down.weight"]).tolist() == [1.0, 0.0]
    assert {n: np.shape(t) for n, t in at.items() if n.startswith("head")} == {
        "head.input": (), "head.logits": (),
    }  # fmt: skip


def test_a_sum_of_squares_of_code_0_is_charged_in_numbers():
    """Rows far shorter than the longest: the kernel's largest code stands for 1 / sqrt(0)."""
    model, references, *_ = made("gqa_llama3")
    roots = {n for n in model.scales if n.rpartition(".")[2] in ("squares", "sum", "root")}
    scopes = ("", "attn.", "mlp.")
    expected = {f"{scope}norm.{n}" for scope in scopes for n in ("sum", "root")}
    assert under_roots(model.choices.low) == expected
    scales = dict(model.scales)
    for name in roots:
        scales[name] = dataclasses.replace(scales[name], scale=1e6 * scales[name].scale)
    model = dataclasses.replace(model, scales=scales)
    low, _ = low_and_high(model)
    at = factors(model.choices, low)
    _, errors = rounded_pass(model.choices.low, arrays(model, IDS[0]), at)
    assert all(np.isfinite(e).all() for e in errors.values())
    found = charges(model, IDS, references, low)
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found.kl, divergences(model, IDS, references, low))
