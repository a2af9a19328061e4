"""Models whose layers are of several kinds: the float graph is their definition, over a scan, layer
by layer, and with a cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import tiny

from qnpu_jax.config import LayerKind, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.evaluate import evaluate
from qnpu_jax.fakequant.forward import forward, shared_inputs
from qnpu_jax.fakequant.passes import passes
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.graph.layered import local
from qnpu_jax.graph.shared_names import select_shared
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.heads import rotary_order, score_scale
from qnpu_jax.transform.prefix import add_prefix

PLAN = tiny.PLANS["w8a8"]
LENGTH = 20
models = pytest.mark.parametrize("name", list(kinds.CONFIGS))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


def folded(config) -> dict[str, jax.Array]:
    params = fold_norms(config, kinds.checkpoint(config))
    return {n: jnp.asarray(x) for n, x in params.items()}


@models
def test_the_float_graph_is_the_definition(name):
    config, ids = kinds.CONFIGS[name], tiny.random_ids((LENGTH,))
    expected = kinds.logits(config, kinds.checkpoint(config), ids)
    got = forward(decoder(config, PLAN, LENGTH), folded(config), jnp.asarray(ids))
    # float32 against float64: sums of about 100 terms round at 2^-24, through 3 or 4 layers.
    assert relative_error(np.asarray(got), expected) <= 1e-4


CHANGES = {
    "window": {"window": kinds.WINDOW + 1},
    "no window": {"window": None},
    "theta": {"rope_theta": 20.0},
    "no positions": {"rope_theta": None, "rope_scaling": None},
    "attention factor": {"rope_scaling": RopeScaling("linear", 1.0, attention_factor=1.1)},
}


@models
@pytest.mark.parametrize("change", list(CHANGES))
def test_every_fact_of_a_kind_moves_the_logits(name, change):
    """So the comparison above sees each of them."""
    config, ids = kinds.CONFIGS[name], jnp.asarray(tiny.random_ids((LENGTH,)))
    first = config.layer_kinds[0]
    other = list(config.kinds)
    other[first] = dataclasses.replace(other[first], **CHANGES[change])
    changed = dataclasses.replace(config, kinds=tuple(other))
    got, before = (
        np.asarray(forward(decoder(c, PLAN, LENGTH), folded(c), ids)) for c in (changed, config)
    )
    assert relative_error(got, before) > 1e-3  # ten times what the comparison lets pass


@models
def test_prefix_keys_stay_in_every_window(name):
    config, prefix = kinds.CONFIGS[name], (1, 7)
    ids = tiny.random_ids((LENGTH,), 1)
    params = {
        n: jnp.asarray(x) for n, x in add_prefix(config, PLAN, folded(config), prefix).items()
    }
    got = forward(decoder(config, PLAN, LENGTH, 2), params, jnp.asarray(ids))
    whole = np.concatenate([np.asarray(prefix, np.int32), ids])
    checkpoint = kinds.checkpoint(config)
    expected = kinds.logits(config, checkpoint, whole, prefix=2)[2:]
    assert relative_error(np.asarray(got), expected) <= 1e-4  # as above
    dropped = kinds.logits(config, checkpoint, whole)[2:]
    assert relative_error(dropped, expected) > 1e-3, "no window moves past the prefix"


@models
def test_layer_by_layer_is_the_scan(name):
    config, ids = kinds.CONFIGS[name], jnp.asarray(tiny.random_ids((2, LENGTH)))
    dec, params = decoder(config, PLAN, LENGTH), folded(config)
    *_, (_, _, env) = passes(dec, params, ids, lambda g: g.outputs[:1])
    for row, one in zip(np.asarray(env["logits"]), ids, strict=True):
        # XLA may sum a batch in another order.
        assert relative_error(row, np.asarray(forward(dec, params, one))) <= 1e-5


@models
def test_decoding_with_a_cache_equals_prefill(name):
    """Token by token, with 3 empty slots at the end; windows move over slots and new key."""
    config, ids, prefix = kinds.CONFIGS[name], tiny.random_ids((12,), 2), (1, 7)
    params = {
        n: jnp.asarray(x) for n, x in add_prefix(config, PLAN, folded(config), prefix).items()
    }
    expected = np.asarray(forward(decoder(config, PLAN, 12, 2), params, jnp.asarray(ids)))
    step, slots = decoder(config, PLAN, 1, 2, 15), 15
    run = jax.jit(evaluate, static_argnums=0)
    heads, width = config.num_kv_heads, config.head_dim
    k = jnp.zeros((config.num_layers, heads, slots, width))
    v = jnp.zeros((config.num_layers, heads, width, slots))
    for filled, token in enumerate(ids):
        tables = shared_inputs(step, filled)
        embed = {"ids": jnp.asarray([token]), **local(params, "embed.")}
        x = run(step.embed, embed)["residual"]
        for i in range(config.num_layers):
            own = {n: p[i] for n, p in local(params, "layers.").items()}
            own |= select_shared(step, step.layer, tables, i)
            own |= {"attn.cache_k": k[i], "attn.cache_v": v[i], "input.residual": x}
            env = run(step.layer, own)
            x = env["mlp.residual"]
            k = k.at[i, :, filled].set(env["attn.k_rows"][:, 0])
            v = v.at[i, :, :, filled].set(env["attn.v_rows"][..., 0])
        head = {"input.residual": x, "norm.eps": tables["norm.eps"], **local(params, "head.")}
        # The same float32 sums over keys, in arrays of other lengths.
        assert relative_error(run(step.head, head)["logits"][0], expected[filled]) <= 1e-5


def test_scores_are_scaled_by_kind_and_channel():
    yarn = [score_scale(kinds.THREE, i) for i in range(4)]
    np.testing.assert_allclose(yarn[2], 8**-0.5 * 1.2**2, rtol=1e-15)
    np.testing.assert_allclose(np.stack(yarn)[[0, 1, 3]], 8**-0.5, rtol=1e-15)
    partial = score_scale(kinds.PARTIAL, 1)
    np.testing.assert_allclose(partial * 8**0.5, [1.3**2] * 4 + [1] * 4, rtol=1e-15)
    given = dataclasses.replace(kinds.PARTIAL, query_scale=0.25)
    np.testing.assert_allclose(score_scale(given, 0), 0.25)


def test_pairs_of_channels_lie_half_a_head_apart():
    config = dataclasses.replace(kinds.PARTIAL, head_dim=12, rotary_dim=4)
    assert rotary_order(config).tolist() == [0, 1, 4, 5, 6, 7, 2, 3, 8, 9, 10, 11]
    whole = dataclasses.replace(config, rotary_dim=None)
    assert rotary_order(whole).tolist() == [*range(12)]
    with pytest.raises(UserError, match="rotary_dim: 3 of 12 channels; expected even numbers"):
        rotary_order(dataclasses.replace(config, rotary_dim=3))


def test_kinds_are_read_back_from_json():
    for config in kinds.CONFIGS.values():
        assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
    assert LayerKind.from_json({"window": 4}) == LayerKind(window=4)
