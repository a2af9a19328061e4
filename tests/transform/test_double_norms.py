"""Norms taken twice: the same function, in integers exact for tokens of any length, and chosen
where lengths differ."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import prepared

from qnpu_jax import pipeline
from qnpu_jax.calibrate import calibrate_activations, collect_statistics, weight_scales
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text.windows import Windows
from qnpu_jax.transform import Starts
from qnpu_jax.transform.double_norms import MOST, widest_lengths, with_double_norms
from qnpu_sim import compile_model, run

LONG = 128.0
"""Length of the massive token, in units of the others'."""
MASSIVE = 7
IDS = np.asarray([[MASSIVE, *range(10, 33)], [MASSIVE, *range(40, 63)]], np.int32)
BITS = RECIPES["w8a16"].bits


@pytest.fixture(scope="module")
def model():
    """A tiny decoder with one token LONG times as long as the others, in every layer."""
    config, params = prepared("mha_tied")
    table = np.array(params["embed.weight"])
    table *= 1 / np.linalg.norm(table, axis=1, keepdims=True)
    table[MASSIVE] *= LONG
    return config, {**params, "embed.weight": jnp.asarray(table)}


def length_errors(config, params) -> np.ndarray:
    """How far the simulator's rows are from length 1 after the first layer's norm: (windows, T)."""
    dec = decoder(config, BITS, IDS.shape[1])
    stats = collect_statistics(dec, params, IDS)
    free = calibrate_activations(dec, stats, "class", False)[0] | weight_scales(dec, params, "mse")
    frozen = freeze(dec, params, free, ())
    program = compile_model(frozen, frozen.decoder(IDS.shape[1]), "litert_ref")
    name = "layers.0.attn.norm.out"
    codes = np.asarray(run(program, IDS, keep=name)[name], np.float64)
    rows = codes * float(frozen.tensors["layers.attn.norm.out"].scale[0])
    return np.abs(np.linalg.norm(rows, axis=-1).reshape(IDS.shape) - 1)


def test_twice_is_once_in_float(model):
    config, params = model
    once, twice = (
        np.asarray(forward(decoder(c, BITS, IDS.shape[1]), params, jnp.asarray(IDS[0])))
        for c in (config, replace(config, double_norms=True))
    )
    # Eight float32 roundings more a norm, five norms.
    np.testing.assert_allclose(twice, once, atol=40 * 2**-24 * np.abs(once).max())


def test_integers_keep_the_length_of_short_tokens(model):
    """Once: sums of squares of 2 codes. Twice: 0.2% are four codes of the first norm's rows, which
    have 8192 for the longest channel, and the table's interpolation."""
    config, params = model
    once = length_errors(config, params)
    twice = length_errors(replace(config, double_norms=True), params)
    assert np.median(once[:, 1:]) > 0.02
    assert twice.max() < 0.002


def test_the_choice(model):
    config, params = model
    ratio = widest_lengths(config, BITS, params, IDS)
    assert ratio > LONG**2 / 2 > MOST
    assert with_double_norms(config, BITS, params, IDS).double_norms
    even = IDS[:, 1:]
    chosen = with_double_norms(replace(config, double_norms=True), BITS, params, even)
    assert not chosen.double_norms and widest_lengths(config, BITS, params, even) < 10


@pytest.mark.parametrize("asked", [True, False])
def test_the_pipeline_takes_them_where_the_recipe_lets_it(model, asked):
    config, params = model
    recipe = replace(RECIPES["w8a16"], prefix="none", double_norms=asked)
    made = pipeline.quantize(config, params, recipe, Windows.of(IDS), Starts())
    assert made.model.config.double_norms is asked
