"""The float graph is the reference model (P1), and what acts on its parameters leaves its logits
alone (P2)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax.config import LayerKind, RopeScaling
from qnpu_jax.fakequant.evaluate import evaluate
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import MASK, decoder
from qnpu_jax.graph.layered import local
from qnpu_jax.graph.ops import Rsqrt, Sqrt, eval_op
from qnpu_jax.graph.shared_inputs import layer_inputs, masks, rope_frequencies, rope_tables, visible
from qnpu_jax.measure.perplexity import float_logits
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.hadamard import has_hadamard, random_hadamard, random_orthogonal
from qnpu_jax.transform.prefix import add_prefix
from qnpu_jax.transform.rotate import Rotation, rotate

PLAN = RECIPES["w8a8"].bits
names = pytest.mark.parametrize("name", tiny.NAMES)
often = pytest.mark.parametrize("name", pairwise.often(tiny.NAMES, ["gqa_llama3"]))


@functools.cache
def folded(name: str):
    config, params = load_params(tiny.GOLDEN / name)
    return config, fold_norms(config, params)


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    stored = np.load(tiny.GOLDEN / f"{name}.npz")
    return stored["tokens"], stored["logits"]


def logits_of(config, params, ids) -> np.ndarray:
    params = {n: jnp.asarray(x) for n, x in params.items()}
    return np.asarray(float_logits(config, PLAN, params)(ids))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.ptp(expected))


@pytest.mark.slow
@names
def test_float_graph_equals_the_reference_implementation(name):
    config, params = folded(name)
    ids, expected = golden(name)
    # Two float32 implementations; each sum of about 100 terms rounds at 2^-24, through 2 or 3
    # layers. A wrong eps, scale, head order or frequency changes logits by more than 1%.
    assert relative_error(logits_of(config, params, ids), expected) <= 1e-4


@pytest.mark.slow
@often
def test_a_batch_equals_its_sequences(name):
    config, params = folded(name)
    ids = tiny.random_ids((3, 11))
    batch = logits_of(config, params, ids)
    for row, one in zip(batch, ids, strict=True):
        # XLA may sum a batch in another order.
        assert relative_error(row, logits_of(config, params, one)) <= 1e-5


def rotation_of(config, make) -> Rotation:
    r2 = [make(config.head_dim, (5, i)) for i in range(config.num_layers)]
    return Rotation(r1=make(config.hidden_size, 3), r2=np.stack(r2))


@names
@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
def test_rotations_leave_the_logits_alone(name, make):
    config, params = folded(name)
    assert has_hadamard(config.hidden_size) and has_hadamard(config.head_dim)
    rotated = rotate(config, params, rotation_of(config, make))
    change = np.abs(rotated["layers.mlp.up.weight"] - params["layers.mlp.up.weight"]).max()
    assert change > 0.1, "the rotation did nothing"
    ids, _ = golden(name)
    # Rotated weights are rounded to float32 once: as many terms at 2^-24 as above.
    error = relative_error(logits_of(config, rotated, ids), logits_of(config, params, ids))
    assert error <= 1e-4


@pytest.mark.slow
@often
def test_last_logits_are_the_last_row(name):
    config, params = folded(name)
    params = {n: jnp.asarray(x) for n, x in params.items()}
    ids = jnp.asarray(tiny.random_ids((9,)))
    every, last = (
        np.asarray(forward(decoder(config, PLAN, 9, logits=which), params, ids))
        for which in ("all", "last")
    )
    assert every.shape == (9, 96) and last.shape == (1, 96)
    assert relative_error(last[0], every[-1]) <= 1e-5  # a product of one row may sum otherwise


@pytest.mark.slow
@often
def test_logits_after_a_prefix_are_those_of_the_whole_sequence(name):
    config, params = folded(name)
    prefix = (1, 7, 3)
    ids = tiny.random_ids((10,))
    got = logits_of(config, add_prefix(config, PLAN, params, prefix), ids)
    whole = logits_of(config, params, np.concatenate([np.asarray(prefix, np.int32), ids]))
    # The same float32 sums, over keys in two arrays instead of one.
    assert relative_error(got, whole[len(prefix) :]) <= 1e-5
    assert relative_error(got, logits_of(config, params, ids)) > 1e-2, "the prefix had no effect"


def test_a_new_prefix_replaces_the_old_one():
    config, params = folded("gqa_llama3")
    twice = add_prefix(config, PLAN, add_prefix(config, PLAN, params, (5, 6)), (1,))
    once = add_prefix(config, PLAN, params, (1,))
    assert twice.keys() == once.keys()
    np.testing.assert_array_equal(twice["layers.attn.prefix_k"], once["layers.attn.prefix_k"])


@pytest.mark.slow
@pytest.mark.parametrize("name", pairwise.often(["gqa_llama3", "mqa_linear_bias"], ["gqa_llama3"]))
def test_decode_with_a_cache_equals_prefill(name):
    """Prefill 6 tokens, then 2 steps of one token whose cache of 9 slots is filled so far."""
    config, params = folded(name)
    ids = tiny.random_ids((8,))
    prefix, slots = (1, 7), 9
    params = {n: jnp.asarray(x) for n, x in add_prefix(config, PLAN, params, prefix).items()}
    expected = np.asarray(forward(decoder(config, PLAN, 8, 2), params, jnp.asarray(ids)))
    tensors = jax.jit(lambda graph, values: evaluate(graph, values), static_argnums=0)

    def run(dec, ids, caches, filled):
        """Logits and, per layer, the new rows of K and V."""
        tables = {n: jnp.asarray(x) for n, x in layer_inputs(dec, filled).items()}
        embed = tensors(dec.embed, {"ids": jnp.asarray(ids), **local(params, "embed.")})
        x, rows = embed["residual"], []
        for i in range(config.num_layers):
            own = {n: p[i] for n, p in local(params, "layers.").items()}
            past = {f"attn.cache_{k}": jnp.asarray(c) for k, c in caches[i].items()}
            env = tensors(dec.layer, {"input.residual": x, **tables, **own, **past})
            x = env["mlp.residual"]
            rows.append({k: np.asarray(env[f"attn.{k}_rows"]) for k in "kv"})
        head = {"input.residual": x, "norm.eps": tables["norm.eps"], **local(params, "head.")}
        return np.asarray(tensors(dec.head, head)["logits"]), rows

    first, rows = run(decoder(config, PLAN, 6, 2), ids[:6], [{}] * config.num_layers, 0)
    n, width = config.num_kv_heads, config.head_dim
    shapes = {"k": (n, slots, width), "v": (n, width, slots)}
    # What is in the slots that are not filled must not matter.
    caches = [{k: np.full(s, 7.0, np.float32) for k, s in shapes.items()} for _ in rows]
    assert relative_error(first, expected[:6]) <= 1e-5  # other lengths, other order of sums
    filled = 0
    for token in (6, 7):
        for cache, new in zip(caches, rows, strict=True):
            cache["k"][:, filled:token] = new["k"]
            cache["v"][..., filled:token] = new["v"]
        filled = token
        step = decoder(config, PLAN, 1, 2, slots)
        logits, rows = run(step, ids[token : token + 1], caches, filled)
        assert relative_error(logits[0], expected[token]) <= 1e-5  # as above


# Inputs that all layers share.


def direct_frequency(i: int, config) -> float:
    """Of pair i of a head, by scalar arithmetic from the definition."""
    frequency = config.kinds[0].rope_theta ** (-2 * i / config.head_dim)
    s = config.kinds[0].rope_scaling
    if s is None:
        return frequency
    if s.kind == "linear":
        return frequency / s.factor
    wavelength = 2 * np.pi / frequency
    if wavelength < s.original_max_positions / s.high_freq_factor:
        return frequency
    if wavelength > s.original_max_positions / s.low_freq_factor:
        return frequency / s.factor
    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    return (1 - smooth) * frequency / s.factor + smooth * frequency


SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    RopeScaling("llama3", 32.0, 1.0, 4.0, 32),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_rope_tables_follow_the_definition(scaling):
    config = dataclasses.replace(tiny.SMOLLM2, kinds=(LayerKind(500000.0, scaling),))
    expected = [direct_frequency(i, config) for i in range(32)]
    np.testing.assert_allclose(
        rope_frequencies(config, config.kinds[0]), expected, rtol=1e-12
    )  # float64 rounding
    positions = np.asarray([0, 1, 2, 77, 8191])
    cos, sin = rope_tables(config, config.kinds[0], positions)
    assert cos.shape == sin.shape == (5, 1, 64) and cos.dtype == sin.dtype == np.float32
    for t, position in enumerate(positions):
        for j in range(64):
            angle = position * expected[j % 32]
            sign = -1 if j < 32 else 1
            # float32 rounds at 2^-25; an angle of 8191 carries 8191 * 2^-53.
            assert abs(cos[t, 0, j] - np.cos(angle)) <= 2**-24
            assert abs(sin[t, 0, j] - sign * np.sin(angle)) <= 2**-24


def test_llama3_scaling_has_all_three_bands():
    config = dataclasses.replace(tiny.SMOLLM2, kinds=(LayerKind(500000.0, SCALINGS[2]),))
    plain = rope_frequencies(config, LayerKind(500000.0))
    ratio = rope_frequencies(config, config.kinds[0]) / plain
    np.testing.assert_array_equal(ratio[:4], 1)
    np.testing.assert_allclose(ratio[-4:], 1 / 8, rtol=1e-15)
    assert np.any((ratio > 0.13) & (ratio < 0.99))


@pytest.mark.parametrize(
    ("prefix", "cache", "filled"), [(0, 0, 0), (2, 0, 0), (0, 5, 3), (2, 5, 0), (2, 5, 5)]
)
def test_a_token_sees_prefix_filled_slots_and_itself_and_what_came_before(prefix, cache, filled):
    seen = visible(4, prefix, cache, filled)
    assert seen.shape == (4, prefix + cache + 4)
    for t in range(4):
        for s in range(seen.shape[1]):
            if s < prefix:
                expected = True
            elif s < prefix + cache:
                expected = s - prefix < filled
            else:
                expected = s - prefix - cache <= t
            assert seen[t, s] == expected


def test_masks_have_a_row_for_every_query_head_of_a_token():
    seen = visible(2, 1)
    made = masks(seen, groups=3)
    assert all(x.shape == (1, 6, 3) and x.dtype == np.float32 for x in made.values())
    for row in range(6):
        for s in range(3):
            expected = (0.0, 1.0) if seen[row // 3, s] else (MASK, 0.0)
            assert (made["mask"][0, row, s], made["keep"][0, row, s]) == expected


def test_only_16_bit_probabilities_are_kept_apart():
    config, _ = folded("gqa_llama3")
    for plan in ("w8a8", "w8a8s8", "w8a16"):
        dec = decoder(config, tiny.PLANS[plan], 4)
        assert ("keep" in layer_inputs(dec)) == (plan == "w8a16")


def test_positions_go_on_after_prefix_and_filled_slots():
    config, _ = folded("gqa_llama3")
    dec = decoder(config, PLAN, 4, 2, 5)
    inputs = layer_inputs(dec, filled=3)
    cos, sin = rope_tables(config, config.kinds[0], np.arange(5, 9))
    np.testing.assert_array_equal(inputs["rope.cos"], cos)
    np.testing.assert_array_equal(inputs["rope.sin"], sin)
    np.testing.assert_array_equal(inputs["mask"], masks(visible(4, 2, 5, 3), 2)["mask"])
    assert inputs["norm.eps"].item() == np.float32(config.hidden_size * config.rms_norm_eps)


def test_a_sum_of_squares_that_rounds_to_zero_does_not_spoil_gradients():
    # sqrt and rsqrt have no finite derivative at 0, where a small token's sum is rounded when the
    # range must hold a sink's.
    def inverse(x):
        return jnp.clip(eval_op(Rsqrt(), eval_op(Sqrt(), x)), -4, 4)

    x = jnp.asarray([0.0, 1e-4, 4.0], jnp.float32)
    np.testing.assert_array_equal(eval_op(Sqrt(), x), np.sqrt(x))
    np.testing.assert_array_equal(eval_op(Rsqrt(), x)[:1], [np.inf])
    gradient = jax.grad(lambda x: jnp.sum(inverse(x)))(x)
    np.testing.assert_allclose(gradient, [0, 0, -0.25 * 4.0**-1.25], rtol=1e-6)  # float32
