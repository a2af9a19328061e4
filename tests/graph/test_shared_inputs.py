"""Inputs that layers share: tables of every RoPE scaling, windows, and the names of what kinds of
layers share."""

import dataclasses

import kinds
import numpy as np
import pytest
import tiny

from qnpu_jax.config import LayerKind, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import MASK, MASK_CODE, decoder
from qnpu_jax.graph.shared_inputs import layer_inputs, masks, rope_frequencies, rope_tables, visible
from qnpu_jax.graph.shared_names import select_shared, shared_names
from qnpu_jax.integer.model import IntegerModel

DIVISORS = tuple(1 + 0.5 * i for i in range(32))
SCALINGS = [
    RopeScaling("yarn", 4.0, original_max_positions=4096, attention_factor=1.13),
    RopeScaling("yarn", 40.0, original_max_positions=4096, truncate=False),
    RopeScaling("yarn", 8.0, original_max_positions=8, beta_fast=64.0, beta_slow=32.0),
    RopeScaling("longrope", 32.0, attention_factor=1.19, divisors=DIVISORS),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("rotary", [None, 32])
def test_scaled_tables_follow_the_definition(scaling, rotary):
    config = dataclasses.replace(tiny.SMOLLM2, rotary_dim=rotary)
    scaling = dataclasses.replace(scaling, divisors=scaling.divisors[: config.rotated // 2])
    kind = LayerKind(150000.0, scaling)
    expected = np.zeros(32)
    expected[: config.rotated // 2] = kinds.frequencies(config, kind)
    got = rope_frequencies(config, kind)
    np.testing.assert_allclose(got, expected, rtol=1e-12)  # float64 rounding
    cos, sin = rope_tables(config, kind, np.asarray([0, 1, 77, 4095]))
    # float32 rounds at 2^-25; an angle of 4095 carries 4095 * 2^-53. The factor is not in them.
    for t, position in enumerate((0, 1, 77, 4095)):
        angle = position * np.tile(expected, 2)
        sign = np.repeat([-1, 1], 32)
        np.testing.assert_allclose(cos[t, 0], np.cos(angle), rtol=0, atol=2**-24)
        np.testing.assert_allclose(sin[t, 0], sign * np.sin(angle), rtol=0, atol=2**-24)


def test_yarn_scales_low_frequencies_and_blends_between():
    kind = LayerKind(150000.0, SCALINGS[0])
    plain = rope_frequencies(tiny.SMOLLM2, LayerKind(150000.0))
    ratio = rope_frequencies(tiny.SMOLLM2, kind) / plain
    np.testing.assert_array_equal(ratio[:4], 1)
    np.testing.assert_allclose(ratio[-4:], 1 / 4, rtol=1e-15)
    assert np.any((ratio > 0.26) & (ratio < 0.99)) and np.all(np.diff(ratio) <= 0)


def test_layers_without_positions_turn_nothing():
    cos, sin = rope_tables(tiny.SMOLLM2, LayerKind(None), np.arange(5))
    assert (cos == 1).all() and (sin == 0).all() and cos.shape == (5, 1, 64)


def test_divisors_that_are_too_few_are_refused():
    kind = LayerKind(10000.0, RopeScaling("longrope", 4.0, divisors=(1.0, 2.0)))
    with pytest.raises(
        UserError, match="rope_scaling: 2 divisors for 32 frequencies; expected one"
    ):
        rope_frequencies(tiny.SMOLLM2, kind)


@pytest.mark.parametrize("window", [1, 3, 6, 100])
@pytest.mark.parametrize(
    ("prefix", "cache", "filled"), [(0, 0, 0), (2, 0, 0), (0, 9, 7), (2, 9, 0), (2, 9, 9)]
)
def test_a_window_counts_positions_and_leaves_the_prefix(window, prefix, cache, filled):
    seen = visible(5, prefix, cache, filled, window)
    whole = visible(5, prefix, cache, filled)
    for t in range(5):
        for s in range(prefix + cache + 5):
            slot = s - prefix
            position = slot if slot < cache else filled + slot - cache
            near = position > filled + t - window  # as transformers' sliding_window_overlay
            assert seen[t, s] == (whole[t, s] and (s < prefix or near))
    assert seen[:, :prefix].all() and (window < 100 or (seen == whole).all())


def test_kinds_share_what_is_equal_and_name_what_is_not():
    dec = decoder(kinds.THREE, tiny.PLANS["w8a16"], 8, 2, 4)
    inputs = layer_inputs(dec, filled=3)
    assert [*inputs] == [
        "rope.cos",
        "rope.sin",
        "norm.eps",
        "mask_window_6",
        "keep_window_6",
        "rope.cos_kind_1",
        "rope.sin_kind_1",
        "mask",
        "keep",
        "rope.cos_kind_2",
        "rope.sin_kind_2",
    ]
    assert inputs.keys() <= shared_names(dec).keys()
    for layer, index in enumerate(kinds.THREE.kind_of_layer):
        kind = kinds.THREE.kinds[index]
        own = select_shared(dec, dec.layer, inputs, layer)
        cos, sin = rope_tables(kinds.THREE, kind, np.arange(5, 13))
        seen = visible(8, 2, 4, 3, kind.window)
        expected = {"rope.cos": cos, "rope.sin": sin, **masks(seen, 2)}
        assert own.keys() == {*expected, "norm.eps"}
        for name, x in expected.items():
            np.testing.assert_array_equal(own[name], x, err_msg=name)
    assert select_shared(dec, dec.head, inputs) == {"norm.eps": inputs["norm.eps"]}


def test_a_model_of_one_kind_has_local_names():
    config = dataclasses.replace(kinds.THREE, kinds=(LayerKind(),), kind_of_layer=())
    dec = decoder(config, tiny.PLANS["w8a16"], 8)
    assert [*layer_inputs(dec)] == ["rope.cos", "rope.sin", "norm.eps", "mask", "keep"]


def test_kinds_of_equal_tables_share_them():
    three = (
        LayerKind(10.0),
        LayerKind(10.0, window=4),
        LayerKind(None),
        LayerKind(None, kinds.YARN),
    )
    config = dataclasses.replace(kinds.THREE, kinds=three, kind_of_layer=(3, 2, 1, 0))
    names = {*layer_inputs(decoder(config, tiny.PLANS["w8a8"], 8))}
    tables = {f"rope.{n}{kind}" for n in ("cos", "sin") for kind in ("", "_kind_2")}
    assert names == {*tables, "norm.eps", "mask", "mask_window_4"}


def test_places_of_the_prefix_without_tokens_are_hidden():
    """Prefixes of all lengths share one compiled layer (`transform.prefix`): three places of which
    one holds a token look like a prefix of one, with two keys that nobody sees."""
    dec, short = (decoder(kinds.THREE, tiny.PLANS["w8a8"], 8, n) for n in (3, 1))
    got, expected = layer_inputs(dec, held=1), layer_inputs(short)
    for name, x in expected.items():
        if name.startswith("mask"):
            assert (got[name][..., 1:3] == got[name].min()).all()
            np.testing.assert_array_equal(np.delete(got[name], [1, 2], axis=2), x)
        else:
            np.testing.assert_array_equal(got[name], x)


def test_codes_are_those_of_every_kind():
    model: IntegerModel = kinds.quantized("three", "w8a16")
    dec = model.decoder(8, 4)
    real, codes = layer_inputs(dec, 3), model.inputs(dec, 3)
    assert codes.keys() == real.keys()
    for name, x in codes.items():
        local = shared_names(dec)[name].name
        assert x.dtype == np.int16
        if local == "mask":  # its scale follows from the scores, its code does not
            np.testing.assert_array_equal(np.unique(real[name]), np.array([MASK, 0], np.float32))
            np.testing.assert_array_equal(x, np.where(real[name] == 0, 0, MASK_CODE[16]))
            continue
        fixed = dec.layer[local].fixed
        assert fixed is not None
        # Half a code.
        assert np.abs(x * fixed[0] - real[name]).max() <= 0.5001 * fixed[0]
    assert (codes["rope.cos_kind_1"] == 32767).all() and not codes["rope.sin_kind_1"].any()
