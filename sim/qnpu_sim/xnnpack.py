"""XNNPACK on x86: which int8 ops its LiteRT delegate takes, and the constants that it computes.

The delegate takes an op only where its scales are within limits (the functions `takes_*`). An op
outside them stays with LiteRT's optimized kernels, which give other bits. int16 ops all stay.
FULLY_CONNECTED holds int4 weights times 16, so its 32-bit accumulator has 28 usable bits.

Scales are float32 real units per code, > 0.

Reference: LiteRT tflite/delegates/xnnpack/xnnpack_delegate.cc, `CheckTensorsInputOutputScale`,
  `CheckTensorsInputProductOutputScale`, `VisitBatchMatMulNode`; measured with ai-edge-litert 2.3.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_sim.rounding import FloatScale

INT4_BITS = 28
"""Usable bits of the accumulator of a FULLY_CONNECTED with int4 weights."""


TINY = np.finfo(np.float32).tiny
"""The smallest normal float32."""


def _check_normal(*scales: Any) -> None:
    """Refuses denormal scales: depending on op and operand, XNNPACK leaves the op, refuses the
    model or crashes.

    Raises:
      UserError: a scale is denormal.
    """
    smallest = min(float(np.min(s)) for s in scales)
    if smallest < TINY:
        raise UserError(
            f"scale {smallest:g}: XNNPACK fails at denormal scales; expected at least {TINY:g}; use"
            " profile litert_opt, or other scales"
        )


def takes_linear(
    x_scale: np.float32,
    weight_scale: np.ndarray,
    scale: np.float32,
    weight_bits: int,
    input_size: int,
) -> bool:
    """Takes a FULLY_CONNECTED if the bias's scales x_scale * weight_scale are normal numbers, and
    rows of int4 weights have an even length `input_size`.

    Raises:
      UserError: a scale is denormal, here and in the functions below.
    """
    _check_normal(x_scale, weight_scale, scale)
    paired = weight_bits > 4 or input_size % 2 == 0
    return paired and bool(np.min(x_scale * weight_scale) >= TINY)


def takes_add(x_scale: np.float32, y_scale: np.float32, scale: np.float32) -> bool:
    """Takes an ADD if x_scale / scale and y_scale / scale are in [2^-10, 2^8)."""
    _check_normal(x_scale, y_scale, scale)
    ratios = (x_scale / scale, y_scale / scale)
    return all(2.0**-10 <= r < 2.0**8 for r in ratios)


def takes_mul(x_scale: np.float32, y_scale: np.float32, scale: np.float32) -> bool:
    """Takes a MUL if x_scale y_scale / scale is in [2^-16, 2^8)."""
    _check_normal(x_scale, y_scale, scale)
    return bool(2.0**-16 <= x_scale * y_scale / scale < 2.0**8)


def takes_quantize(x_scale: np.float32, scale: np.float32) -> bool:
    """Takes a QUANTIZE if x_scale / scale is in [2^-8, 2^7]."""
    _check_normal(x_scale, scale)
    return bool(2.0**-8 <= x_scale / scale <= 2.0**7)


def takes_batch_matmul(
    x_scale: np.float32, y_scale: np.float32, scale: np.float32, y_zero_point: int
) -> bool:
    """Takes a BATCH_MATMUL if its second operand has zero point 0."""
    _check_normal(x_scale, y_scale, scale)
    return y_zero_point == 0


def takes_logistic(x_scale: np.float32) -> bool:
    """Takes a LOGISTIC at any normal scale."""
    _check_normal(x_scale)
    return True


def product_scale(x_scale: np.float32, y_scale: Any, scale: np.float32) -> FloatScale:
    """Rescaling of FULLY_CONNECTED, BATCH_MATMUL and MUL: float32(float32(sx sy) / s), a scalar or
    per channel."""
    return FloatScale(np.asarray(x_scale * y_scale / scale, np.float32))


def check_linear(scale: FloatScale) -> None:
    """Refuses a FULLY_CONNECTED that the delegate takes and XNNPACK then fails to create, which
    fails the whole model.

    Raises:
      UserError: a factor is 256 or more.
    """
    largest = float(np.max(scale.factor))
    if largest >= 256.0:
        raise UserError(
            f"FULLY_CONNECTED: XNNPACK refuses input scale * weight scale / output scale ="
            f" {largest:g}; expected below 256; use profile litert_opt, or give the output a larger"
            " scale"
        )


def add_factors(
    x_scale: np.float32, y_scale: np.float32, scale: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer factors A, B and the shift s of ADD: A = round(2^s sx / sz), B = round(2^s sy / sz).

    s is chosen so that the larger factor has 21 bits.

    Reference: XNNPACK src/microparams-init.c, `xnn_init_qs8_add_minmax_scalar_params`.
    """
    ratios = np.asarray([x_scale / scale, y_scale / scale], np.float32)
    shift = 20 - (int(np.frexp(ratios.max())[1]) - 1)
    x, y = np.rint(ratios.astype(np.float64) * 2.0**shift).astype(np.int32)
    return np.asarray(x), np.asarray(y), np.asarray(shift, np.int32)


def quantize_factor(x_scale: np.float32, scale: np.float32) -> np.ndarray:
    """Integer factor of QUANTIZE in units of 2^-8: round(256 sx / sz).

    Reference: XNNPACK src/microparams-init.c, `xnn_init_qs8_cvt_scalar_params`.
    """
    return np.asarray(np.rint(np.float32(256) * (x_scale / scale)), np.int32)
