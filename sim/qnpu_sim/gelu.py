"""Look-up tables of GELU in its tanh form, computed as LiteRT's kernels compute them.

LiteRT fills its tables in float32 with the C library's `tanhf`. Its last bit differs between
libraries, and a sample at a rounding boundary then differs by one code: with a tanh that always
rounds correctly 3 of 200 int16 tables did (glibc 2.36). So this file calls the same function, that
of the machine it runs on.

Reference: LiteRT tflite/kernels/activations.cc, `GeluPrepare`, `GeluEval`;
  reference/gelu.h, `GeluTransformApproximate`; common.h, `LUTPopulateInt8`, `LUTPopulateInt16`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache

import numpy as np

from qnpu_sim import fixedpoint
from qnpu_sim.tables import INT8_CODES, INT16_CODES, interpolation_table

ROOT = np.sqrt(2 / np.pi)
"""sqrt(2 / pi), float64."""


def gelu_tanh(x: np.ndarray, tanh: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in the precision of x.

    Factors are multiplied in the kernel's order, from left to right.
    """
    real = x.dtype.type
    inner = real(ROOT) * (x + real(0.044715) * x * x * x)
    return real(0.5) * x * (real(1) + tanh(inner))


@cache
def _library() -> Callable[[float], float] | None:
    """The C library's tanhf, None where there is none to be found."""
    name = ctypes.util.find_library("m")
    try:
        function = ctypes.CDLL(name).tanhf
    except (AttributeError, OSError):
        return None
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
    return function


def tanhf(x: np.ndarray) -> np.ndarray:
    """tanh in float32 as the C library rounds it; correctly rounded where none is found.

    >>> tanhf(np.asarray([0.5, -20.0], np.float32)).tolist()
    [0.46211716532707214, -1.0]
    """
    function = _library()
    if function is None:
        return np.tanh(x.astype(np.float64)).astype(np.float32)
    return np.asarray([function(v) for v in x.ravel().tolist()], np.float32).reshape(x.shape)


def _gelu_float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # x^3 beyond float32 is infinite, its tanh 1
        return gelu_tanh(x, tanhf)


def gelu_int8(
    scale: np.float32, zero_point: int, output_scale: np.float32, output_zero_point: int
) -> np.ndarray:
    """Tabulates GELU on int8: one float32 value per code, rounded half away from zero.

    Returns:
      int8 (256,), indexed by code + 128.

    >>> table = gelu_int8(np.float32(0.1), 0, np.float32(0.1), 0)
    >>> table[[128 - 100, 128, 128 + 10, 128 + 100]].tolist()  # gelu(1) = 0.84
    [0, 0, 8, 100]
    """
    y = _gelu_float32(scale * (INT8_CODES - zero_point).astype(np.float32))
    rounded = fixedpoint.round_half_away(y * (np.float32(1) / output_scale))
    return np.clip(rounded + np.float32(output_zero_point), -128, 127).astype(np.int8)


def gelu_int16(scale: np.float32, output_scale: np.float32) -> np.ndarray:
    """Tabulates GELU on int16: 513 samples over the int16 range, interpolated linearly.

    Zero points are 0.

    Returns:
      int16 (65536,), indexed by code + 32768.
    """
    table = interpolation_table(_gelu_float32, scale, 0, output_scale)
    return fixedpoint.lut_lookup(INT16_CODES, table).astype(np.int16)
