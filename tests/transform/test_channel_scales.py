"""Diagonal scales: the logits stay as they are, bit by bit where factors are powers of two; peaks
move from activations to weights as far as alpha says."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax import pipeline
from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import Decoder, decoder
from qnpu_jax.graph.layered import Params
from qnpu_jax.text import Windows
from qnpu_jax.transform.channel_scales import (
    ChannelPeaks,
    Diagonal,
    channel_peaks,
    identity_diagonal,
    limit_peaks,
    scale_channels,
    scale_parameter,
    smoothquant,
)
from qnpu_jax.transform.fold import offset_name
from qnpu_jax.transform.prefix import add_prefix

PLAN = tiny.PLANS["w8a8"]
FIELDS = ("up_down", "v_o", "q_k")
models = pytest.mark.parametrize("name", tiny.NAMES)
with_and_without_prefix = pytest.mark.parametrize("prefix", [(), tiny.PREFIX])
OUTLIER = 5


def model(name: str, prefix: tuple[int, ...] = ()) -> tuple[Decoder, dict[str, jax.Array]]:
    """A golden model with biases everywhere, rotated; a dict of the caller's own."""
    dec, params = made(name, prefix)
    return dec, dict(params)


@cache
def made(name: str, prefix: tuple[int, ...]) -> tuple[Decoder, dict[str, jax.Array]]:
    config, prepared = tiny.prepared(name)
    rng = np.random.default_rng(0)
    params: Params = {
        n: jnp.asarray(x if n.endswith("weight") else rng.normal(0, 0.3, x.shape), x.dtype)
        for n, x in prepared.items()
    }
    if prefix:
        params = add_prefix(config, PLAN, params, prefix)
    dec = decoder(config, PLAN, tiny.TOKENS, len(prefix))
    return dec, {n: jnp.asarray(x) for n, x in params.items()}


def random_diagonal(config: ModelConfig, *, exact: bool) -> Diagonal:
    """Factors from 1/8 to 8; powers of two where `exact`."""
    rng = np.random.default_rng(1)
    one = identity_diagonal(config)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        exponent = rng.uniform(-3, 3, shape)
        return 2.0 ** (np.rint(exponent) if exact else exponent)

    return Diagonal(**{f: draw(getattr(one, f).shape) for f in FIELDS})


@cache
def compiled(dec: Decoder):
    return jax.jit(partial(forward, dec))


def logits(dec: Decoder, params: Params) -> np.ndarray:
    on_device = {n: jnp.asarray(x) for n, x in params.items()}
    return np.asarray(compiled(dec)(on_device, tiny.random_ids((dec.tokens,))))


def peaks_of(dec: Decoder, params: Params) -> ChannelPeaks:
    return channel_peaks(dec, params, tiny.random_ids((3, dec.tokens)), batch=2)


@pytest.mark.slow
@models
@with_and_without_prefix
def test_scales_leave_the_logits_as_they_are(name, prefix):
    dec, params = model(name, prefix)
    expected = logits(dec, params)
    factors = random_diagonal(dec.config, exact=True)
    changed = scale_channels(dec.config, params, factors)
    # A power of two changes the exponent of every product and no bit of its mantissa.
    np.testing.assert_array_equal(logits(dec, changed), expected)
    moved = {n for n in params if not np.array_equal(changed[n], params[n])}
    linears = [
        f"{n}.{s}" for n in ("mlp.up", "attn.v", "attn.q", "attn.k") for s in ("weight", "bias")
    ]
    past = ["attn.prefix_k", "attn.prefix_v"] if prefix else []
    late = [offset_name(letter).removeprefix("layers.") for letter in dec.config.late_biases]
    ends = ["mlp.down.weight", "attn.o.weight"]
    assert moved == {f"layers.{n}" for n in (*linears, *late, *past, *ends)}


