"""Wide linears block by block give the bits of the whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest

from qnpu_sim import channel_blocks, kernels, op_constants
from qnpu_sim.channel_blocks import by_channels
from qnpu_sim.op_constants import QuantizedType, Weights
from qnpu_sim.rounding import PROFILES

T, K = 3, 16


def few(sizes, profiles, types) -> list[pairwise.Row]:
    """Sizes without and with a rest, every profile, every pair of types."""
    return [*zip(sizes[1:3], profiles, types, strict=True)]


@pytest.mark.slow
@pairwise.parametrize(
    ("size", "profile", "types"),
    (31, 32, 35, 64),
    ("litert_ref", "npu"),
    (("int8", "int32"), ("int16", "int64")),
    choose=few,
)
def test_blocks_give_the_bits_of_the_whole(monkeypatch, size, profile, types):
    """Sizes below, at and above the limit, with and without a rest; alone and in a batch."""
    monkeypatch.setattr(channel_blocks, "BLOCK", 8)
    monkeypatch.setattr(channel_blocks, "WIDE", 32)
    (dtype, bias), rng = types, np.random.default_rng(size)
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, (2, T, K), dtype, endpoint=True)
    w = rng.integers(-128, 127, (size, K), np.int8, endpoint=True)
    bits, zero_points = (8, (-3, 5)) if dtype == "int8" else (16, (0, 0))
    weights = Weights(
        w,
        rng.integers(-999, 999, size, bias),
        rng.uniform(0.1, 0.2, size).astype(np.float32),
    )
    of_x, of_y = (
        QuantizedType(np.float32(scale), zero_point, bits)
        for scale, zero_point in zip((0.1, 30), zero_points, strict=True)
    )
    c = op_constants.prepare_fully_connected(of_x, weights, of_y, PROFILES[profile])
    with jax.enable_x64():
        args = (jnp.asarray(w), jax.tree.map(jnp.asarray, c))
        own = jax.jit(partial(by_channels, kernels.fully_connected))
        for codes in jnp.asarray(x):
            expected = kernels.fully_connected(codes, *args)
            assert expected.std() > 0
            assert (own(codes, *args) == expected).all()
        batch = jax.vmap(lambda codes: own(codes, *args))(jnp.asarray(x))
        assert (batch == jax.vmap(lambda codes: kernels.fully_connected(codes, *args))(x)).all()
