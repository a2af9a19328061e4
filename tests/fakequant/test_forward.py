"""The scan over layers: what it slices, and that packing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import GOLDEN

from qnpu_jax.calibrate import calibrate_activations, collect_statistics, weight_scales
from qnpu_jax.fakequant.forward import Reading, hidden, pack_scalars
from qnpu_jax.graph import decoder, resolve
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES
from qnpu_jax.transform.fold import fold_norms

TOKENS = 8


@pytest.fixture(scope="module")
def quantized():
    """A decoder, and a reading of it with every tensor fake-quantized."""
    config, params = load_params(GOLDEN / "mha_tied")
    params = {name: jnp.asarray(x) for name, x in fold_norms(config, params).items()}
    dec = decoder(config, RECIPES["w8a8"].bits, TOKENS)
    stats = collect_statistics(dec, params, np.arange(2 * TOKENS).reshape(2, TOKENS))
    free = calibrate_activations(dec, stats, "minmax", False)[0]
    scales = resolve(dec, free | weight_scales(dec, params, "minmax"))
    return dec, Reading(params, jax.tree.map(jnp.asarray, scales))


def test_the_scan_slices_no_scalars(quantized):
    """On a GPU each is a copy of its own in every layer: a sixth of a step's time."""
    dec, reading = quantized
    jaxpr = jax.make_jaxpr(lambda ids: hidden(dec, reading, ids).last)(jnp.arange(TOKENS))
    scan = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    sliced = scan.invars[scan.params["num_consts"] + scan.params["num_carry"] :]
    assert len(sliced) > 10
    assert not [x.aval for x in sliced if x.aval.ndim == 1 and x.aval.dtype == jnp.float32]


def at(layers, i: int):
    return jax.tree.map(lambda x: x[i], layers)


def test_packing_gives_back_every_slice():
    rng = np.random.default_rng(0)
    layers = {
        "scalar": jnp.asarray(rng.normal(size=3), jnp.float32),
        "kinds": jnp.arange(3),  # integers stay by themselves
        "channels": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
        "nothing": None,
        "last": (jnp.ones(3, jnp.float32),),
    }
    packed, unpack = pack_scalars(layers)
    for i in range(3):
        found, wanted = unpack(at(packed, i)), at(layers, i)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_packing_without_scalars():
    packed, unpack = pack_scalars([jnp.ones((3, 2))])
    assert packed[0] is None
    np.testing.assert_array_equal(unpack(at(packed, 0))[0], np.ones(2))
