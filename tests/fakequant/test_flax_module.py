"""The Flax module is the same function as `forward.forward`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax import pipeline
from qnpu_jax.config import bit_plan
from qnpu_jax.fakequant.flax_module import QuantDecoder, parameter_shapes, variables
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.integer.model import activation_scales
from qnpu_jax.models import checkpoint
from qnpu_jax.recipes import Recipe
from qnpu_jax.text.windows import Windows

GOLDEN = Path(__file__).parents[1] / "golden" / "gqa_llama3"
RECIPE = Recipe(name="test", bits=bit_plan(8, 8), prefix="none")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 96, 12), jnp.int32)


def test_float_and_fake_quantized_logits_equal_forward():
    config, raw = checkpoint.load_params(GOLDEN)
    params = pipeline.prepare(config, raw, RECIPE)
    windows = np.random.default_rng(1).integers(0, 96, (4, 12)).astype(np.int32)
    model = pipeline.quantize(config, params, RECIPE, Windows.of(windows), None).model
    scales = jax.tree.map(jnp.asarray, activation_scales(model))
    dec = decoder(config, RECIPE.bits, 12)
    module = QuantDecoder(config, RECIPE.bits)

    def apply(s) -> np.ndarray:
        return np.asarray(module.apply(variables(params, s), IDS))

    for s in (None, scales):
        assert np.array_equal(apply(s), forward(dec, params, IDS, s))
    assert not np.array_equal(apply(None), apply(scales))


def test_init_makes_the_graphs_parameters():
    config, _ = checkpoint.load_params(GOLDEN)
    made = QuantDecoder(config, RECIPE.bits, prefix=3).init(jax.random.key(0), IDS)["params"]
    expected = parameter_shapes(decoder(config, RECIPE.bits, 12, 3))
    assert {n: jnp.asarray(x).shape for n, x in dict(made).items()} == expected
    assert expected["layers.attn.prefix_k"] == (2, 2, 3, 24)
