"""A decoder small enough that a step of learning runs op by op in seconds: two layers of random
weights, quantized coarsely enough that there is something to learn."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from qnpu_jax.calibrate.ranges import calibrate_activations, weight_scales
from qnpu_jax.calibrate.statistics import collect_statistics
from qnpu_jax.config import ModelConfig
from qnpu_jax.fakequant.forward import Reading, head, hidden
from qnpu_jax.graph.decoder import Decoder, decoder
from qnpu_jax.graph.layered import Params
from qnpu_jax.graph.qparams import Scales
from qnpu_jax.learn import train
from qnpu_jax.learn.orthogonal import cayley
from qnpu_jax.learn.parameters import Base, Theta, initial_theta, theta_units
from qnpu_jax.models.llama import ATTENTION, MLP
from qnpu_jax.recipes import GROUPS, Effort, Stage
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.rotate import random_rotation, rotate

CONFIG = ModelConfig(
    family="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    biases=(*ATTENTION, *MLP),
)
PREFIX = (1, 7)
TOKENS = 8
EYE = np.eye(CONFIG.hidden_size, dtype=np.float32)
ALL = tuple((g, 0.01) for g in GROUPS)
ROTATED = Stage(
    learn=(("rotation", 0.01), ("rotated", 0.01), ("weights", 0.01)), quantized="rotated"
)
"""Compiles in a sixth of the time that a stage with everything quantized takes."""
EFFORT = Effort("test", steps=40, batch=2, length=TOKENS)


def random_ids(n: int, seed: int = 0) -> np.ndarray:
    """Windows of token ids."""
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (n, TOKENS)).astype(np.int32)


def checkpoint() -> dict[str, np.ndarray]:
    """Random weights, as a loader would give them."""
    rng = np.random.default_rng(0)

    def weight(*shape: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(0, gain / shape[-1] ** 0.5, shape).astype(np.float32)

    cfg, layers = CONFIG, CONFIG.num_layers
    hidden, wide, kv = cfg.hidden_size, cfg.intermediate_size, cfg.num_kv_heads * cfg.head_dim
    out = {
        "embed.weight": weight(cfg.vocab_size, hidden, gain=4),
        "head.weight": weight(cfg.vocab_size, hidden, gain=3),
        "head.norm.gamma": np.ones(hidden, np.float32),
    }
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    shapes = {f"attn.{n}": s for n, s in shapes.items()}
    shapes |= {f"mlp.{n}": (wide, hidden) for n in ("gate", "up")} | {"mlp.down": (hidden, wide)}
    for name, (rows, columns) in shapes.items():
        out[f"layers.{name}.weight"] = weight(layers, rows, columns)
        out[f"layers.{name}.bias"] = weight(layers, rows)
    for name in ("attn", "mlp"):
        gamma = rng.uniform(0.5, 2, (layers, hidden))
        out[f"layers.{name}.norm.gamma"] = gamma.astype(np.float32)
    return out


@functools.cache
def made(plan: str = "w4a8") -> tuple[Decoder, Params, Scales]:
    """Decoder, rotated parameters with a prefix, and free scales."""
    params = rotate(CONFIG, fold_norms(CONFIG, checkpoint()), random_rotation(CONFIG, 0))
    rng = np.random.default_rng(1)
    shape = (CONFIG.num_layers, CONFIG.num_kv_heads, len(PREFIX), CONFIG.head_dim)
    keys, values = (rng.normal(size=shape).astype(np.float32) for _ in "kv")
    params |= {"layers.attn.prefix_k": keys, "layers.attn.prefix_v": values.swapaxes(2, 3)}
    dec = decoder(CONFIG, tiny.PLANS[plan], TOKENS, len(PREFIX))
    on_device = {n: jnp.asarray(x) for n, x in params.items()}
    stats = collect_statistics(dec, on_device, random_ids(4))
    scales, _ = calibrate_activations(dec, stats, "mse", tame=True)
    return dec, on_device, scales | weight_scales(dec, params, "minmax")


def base_of(dec: Decoder, params: Params, free: Scales, **changes: Any) -> Base:
    """What a stage that starts from this model starts from."""
    settings: dict[str, Any] = {
        "params": dict(params),
        "free": free,
        "units": theta_units(dec, free),
        "teacher": dict(params),
        "basis": EYE,
    }
    return jax.tree.map(jnp.asarray, Base(**(settings | changes)))


def random_theta(dec: Decoder, free: Scales, groups: Any = GROUPS, seed: int = 0) -> Theta:
    """Every parameter of the groups far enough from its start to matter."""
    rng = np.random.default_rng(seed)
    theta = initial_theta(dec, free, groups)
    size = {"scale": 0.1, "weight_scale": 0.1, "zero_point": 0.05, "diagonal": 0.5, "rounding": 0.2}
    for key, x in theta.items():
        noise = rng.normal(size=x.shape).astype(np.float32)
        if key.kind == "rotation":
            theta[key] = cayley(jnp.asarray(noise - np.swapaxes(noise, -1, -2)) * jnp.float32(0.1))
        else:
            theta[key] = jnp.asarray(noise * np.float32(size.get(key.kind, 0.05)))
        if key.kind == "rounding":
            theta[key] = jnp.clip(theta[key], -0.5, 0.5)
    return theta


def logits_of(dec: Decoder, reading: Reading, ids: Any) -> np.ndarray:
    """Logits (T, V) of one sequence, op by op."""
    with jax.disable_jit():
        x = hidden(dec, reading, jnp.asarray(ids, jnp.int32)).residuals[-1]
        return np.asarray(head(dec, *reading.whole(dec.head), x))


WINDOWS, HELD_OUT = random_ids(16, seed=3), random_ids(4, seed=4)
compile_stage = functools.cache(train.compile_stage)
"""One compilation for all runs of a stage: a new one would give the same program."""