@models
def test_any_factors_leave_the_logits_to_rounding(name):
    dec, params = model(name, tiny.PREFIX)
    expected = logits(dec, params)
    got = logits(dec, scale_channels(dec.config, params, random_diagonal(dec.config, exact=False)))
    # float32 sums of up to 128 terms in 7 linears a layer; a wrong factor moves logits by O(1).
    assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


def test_identity_and_inverse():
    dec, params = model("gqa_llama3", tiny.PREFIX)
    one = scale_channels(dec.config, params, identity_diagonal(dec.config))
    factors = random_diagonal(dec.config, exact=True)
    inverse = Diagonal(**{f: 1 / getattr(factors, f) for f in FIELDS})
    back = scale_channels(dec.config, scale_channels(dec.config, params, factors), inverse)
    for name, x in params.items():
        np.testing.assert_array_equal(one[name], x)
        np.testing.assert_array_equal(back[name], x)
        assert one[name].dtype == back[name].dtype == np.float32


@pytest.mark.parametrize("name", ["gqa_llama3", "mqa_linear_bias"])
def test_learning_and_the_final_merge_scale_alike(name):
    dec, params = model(name, tiny.PREFIX)
    factors = random_diagonal(dec.config, exact=False)
    expected = scale_channels(dec.config, params, factors, np.float64)
    small = jax.tree.map(lambda f: jnp.asarray(f, jnp.float32), factors)
    for key, x in params.items():
        if key.startswith("layers."):
            got = jax.jit(jax.vmap(partial(scale_parameter, key)))(x, small)
        else:
            got = scale_parameter(key, x, jax.tree.map(lambda f: f[0], small))
        # Rounded twice: the factor and the product.
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[key], rtol=3 * 2**-24, atol=0, err_msg=key)


# Factors from statistics.


def with_outlier() -> tuple[Decoder, dict[str, jax.Array]]:
    """One channel of the input of down, a hundred times larger than its weights make it."""
    dec, params = model("gqa_llama3", tiny.PREFIX)
    for n in ("layers.mlp.up.weight", "layers.mlp.up.bias"):
        params[n] = params[n].at[:, OUTLIER].multiply(100.0)
    return dec, params


@pytest.mark.slow
def test_smoothquant_lowers_an_outlier_channel():
    dec, params = with_outlier()
    before = peaks_of(dec, params)
    assert (before.act.argmax(axis=1) == OUTLIER).all()
    changed = scale_channels(dec.config, params, smoothquant(dec.config, params, before, 0.5))
    after = peaks_of(dec, changed)

    def spread(act: np.ndarray) -> np.ndarray:
        return act.max(axis=1) / np.median(act, axis=1)

    assert (after.act.max(axis=1) < before.act.max(axis=1) / 5).all()
    assert (spread(after.act) < spread(before.act) / 5).all()
    expected = logits(dec, params)
    assert np.abs(logits(dec, changed) - expected).max() <= 1e-5 * np.ptp(expected)


