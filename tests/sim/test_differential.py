"""The simulator's kernels against LiteRT's three kernel sets, on whatever hypothesis thinks of.

A mismatch is shrunk, and the model of its smallest example saved beside its inputs in
`mismatches/` (or $QNPU_MISMATCHES): what a bug report needs.

`pytest -m exhaustive` compares ten million elements of every op and kernel
set; without it, a small set that is the same in every run.
"""

import functools
import os
import time
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from differential import STRATEGIES, Example
from hypothesis import HealthCheck, assume, given, settings
from single_op import interpret, single_op
from test_kernels import KERNELS

from qnpu_jax.errors import UserError
from qnpu_sim.rounding import PROFILES, ProfileName

ELEMENTS = 10_000_000
"""Of every op and kernel set, in the exhaustive run."""
FOLDER = Path(os.environ.get("QNPU_MISMATCHES", "mismatches"))
QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
ops = pytest.mark.parametrize("op", list(STRATEGIES))
profiles = pytest.mark.parametrize("profile", list(KERNELS))


def compared(example: Example, op: str, profile: ProfileName) -> int:
    """Elements compared; raises at a mismatch, with the model saved.

    What the interpreter refuses to load is no example, nor are denormal scales under XNNPACK, at
    which it may crash.
    """
    model = single_op(example.code, example.options, example.inputs, example.output).to_bytes()
    feeds = {f"x{i}": t.data for i, t in enumerate(example.inputs) if not t.constant}
    try:
        constants = example.constants(PROFILES[profile])
    except UserError as error:
        assume("denormal" not in str(error))
        with pytest.raises(RuntimeError, match="XNNPACK"):
            interpret(model, feeds, KERNELS[profile])
        assert "XNNPACK refuses" in str(error)  # noqa: PT017
        return 0
    try:
        expected = interpret(model, feeds, KERNELS[profile])
    except (RuntimeError, ValueError):
        assume(False)
    with jax.enable_x64():
        got = np.asarray(compiled(example.kernel)(*example.arrays, *constants))
    if not np.array_equal(got, expected):
        save(f"{op}-{profile}", model, feeds, expected, got)
        differing = int(np.count_nonzero(got != expected))
        where = tuple(np.argwhere(got != expected)[0])
        pytest.fail(
            f"{differing} of {got.size} differ, first at {list(map(int, where))}: LiteRT"
            f" {expected[where]}, simulator {got[where]}; {example.inputs} {example.output}"
        )
    return got.size


def compiled(kernel: Any) -> Any:
    """The kernel jitted, once for equal keywords and not once per example."""
    if isinstance(kernel, functools.partial):
        return jitted(kernel.func, tuple(kernel.keywords.items()))
    return jitted(kernel, ())


@functools.cache
def jitted(function: Any, keywords: tuple) -> Any:
    return jax.jit(functools.partial(function, **dict(keywords)))


def save(name: str, model: bytes, feeds: dict[str, np.ndarray], expected: Any, got: Any) -> None:
    """The model, its inputs and both outputs; the last one saved is hypothesis' smallest."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.tflite").write_bytes(model)
    arrays: Any = {**feeds, "expected": expected, "got": got}
    np.savez(FOLDER / f"{name}.npz", **arrays)


@pytest.mark.slow
@profiles
@ops
def test_equals_the_interpreter(op, profile):
    total = 0

    @settings(max_examples=6, derandomize=True, **QUIET)
    @given(STRATEGIES[op])
    def run(example: Example) -> None:
        nonlocal total
        total += compared(example, op, profile)

    run()
    assert total > 0


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@profiles
@ops
def test_equals_the_interpreter_ten_million_times(op, profile):
    total = 0

    @settings(max_examples=200, derandomize=False, **QUIET)
    @given(STRATEGIES[op])
    def run(example: Example) -> None:
        nonlocal total
        total += compared(example, op, profile)

    seed, runs = int(os.environ.get("QNPU_SEED", time.time_ns() % 2**32)), 0
    print(f"{op} {profile}: QNPU_SEED={seed}")  # noqa: T201
    while total < ELEMENTS:
        hypothesis.seed(seed + runs)(run)()
        runs += 1
    print(f"{op} {profile}: {total} elements of {runs} x 200 examples, 0 differ")  # noqa: T201


def test_a_mismatch_shrinks_to_a_small_model(tmp_path, monkeypatch):
    """ADD under another kernel set's rules: found, shrunk to a few elements, and saved."""
    monkeypatch.setattr("test_differential.FOLDER", tmp_path)
    wrong: Any = dict(PROFILES) | {"litert_xnn": PROFILES["litert_ref"]}
    monkeypatch.setattr("test_differential.PROFILES", wrong)

    @settings(max_examples=300, derandomize=True, **QUIET)
    @given(STRATEGIES["ADD-int8"])
    def run(example: Example) -> None:
        compared(example, "ADD-int8", "litert_xnn")

    with pytest.raises(pytest.fail.Exception, match="differ"):
        run()
    saved = np.load(tmp_path / "ADD-int8-litert_xnn.npz")
    assert saved["x0"].size <= 40
    model = str(tmp_path / "ADD-int8-litert_xnn.tflite")
    feeds = {n: saved[n] for n in ("x0", "x1")}
    assert (interpret(model, feeds, "xnn") == saved["expected"]).all()
    assert (saved["got"] != saved["expected"]).any()
