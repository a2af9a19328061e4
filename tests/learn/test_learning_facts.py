"""Learning where norms follow blocks, or stand over queries and keys: R2 alone, gammas stay."""

from dataclasses import replace

import facts
import jax.numpy as jnp
import learnable
import numpy as np
import pytest
import tiny

from qnpu_jax.calibrate.ranges import calibrate_activations, weight_scales
from qnpu_jax.calibrate.statistics import collect_statistics
from qnpu_jax.fakequant.forward import Reading, forward
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.learn.parameters import R1, R2, initial_theta, merge_theta, student_reading
from qnpu_jax.recipes import GROUPS, RECIPES, Stage
from qnpu_jax.transform.fold import fold_norms

MODELS = ["both, qk head, gelu", "after, qk all", "qk head"]


def made(fact: str):
    config = facts.FACTS[fact]
    dec = decoder(config, RECIPES["w8a8"].bits, tiny.TOKENS)
    params = {n: jnp.asarray(x) for n, x in fold_norms(config, facts.checkpoint(config)).items()}
    stats = collect_statistics(dec, params, facts.TEXT)
    scales, _ = calibrate_activations(dec, stats, "minmax", tame=False)
    return dec, params, scales | weight_scales(dec, params, "mse")


@pytest.mark.slow
@pytest.mark.parametrize("fact", MODELS)
def test_what_rotations_and_diagonals_learn_keeps_the_function(fact):
    """The student in float, and the merged model: products of float32 matrices, 2^-24 each."""
    dec, params, free = made(fact)
    theta = learnable.random_theta(dec, free, ("rotation", "diagonal"))
    assert (R1 in theta) == dec.config.merges_r1
    assert R2 in theta
    basis = np.eye(dec.config.hidden_size, dtype=np.float32)
    base = learnable.base_of(dec, params, free, basis=basis)
    expected = learnable.logits_of(dec, Reading(params, {}), facts.TEXT[0])
    student = replace(student_reading(dec, Stage(), base, theta), scales={})
    merged, _ = merge_theta(dec, Stage(), params, free, theta)
    for name in ("layers.attn.v.weight", "layers.mlp.up.weight"):
        assert np.abs(merged[name] - np.asarray(params[name])).max() > 0.05, "nothing was learned"
    got = [
        learnable.logits_of(dec, student, facts.TEXT[0]),
        np.asarray(
            forward(dec, {n: jnp.asarray(x) for n, x in merged.items()}, jnp.asarray(facts.TEXT[0]))
        ),
    ]
    for logits in got:
        assert np.abs(logits - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("fact", MODELS)
def test_gammas_learn_nothing(fact):
    dec, _, free = made(fact)
    theta = initial_theta(dec, free, GROUPS)
    assert any(name.endswith(".gamma") for name in free)
    assert not [key for key in theta if key.tensor.endswith(".gamma")]
