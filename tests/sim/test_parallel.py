"""The simulator on several devices gives the bits of one: eight of the host's, in a process that
has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import qnpu_jax
from qnpu_jax.integer import storage

ROOT = str(Path(qnpu_jax.__file__).parents[1])

COMPARE = """
import sys
from pathlib import Path
import jax
import numpy as np
from qnpu_jax.integer import storage
from qnpu_sim import compile_model, run

devices = jax.devices()
assert len(devices) == 8
model = storage.load(Path(sys.argv[1]))
dec = model.decoder(6)
rng = np.random.default_rng(0)
for profile in ("litert_ref", "npu"):
    alone = compile_model(model, dec, profile)
    spread = compile_model(model, dec, profile, devices)
    for shape in ((16, 6), (8, 6), (5, 6), (11, 6), (1, 6), (6,)):
        ids = rng.integers(0, model.config.vocab_size, shape)
        expected = run(alone, ids, lambda _: True)
        got = run(spread, ids, lambda _: True)
        assert expected.keys() == got.keys() and len(got) > 100
        for name, codes in expected.items():
            assert got[name].dtype == codes.dtype and got[name].shape == codes.shape, name
            assert (np.asarray(got[name]) == np.asarray(codes)).all(), (profile, shape, name)
        assert run(spread, ids).keys() == {"head.logits"}
        if shape[0] == 16:
            own = got["head.logits"].addressable_shards
            assert [s.data.shape[0] for s in own] == [2] * 8, "each device has its share"
ids = rng.integers(0, model.config.vocab_size, (4, 6))
expected, got = (run(compile_model(model, dec, devices=d), ids) for d in (None, devices[5:]))
assert (np.asarray(got["head.logits"]) == np.asarray(expected["head.logits"])).all()
whole = compile_model(model, dec, devices=devices, at_once=True)
for shape in ((11, 6), (6,)):
    ids = rng.integers(0, model.config.vocab_size, shape)
    expected, got = run(compile_model(model, dec), ids), run(whole, ids)
    assert (np.asarray(got["head.logits"]) == np.asarray(expected["head.logits"])).all(), shape
print("equal")
"""


@pytest.mark.parametrize("plan", ["w8a8", "w4a8i8"])
def test_eight_devices_give_the_bits_of_one(plan, tmp_path):
    """Every tensor of both profiles; batches that do and do not divide, and one sequence alone."""
    storage.save(tiny.quantized("gqa_llama3", plan), tmp_path)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "sim")]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path)], env=env, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr
