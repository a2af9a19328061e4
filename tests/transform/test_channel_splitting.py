"""Channels in copies: the same function, the furthest reaching one as near as can be."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from qnpu_jax import pipeline
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.progress import Observer
from qnpu_jax.text import Windows
from qnpu_jax.text.starts import Starts
from qnpu_jax.transform import channel_copies, channel_peaks, split_channels

PLAN = tiny.PLANS["w4a8"]
EXTRA = 5


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.integers(0, 6))
def test_no_other_copies_bring_the_furthest_nearer(peaks, extra):
    """Against every limit that some choice of copies can reach."""
    of = np.asarray([peaks], np.float64)
    copies = channel_copies(of, extra)
    assert copies.min() >= 1 and copies.sum() == len(peaks) + extra
    found = (of / copies).max()
    for limit in {peak / k for peak in peaks for k in range(1, extra + 2)}:
        if 0 < limit < found:
            needed = np.ceil(of / limit * (1 - 1e-12)).clip(1).sum()
            assert needed > len(peaks) + extra, f"{limit} would do"


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("prefix", [(), tiny.PREFIX])
def test_the_function_stays_and_the_peaks_fall(name, prefix):
    config, params = tiny.prepared(name)
    rng = np.random.default_rng(0)
    params = {
        n: x + 0.1 * rng.normal(size=x.shape) if "bias" in n else x for n, x in params.items()
    }
    params = {n: np.array(x, np.float32) for n, x in params.items()}
    params["layers.mlp.up.weight"][:, 3] *= 40  # as no other channel
    if prefix:
        params = dict(pipeline.add_prefix(config, PLAN, params, prefix))
    params = {n: jnp.asarray(x) for n, x in params.items()}
    dec = decoder(config, PLAN, tiny.TOKENS, len(prefix))
    ids = tiny.random_ids((2, tiny.TOKENS))
    peaks = channel_peaks(dec, params, ids).act
    copies = channel_copies(peaks, EXTRA)
    wider, split = split_channels(config, params, copies)
    assert wider == dataclasses.replace(config, intermediate_size=config.intermediate_size + EXTRA)
    assert (copies[:, 3] > 1).all()
    now = decoder(wider, PLAN, tiny.TOKENS, len(prefix))
    np.testing.assert_allclose(
        channel_peaks(now, split, ids).act.max(axis=1), (peaks / copies).max(axis=1), rtol=1e-5
    )
    before, after = (
        np.asarray(forward(d, p, jnp.asarray(ids[0]))) for d, p in ((dec, params), (now, split))
    )
    # Sums of a layer are taken in another order: some float32 roundings of the largest logit.
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_a_pipeline_splits_teacher_and_student_alike():
    """Both are the float model still; what they have in common they share."""
    config, params = tiny.prepared("gqa_llama3")
    recipe = dataclasses.replace(tiny.recipe("w4a8"), prefix="none", split_channels=EXTRA)
    text, starts = Windows.of(tiny.random_ids((3, tiny.TOKENS))), Starts((1,), ())
    made = pipeline.with_prefix(config, params, recipe, text, starts, Observer())
    assert made.config.intermediate_size == config.intermediate_size + EXTRA
    for name in ("gate.weight", "up.bias", "down.weight"):
        assert made.original[f"layers.mlp.{name}"] is made.params[f"layers.mlp.{name}"]
    plain = dataclasses.replace(recipe, split_channels=0)
    without = pipeline.with_prefix(config, params, plain, text, starts, Observer())
    ids = jnp.asarray(tiny.random_ids((tiny.TOKENS,), seed=2))
    now, then = (
        forward(decoder(x.config, PLAN, tiny.TOKENS, 1), x.original, ids) for x in (made, without)
    )
    np.testing.assert_allclose(now, then, atol=1e-5 * np.abs(then).max())  # as above
    quantized = pipeline.quantize(config, params, recipe, text, starts)
    assert quantized.model.config == made.config
