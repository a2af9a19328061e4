"""GELU's tables against LiteRT's kernels: every code, over many scales."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import options
from single_op import Tensor, run_op

from qnpu_jax.graph.ops import Gelu, eval_op
from qnpu_jax.tflite.operators import Code
from qnpu_sim import gelu
from qnpu_sim.tables import codes

GELU = options("Gelu", approximate=True)
PAIRS = 60
"""Pairs of scales for each width and kernel set; 200 were tried once, with none that differs."""


def drawn(dtype: str):
    """Inputs that reach from 1/100 to 10,000, outputs from far too wide to far too narrow."""
    rng = np.random.default_rng(len(dtype))
    top = 2 ** (8 * np.dtype(dtype).itemsize - 1)
    for _ in range(PAIRS):
        reach = 10 ** rng.uniform(-2, 4)
        zeros = rng.integers(-128, 128, 2) if dtype == "int8" else (0, 0)
        scale, out = np.float32(reach / top), np.float32(reach / top * 2 ** rng.uniform(-4, 4))
        yield scale, int(zeros[0]), out, int(zeros[1])


def table(dtype: str, scale, zero, out, out_zero) -> np.ndarray:
    if dtype == "int8":
        return gelu.gelu_int8(scale, zero, out, out_zero)
    return gelu.gelu_int16(scale, out)


@pytest.mark.parametrize("kernels", ["ref", "opt", "xnn"])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_every_code_is_the_interpreters(dtype, kernels):
    every = codes(np.dtype(dtype)).astype(dtype)[None]
    for scale, zero, out, out_zero in drawn(dtype):
        y = Tensor(dtype, None, out, out_zero, shape=every.shape)
        expected = run_op(Code.GELU, GELU, [Tensor(dtype, every, scale, zero)], y, kernels)
        got = table(dtype, scale, zero, out, out_zero)
        np.testing.assert_array_equal(got, expected[0], err_msg=f"{scale} {out}")


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_a_table_is_the_definition_rounded(dtype):
    """int8 within half a code and float32's rounding of it. int16 interpolates 513 samples: at
    inputs to 8 they lie 1/32 apart, and half of h^2 / 8 max |gelu''| (1.6) is 1e-4 of the range, 3
    codes; samples add one."""
    reach, top = 8.0, {"int8": 128, "int16": 32768}[dtype]
    scale = np.float32(reach / top)
    x = codes(np.dtype(dtype)).astype(np.float32) * scale
    real = np.asarray(eval_op(Gelu(), jnp.asarray(x)), np.float64)
    error = np.abs(table(dtype, scale, 0, scale, 0) - np.clip(real / scale, -top, top - 1))
    assert error.max() <= {"int8": 0.5 + 1e-4, "int16": 4}[dtype]


def test_without_a_c_library_tanh_rounds_correctly(monkeypatch):
    """The library's own is within 2 units in the last place."""
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    own = gelu.tanhf(x)
    monkeypatch.setattr(gelu, "_library", lambda: None)
    exact = gelu.tanhf(x)
    assert exact.dtype == np.float32
    np.testing.assert_array_less(np.abs(own - exact), 2.5 * np.spacing(np.abs(exact)) + 1e-45)
