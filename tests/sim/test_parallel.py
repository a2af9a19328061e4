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

folder, profile, *batches = sys.argv[1:]
devices = jax.devices()
assert len(devices) == 8
model = storage.load(Path(folder))
dec = model.decoder(6)
everything = np.random.default_rng(0).integers(0, model.config.vocab_size, (16, 6))
alone = compile_model(model, dec, profile)
expected = {n: np.asarray(x) for n, x in run(alone, everything, "*").items()}
assert len(expected) > 100


def compare(program, rows, keep="head.logits"):
    got = run(program, everything[rows], keep)
    assert got.keys() == (expected.keys() if keep == "*" else {"head.logits"})
    for name, codes in got.items():
        want = expected[name][rows]
        assert codes.dtype == want.dtype and codes.shape == want.shape, name
        assert (np.asarray(codes) == np.asarray(want)).all(), (profile, rows, name)
    return got["head.logits"]


spread = compile_model(model, dec, profile, devices)
for batch in map(int, batches):
    compare(spread, slice(batch) if batch else 0, "*")
own = compare(spread, slice(16)).addressable_shards
assert [s.data.shape[0] for s in own] == [2] * 8, "each device has its share"
compare(compile_model(model, dec, profile, devices[5:]), slice(4))
whole = compile_model(model, dec, profile, devices, at_once=True)
for rows in (slice(11), 0):
    compare(whole, rows)
print("equal")
"""


TIMEOUT = 600
"""Seconds that a collective waits for all devices: eight threads on few and busy cores may be late
by more than XLA's 40."""


def compare(folder: Path, plan: str, profile: str, batches: list[int]) -> None:
    storage.save(tiny.quantized("gqa_llama3", plan), folder)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([ROOT, os.path.join(ROOT, "sim")]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8"
        f" --xla_cpu_collective_call_warn_stuck_timeout_seconds={TIMEOUT}"
        f" --xla_cpu_collective_call_terminate_timeout_seconds={TIMEOUT}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", COMPARE, str(folder), profile, *map(str, batches)]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "profile"),
    [("w8a8", "litert_ref"), pytest.param("w4a8i8", "npu", marks=pytest.mark.nightly)],
)
def test_eight_devices_give_the_bits_of_one(plan, profile, tmp_path):
    """Every tensor; a batch that divides, one that does not, and one sequence alone (0)."""
    compare(tmp_path, plan, profile, [16, 11, 0])


@pytest.mark.nightly
@pytest.mark.parametrize("profile", ["litert_ref", "npu"])
@pytest.mark.parametrize("plan", ["w8a8", "w4a8i8"])
def test_eight_devices_give_the_bits_of_one_at_every_batch(plan, profile, tmp_path):
    compare(tmp_path, plan, profile, [16, 8, 5, 11, 1, 0])
