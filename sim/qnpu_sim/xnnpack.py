"""What XNNPACK takes from a graph of int8 ops on x86, and its constants.

An op outside these limits stays with LiteRT's optimized kernels: other bits. Only int8 is taken.
FULLY_CONNECTED sums int4 weights in units of 1/16, so that 28 bits of its accumulator are left.

Reference: LiteRT tflite/delegates/xnnpack/xnnpack_delegate.cc, `CheckTensorsInputOutputScale`,
  `CheckTensorsInputProductOutputScale`, `VisitBatchMatMulNode`; measured with ai-edge-litert 2.3.0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_sim.rounding import FloatScale

INT4_BITS = 28
"""Bits of the accumulator of FULLY_CONNECTED with int4 weights."""


TINY = np.finfo(np.float32).tiny


def _check_normal(*scales: Any) -> None:
    """Raises UserError for a denormal scale: where XNNPACK meets one it stands aside, refuses the
    model or crashes, by op and operand."""
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
    """The bias's scales (the products) are normal numbers; int4 weights come in pairs."""
    _check_normal(x_scale, weight_scale, scale)
    paired = weight_bits > 4 or input_size % 2 == 0
    return paired and bool(np.min(x_scale * weight_scale) >= TINY)


def takes_add(x_scale: np.float32, y_scale: np.float32, scale: np.float32) -> bool:
    """Both input-to-output scales in [2^-10, 2^8)."""
    _check_normal(x_scale, y_scale, scale)
    ratios = (x_scale / scale, y_scale / scale)
    return all(2.0**-10 <= r < 2.0**8 for r in ratios)


def takes_mul(x_scale: np.float32, y_scale: np.float32, scale: np.float32) -> bool:
    """The product's scale over the output's in [2^-16, 2^8)."""
    _check_normal(x_scale, y_scale, scale)
    return bool(2.0**-16 <= x_scale * y_scale / scale < 2.0**8)


def takes_quantize(x_scale: np.float32, scale: np.float32) -> bool:
    """The input-to-output scale in [2^-8, 2^7]."""
    _check_normal(x_scale, scale)
    return bool(2.0**-8 <= x_scale / scale <= 2.0**7)


def takes_batch_matmul(
    x_scale: np.float32, y_scale: np.float32, scale: np.float32, y_zero_point: int
) -> bool:
    """The second operand has zero point 0."""
    _check_normal(x_scale, y_scale, scale)
    return y_zero_point == 0


def takes_logistic(x_scale: np.float32) -> bool:
    """At any scale."""
    _check_normal(x_scale)
    return True


def product_scale(x_scale: np.float32, y_scale: Any, scale: np.float32) -> FloatScale:
    """f32(f32(sx sy) / s), scalar or per channel."""
    return FloatScale(np.asarray(x_scale * y_scale / scale, np.float32))


def check_linear(scale: FloatScale) -> None:
    """Raises UserError where XNNPACK fails to make a FULLY_CONNECTED that the delegate took, and
    with it the whole model."""
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
    """Integer factors of both inputs and their shift: the larger factor has 21 bits.

    Reference: XNNPACK src/microparams-init.c, `xnn_init_qs8_add_minmax_scalar_params`.
    """
    ratios = np.asarray([x_scale / scale, y_scale / scale], np.float32)
    shift = 20 - (int(np.frexp(ratios.max())[1]) - 1)
    x, y = np.rint(ratios.astype(np.float64) * 2.0**shift).astype(np.int32)
    return np.asarray(x), np.asarray(y), np.asarray(shift, np.int32)


def quantize_factor(x_scale: np.float32, scale: np.float32) -> np.ndarray:
    """The factor in units of 2^-8.

    Reference: XNNPACK src/microparams-init.c, `xnn_init_qs8_cvt_scalar_params`.
    """
    return np.asarray(np.rint(np.float32(256) * (x_scale / scale)), np.int32)
