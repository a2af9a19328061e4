"""Scales, zero points and code ranges: from real values to integer codes and back.

xhat = (clip(round(x / s) + z, qmin, qmax) - z) s, with scale s and zero point z. Tensors of the layer
graph carry a leading layer axis: scales are (L,) or (L, channels).
"""

from __future__ import annotations

from typing import Any

import flax.struct
import numpy as np

from qnpu_jax.graph.graph import TensorSpec

Array = Any
"""A NumPy or JAX array, or a NumPy scalar."""
Scales = dict[str, "QParams"]
"""QParams by global name (`embed.*`, `layers.*`, `head.*`); those of `layers.*` have a leading
layer axis."""


@flax.struct.dataclass(kw_only=True)
class QParams:
    """Scale (real units per code, float32, > 0) and zero point (code of real 0, integer-valued
    float32)."""

    scale: Any
    zero_point: Any


def code_range(spec: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """qmin and qmax per layer (float32). Parameters leave the lowest code out, as LiteRT's weights
    must."""
    qmax = 2.0 ** (np.asarray(spec.quant.bits, np.float32) - 1) - 1
    qmin = -qmax if spec.kind == "param" else -qmax - 1
    return qmin.astype(np.float32), qmax.astype(np.float32)


def quantize(
    x: Array, scale: Array, zero_point: Array, spec: TensorSpec, layer: int = 0
) -> np.ndarray:
    """Codes of x: clip(round(x / s) + z), rounded half to even in float64. Shapes as `fake_quant`;
    int64."""
    qmin, qmax = (int(r[layer]) for r in code_range(spec))
    q = np.rint(np.asarray(x, np.float64) / np.asarray(scale, np.float64)) + zero_point
    return np.clip(q, qmin, qmax).astype(np.int64)


def expand(scale: Array, spec: TensorSpec) -> Array:
    """A per-channel vector reshaped to broadcast along the tensor's channel axis; scalars as they
    are."""
    if spec.quant.axis is None:
        return scale
    shape = [1] * len(spec.shape)
    shape[spec.quant.axis] = spec.shape[spec.quant.axis]
    return scale.reshape(shape)


def from_range(lo: Array, hi: Array, bits: Array, symmetric: bool, narrow: bool = False) -> QParams:
    """The scale and zero point whose code range spans [min(lo, 0), max(hi, 0)].

    Args:
      lo, hi: real bounds, any shape.
      bits: broadcastable to lo.
      symmetric: zero point 0 (always so at 16 bits).
      narrow: leave out the lowest code (weights).
    """
    lo, hi = np.minimum(np.asarray(lo, np.float64), 0), np.maximum(np.asarray(hi, np.float64), 0)
    qmax = 2.0 ** (np.asarray(bits, np.float64) - 1) - 1
    qmin = -qmax if narrow else -qmax - 1
    even = np.logical_or(symmetric, np.asarray(bits) >= 16)
    scale = np.where(even, np.maximum(-lo, hi) / qmax, (hi - lo) / (qmax - qmin))
    scale = np.maximum(
        scale, np.finfo(np.float32).tiny * 2.0**40
    )  # an all-zero tensor: any scale will do
    zero_point = np.where(even, 0.0, np.clip(np.rint(qmin - lo / scale), qmin, qmax))
    return QParams(scale=scale.astype(np.float32), zero_point=zero_point.astype(np.float32))