def weight_peaks(config: ModelConfig, params: Params) -> tuple[np.ndarray, np.ndarray]:
    """Of the columns of down and o, per factor."""
    down, o = (np.abs(np.asarray(params[f"layers.{n}.weight"])) for n in ("mlp.down", "attn.o"))
    heads = (config.num_kv_heads, config.queries_per_kv_head, config.head_dim)
    return down.max(axis=1), o.reshape(*o.shape[:2], *heads).max(axis=(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa_llama3", "mqa_linear_bias"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_equalise_one_side(name, alpha):
    """All activations have one peak at 1, all weights at 0; queries and keys agree at both."""
    dec, params = model(name, tiny.PREFIX)
    factors = smoothquant(dec.config, params, peaks_of(dec, params), alpha)
    changed = scale_channels(dec.config, params, factors)
    peaks = peaks_of(dec, changed)
    sides = (peaks.act, peaks.mixed) if alpha else weight_peaks(dec.config, changed)
    for side in sides:
        rows = side.reshape(len(side), -1)
        np.testing.assert_allclose(rows, np.broadcast_to(rows[:, :1], rows.shape), rtol=1e-4)
    np.testing.assert_allclose(peaks.q, peaks.k, rtol=1e-4)
    for f in ("up_down", "v_o"):
        log_mean = np.log(getattr(factors, f)).reshape(dec.config.num_layers, -1).mean(axis=1)
        np.testing.assert_allclose(log_mean, 0, atol=1e-12)


@pytest.mark.slow
def test_dead_channels_are_left_alone():
    dec, params = model("gqa_llama3")
    for n in ("layers.mlp.up.weight", "layers.mlp.up.bias"):
        params[n] = params[n].at[:, OUTLIER].set(0.0)
    params["layers.attn.o.weight"] = jnp.zeros_like(params["layers.attn.o.weight"])
    params["layers.attn.k.weight"] = jnp.zeros_like(params["layers.attn.k.weight"])
    params["layers.attn.k.bias"] = jnp.zeros_like(params["layers.attn.k.bias"])
    factors = smoothquant(dec.config, params, peaks_of(dec, params), 0.5)
    assert (np.asarray(factors.up_down)[:, OUTLIER] == 1).all()
    assert np.ptp(factors.up_down) > 0.1
    np.testing.assert_array_equal(factors.v_o, np.ones_like(factors.v_o))
    np.testing.assert_array_equal(factors.q_k, np.ones_like(factors.q_k))


@pytest.mark.slow
def test_few_channels_are_brought_to_a_limit():
    """A channel that is loud in one layer: nothing else changes, and the logits stay."""
    dec, params = model("gqa_llama3", tiny.PREFIX)
    for n in ("layers.mlp.up.weight", "layers.mlp.up.bias"):
        params[n] = params[n].at[1, OUTLIER].multiply(64.0)
    params["layers.mlp.down.weight"] = params["layers.mlp.down.weight"].at[1, :, OUTLIER].divide(64)
    act = peaks_of(dec, params).act
    limit = 1.5 * np.quantile(act, 0.99, axis=1)
    factors = limit_peaks(act, 1.5)
    changed = {(int(layer), int(channel)) for layer, channel in np.argwhere(factors < 1)}
    assert (1, OUTLIER) in changed and len(changed) < 0.05 * factors.size
    assert factors.max() == 1
    one = identity_diagonal(dec.config)
    after = scale_channels(dec.config, params, dataclasses.replace(one, up_down=factors))
    peaks = peaks_of(dec, after).act
    assert (peaks <= limit[:, None] * (1 + 1e-5)).all()  # rounding of float32
    np.testing.assert_allclose(peaks[factors == 1], act[factors == 1], rtol=1e-4)
    expected = logits(dec, params)
    assert np.abs(logits(dec, after) - expected).max() <= 1e-5 * np.ptp(expected)


@pytest.mark.slow
@pytest.mark.parametrize("smooth", [0.0, 0.5])
def test_a_recipe_limits_what_its_smoothing_left(smooth):
    dec, params = model("gqa_llama3", tiny.PREFIX)
    text = Windows.of(tiny.random_ids((3, dec.tokens)))
    recipe = dataclasses.replace(tiny.recipe("w8a8"), smooth=smooth)
    before = peaks_of(dec, pipeline.smoothed(dec, params, recipe, text)).act
    limited = dataclasses.replace(recipe, peak_limit=0.9)
    after = peaks_of(dec, pipeline.smoothed(dec, params, limited, text)).act
    limit = 0.9 * np.quantile(before, 0.99, axis=1, keepdims=True)
    np.testing.assert_allclose(after, np.minimum(before, limit), rtol=1e-4)  # float32


@pytest.mark.slow
def test_a_layer_whose_channels_have_16_bits_keeps_its_loud_ones():
    """Without a prefix a limit of 8-bit inputs would make columns of `down` thousands of times
    louder, which its 8-bit weights do not bear."""
    dec, params = model("gqa_llama3", tiny.PREFIX)
    wide = dict.fromkeys(("layers.0.mlp.act", "layers.0.mlp.down"), 16)
    recipe = dataclasses.replace(tiny.recipe("w8a8"), peak_limit=0.9)
    bits = BitPlan((*wide.items(), *recipe.bits.rules))
    dec = decoder(dec.config, bits, dec.tokens, dec.prefix)
    text = Windows.of(tiny.random_ids((3, dec.tokens)))
    before, after = (
        peaks_of(dec, pipeline.smoothed(dec, params, r, text)).act
        for r in (dataclasses.replace(recipe, peak_limit=0.0), recipe)
    )
    np.testing.assert_array_equal(after[0], before[0])
    assert after[1].max() < before[1].max()


@pytest.mark.parametrize("peaks", [np.zeros((2, 8)), np.ones((2, 8)), np.eye(2, 400)])
def test_where_no_channel_stands_out_no_limit_changes_any(peaks):
    """Nor where nearly all channels are silent: there is no limit to bring one to."""
    np.testing.assert_array_equal(limit_peaks(peaks, 1.0), np.ones_like(peaks))


def test_peaks_are_of_the_whole_text_and_of_the_prefix():
    dec, params = model("gqa_llama3", tiny.PREFIX)
    windows = tiny.random_ids((3, dec.tokens))
    whole = channel_peaks(dec, params, windows, batch=2)
    parts = [channel_peaks(dec, params, windows[i : i + 1]) for i in range(3)]
    for field in ("act", "mixed", "q", "k"):
        expected = np.max([getattr(p, field) for p in parts], axis=0)
        # Batches of another size sum in another order.
        np.testing.assert_allclose(getattr(whole, field), expected, rtol=1e-4)
    loud = params | {"layers.attn.prefix_k": params["layers.attn.prefix_k"].at[1, 0, 0, 3].set(1e4)}
    half = dec.config.head_dim // 2
    assert half > 3 and channel_peaks(dec, loud, windows).k[1, 0, 3] == 1e4


# What is refused.


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_factors_must_be_positive_and_finite(field, value):
    dec, params = model("mha_tied")
    bad = identity_diagonal(dec.config)
    getattr(bad, field)[0, ..., 1] = value
    with pytest.raises(UserError, match=f"{field}: expected finite factors above 0, got {value}"):
        scale_channels(dec.config, params, bad)


@pytest.mark.parametrize("field", FIELDS)
def test_factors_must_fit(field):
    dec, params = model("mha_tied")
    one = identity_diagonal(dec.config)
    for wrong in (getattr(one, field)[:1], getattr(one, field)[..., :-1]):
        with pytest.raises(UserError, match=rf"{field}: expected shape \(\d.*got \(\d"):
            scale_channels(dec.config, params, dataclasses.replace(one, **{field: wrong}))


def test_factors_without_a_gamma_are_refused():
    dec, params = model("mha_tied")
    odd = dataclasses.replace(
        identity_diagonal(dec.config), attn_in=np.ones((2, dec.config.hidden_size))
    )
    with pytest.raises(UserError, match=r"attn_in: expected factors \['up_down', 'v_o', 'q_k'\]"):
        scale_channels(dec.config, params, odd)


def test_parameters_must_be_known():
    dec, params = model("mha_tied")
    one = identity_diagonal(dec.config)
    with pytest.raises(UserError, match=r"layers\.mlp\.extra: not expected"):
        scale_channels(dec.config, params | {"layers.mlp.extra": jnp.ones((2, 2))}, one)
    with pytest.raises(UserError, match=r"mlp\.up\.weights: not expected"):
        scale_parameter("mlp.up.weights", np.ones((4, 4)), jax.tree.map(lambda f: f[0], one))


@pytest.mark.slow
def test_alpha_is_a_share():
    dec, params = model("mha_tied")
    peaks = peaks_of(dec, params)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="alpha: expected 0 to 1"):
            smoothquant(dec.config, params, peaks, alpha)
