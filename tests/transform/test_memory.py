"""Folding and rotating hold the parameters once, and one tensor of them a second time."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax import pipeline
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES

SCRIPT = """
import dataclasses
import jax
import numpy as np
from qnpu_jax import pipeline
from qnpu_jax.config import ModelConfig
from qnpu_jax.recipes import RECIPES

config = ModelConfig(
    family="random", vocab_size=2048, hidden_size=512, intermediate_size=1536, num_layers={layers},
    num_heads=8, num_kv_heads=4, head_dim=64, max_positions=64,
)
d, f, v, layers = 512, 1536, 2048, {layers}
shapes = {{"attn.q": (d, d), "attn.k": (256, d), "attn.v": (256, d), "attn.o": (d, d)}}
shapes |= {{"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}}
rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal(shape, np.float32)


def made(layers, rows):
    params = {{f"layers.{{n}}.weight": draw(layers, *s) for n, s in shapes.items()}}
    params |= {{f"layers.{{n}}.norm.gamma": draw(layers, d) for n in ("attn", "mlp")}}
    params |= {{n: draw(rows, d) for n in ("embed.weight", "head.weight")}}
    return params | {{"head.norm.gamma": draw(d)}}


def peak():  # of this program: getrusage tells the parent's too
    rows = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(r for r in rows if r.startswith("VmHWM")).split()[1])


def now():
    return 4096 * int(open("/proc/self/statm").read().split()[1])


# Loads libraries and buffers of theirs, which are no part of what is measured.
small = dataclasses.replace(config, num_layers=1, vocab_size=64)
pipeline.prepare(small, made(1, 64), RECIPES["w8a8"], consume=True)
params = made(layers, v)
size, before = sum(x.nbytes for x in params.values()), now()
assert peak() < before + 0.05 * size, "the peak is that of an earlier moment"
out = pipeline.prepare(config, params, RECIPES["w8a8"], consume={consume})
jax.block_until_ready(out)
print((peak() - before + size) / size, len(params))
"""


def peak(consume: bool, layers: int) -> tuple[float, int]:
    """Most memory while preparing, in sizes of the parameters, and how many of them are left."""
    script = textwrap.dedent(SCRIPT).format(layers=layers, consume=consume)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        # Otherwise the C library keeps freed arrays below 32 MB, which real models' are above.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    most, left = done.stdout.split()
    return float(most), int(left)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layers", pairwise.often([8, 24], [8]))
def test_preparing_holds_the_parameters_once(layers):
    """Of 109 MB (310 at night) the largest tensor is a quarter; blocks in float64 take 25 MB."""
    most, left = peak(consume=True, layers=layers)
    assert most <= {8: 1.45, 24: 1.4}[layers]
    assert left == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_without_consuming_the_checkpoint_stays():
    """What makes the test above fail: each tensor is there twice, and one a third time."""
    most, left = peak(consume=False, layers=8)
    assert most >= 1.9
    assert left == 12


def test_consuming_changes_no_value():
    config, params = load_params(tiny.GOLDEN / "gqa_llama3")
    kept = pipeline.prepare(config, params, RECIPES["w8a8"])
    before = {n: np.array(x) for n, x in params.items()}
    taken = dict(params)
    again = pipeline.prepare(config, taken, RECIPES["w8a8"], consume=True)
    assert taken == {}
    assert kept.keys() == again.keys()
    for name, x in kept.items():
        np.testing.assert_array_equal(x, again[name])
    for name, x in before.items():
        np.testing.assert_array_equal(params[name], x)
