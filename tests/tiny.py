"""Tiny decoders for tests: the golden models, prepared and quantized, and text made of random
tokens."""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pairwise

from qnpu_jax import pipeline
from qnpu_jax.calibrate.ranges import calibrate_activations, weight_scales
from qnpu_jax.calibrate.statistics import collect_statistics
from qnpu_jax.config import BitPlan, LayerKind, ModelConfig
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.qparams import Scales
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES, Recipe
from qnpu_jax.transform.prefix import add_prefix

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("mha_tied", "gqa_llama3", "mqa_linear_bias")
PREFIX = (1, 7)
TOKENS = 24

MIXED = BitPlan(
    (
        ("layers.1.mlp.act", 16),
        ("layers.1.mlp.down", 16),
        ("layers.1.mlp.down.bias", 64),
        *RECIPES["w8a8"].bits.rules,
    )
)
"""One layer's wide MLP: what mixed precision does, with an accumulator of its own width."""
APART = BitPlan(
    (
        ("layers.1.*.residual", 16),
        ("layers.1.*norm.*", 16),
        ("layers.1.*.bias", 32),
        ("layers.1.*", 8),
        *RECIPES["w8a16"].bits.rules,
    )
)
"""A layer of 8 bits among others of 16: scores and rotated queries differ, and with them what
layers share."""
HEADS = BitPlan(
    (
        ("layers.0.attn.kv0.probs", 16),
        ("layers.0.attn.kv*.mixed", 16),
        ("layers.0.attn.o", 16),
        ("layers.0.attn.o.bias", 64),
        *RECIPES["w8a8"].bits.rules,
    )
)
"""Probabilities of 16 bits in the first KV head of one layer."""
WIDTHS = ("w8a8", "w8a16", "w4a8", "w4a16", "w8a8s8", "w4a8s8", "w8a8i8", "w4a8i8")
PLANS: dict[str, BitPlan] = {n: RECIPES[n].bits for n in WIDTHS}
PLANS |= {"mixed": MIXED, "apart": APART, "heads": HEADS}
OFTEN = pairwise.often([*PLANS], ("w8a8", "w4a16", "w8a8i8", "mixed"))
"""Every plan as a test's parameter; the others hold no width that these have not."""

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    kinds=(LayerKind(100000.0),),
    tie_embeddings=True,
)
"""SmolLM2-135M-Instruct; `test_parity` holds it against the file."""


def printed_graphs() -> str:
    """What tests/golden/layer_w8a8.txt holds."""
    dec = decoder(SMOLLM2, RECIPES["w8a8"].bits, tokens=128, prefix=2)
    return "\n\n".join(map(str, dec.graphs)) + "\n"


def bits_of(graph: Graph, name: str, layer: int) -> int:
    return graph[name].quant.bits[layer]


def recipe(plan: str) -> Recipe:
    return Recipe(name=plan, bits=PLANS[plan])


def random_ids(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Token ids of the golden vocabulary."""
    return np.random.default_rng(seed).integers(0, 96, shape).astype(np.int32)


@functools.cache
def prepared(name: str, plan: str = "w8a8"):
    """Config and folded, rotated parameters."""
    config, params = load_params(GOLDEN / name)
    return config, pipeline.prepare(config, params, recipe(plan))


@functools.cache
def calibrated(name: str, plan: str, prefix: tuple[int, ...] = PREFIX):
    """Decoder, float parameters with the prefix, free scales."""
    config, params = prepared(name)
    if prefix:
        params = add_prefix(config, PLANS[plan], params, prefix)
    dec = decoder(config, PLANS[plan], TOKENS, len(prefix))
    scales, _ = calibrate_activations(
        dec, collect_statistics(dec, params, random_ids((4, TOKENS))), "class", tame=bool(prefix)
    )
    free: Scales = scales | weight_scales(dec, params, "mse")
    return dec, {n: jnp.asarray(x) for n, x in params.items()}, free


@functools.cache
def quantized(name: str, plan: str, prefix: tuple[int, ...] = PREFIX) -> IntegerModel:
    """A golden model, calibrated on random tokens and frozen."""
    dec, params, free = calibrated(name, plan, prefix)
    return freeze(dec, params, free, prefix)
