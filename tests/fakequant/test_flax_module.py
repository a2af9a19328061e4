"""The Flax module is the same function as `forward.forward`, and Flax's transformations see it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qnpu_jax import pipeline
from qnpu_jax.calibrate import calibrate_activations, collect_statistics, weight_scales
from qnpu_jax.config import bit_plan
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.flax_module import QuantDecoder, Scale, parameter_shapes
from qnpu_jax.fakequant.forward import forward, token_nll
from qnpu_jax.graph import decoder, resolve
from qnpu_jax.models import checkpoint
from qnpu_jax.recipes import Recipe
from qnpu_jax.transform import add_prefix

GOLDEN = Path(__file__).parents[1] / "golden" / "gqa_llama3"
RECIPE = Recipe(name="test", bits=bit_plan(8, 8), prefix="none")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 96, 12), jnp.int32)
CONFIG, RAW = checkpoint.load_params(GOLDEN)
DECODER = decoder(CONFIG, RECIPE.bits, 12)


@pytest.fixture(scope="module")
def prepared():
    """Parameters of the golden model, and scales for all its tensors."""
    params = pipeline.prepare(CONFIG, RAW, RECIPE)
    windows = np.random.default_rng(1).integers(0, 96, (2, 12)).astype(np.int32)
    stats = collect_statistics(DECODER, params, windows)
    activations, _ = calibrate_activations(DECODER, stats, "minmax", False)
    free = activations | weight_scales(DECODER, params, "minmax")
    return params, jax.tree.map(jnp.asarray, resolve(DECODER, free))


def module_of(params, scales=None) -> QuantDecoder:
    return QuantDecoder(CONFIG, RECIPE.bits, params, scales)


logits = nnx.jit(lambda module: module(IDS))


def logits_of_forward(dec, params, scales=None) -> jax.Array:
    return jax.jit(lambda p, s: forward(dec, p, IDS, s))(params, scales)


def equal(a, b) -> bool:
    """Two trees of arrays, bit for bit."""
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


@pytest.mark.slow
def test_float_and_fake_quantized_logits_equal_forward(prepared):
    params, scales = prepared
    found = [np.asarray(logits(module_of(params, s))) for s in (None, scales)]
    for got, s in zip(found, (None, scales), strict=True):
        assert np.array_equal(got, logits_of_forward(DECODER, params, s))
    assert not np.array_equal(found[0], found[1])


def loss(x: jax.Array) -> jax.Array:
    return jnp.mean(token_nll(x, IDS))


@pytest.mark.slow
@pytest.mark.nightly
def test_gradients_equal_those_of_forward(prepared):
    params, scales = prepared
    scales = {name: q for name, q in scales.items() if name.startswith("layers.mlp.")}
    both = nnx.DiffState(0, nnx.Any(nnx.Param, Scale))
    module = module_of(params, scales)
    gradients = nnx.jit(nnx.grad(lambda m: loss(m(IDS)), argnums=both))(module)
    plain = jax.jit(jax.grad(lambda p, s: loss(forward(DECODER, p, IDS, s)), argnums=(0, 1)))
    of_params, of_scales = plain(params, scales)
    assert equal(nnx.to_pure_dict(gradients), {"params": of_params, "scales": of_scales})
    for gradient in (of_params, of_scales):
        assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_the_example_moves_scales_alone(prepared):
    params, scales = prepared
    module = module_of(params, scales)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(module, Scale))
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g, nnx.state(module, Scale), gradients)
    nnx.update(module, moved)
    found = nnx.to_pure_dict(nnx.state(module))
    expected = jax.tree.map(lambda x: x - jnp.float32(1e-3), scales)
    assert equal(found, {"params": params, "scales": expected})


def test_state_to_and_from_plain_dicts(prepared):
    params, scales = prepared
    module = module_of(params, scales)
    plain = nnx.to_pure_dict(nnx.state(module))
    assert equal(plain, {"params": params, "scales": scales})
    other = module_of(jax.tree.map(jnp.zeros_like, params), scales)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, plain)
    nnx.update(other, state)
    assert np.array_equal(logits(other), logits(module))


@pytest.mark.slow
def test_a_prefix_is_among_the_parameters(prepared):
    params = add_prefix(CONFIG, RECIPE.bits, prepared[0], (1, 5, 7))
    dec = decoder(CONFIG, RECIPE.bits, 12, prefix=3)
    shapes = parameter_shapes(dec)
    assert {name: x.shape for name, x in params.items()} == shapes
    assert shapes["layers.attn.prefix_k"] == (2, 2, 3, 24)
    assert np.array_equal(logits(module_of(params)), logits_of_forward(dec, params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": jnp.zeros((96, 5))}, r"head\.weight: expected shape \[96, \d+\], got sha"),
        (
            {"head.weigth": jnp.zeros(1)},
            r"head\.weigth: expected no such parameter, got shape \[1\]",
        ),
        ({"embed.weight": None}, r"embed\.weight: expected shape .*, got no such parameter; give"),
    ],
)
def test_other_parameters_are_refused(prepared, change, message):
    changed = prepared[0] | change
    with pytest.raises(UserError, match=message):
        module_of({name: x for name, x in changed.items() if x is not None})
