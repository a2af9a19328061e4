"""Scales, zero points and code ranges: from real values to integer codes and back.

xhat = (clip(round(x / s) + z, qmin, qmax) - z) s, with scale s and zero point z. Tensors of the
layer graph carry a leading layer axis: scales are (L,) or (L, channels).
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
    """Quantization parameters of a tensor.

    Attributes:
      scale: real units per code, float32, > 0.
      zero_point: code of real 0, an integer held in float32.
    """

    scale: Any
    zero_point: Any


def code_range(spec: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest code of a tensor, one of each per layer (float32).

    Parameters leave the lowest code out, as LiteRT requires of weights.
    """
    qmax = 2.0 ** (np.asarray(spec.quant.bits, np.float32) - 1) - 1
    qmin = -qmax if spec.kind == "param" else -qmax - 1
    return qmin.astype(np.float32), qmax.astype(np.float32)


def quantize(
    x: Array, scale: Array, zero_point: Array, spec: TensorSpec, layer: int = 0
) -> np.ndarray:
    """Rounds real values to codes: clip(round(x / s) + z, qmin, qmax), half to even, in float64.

    Args:
      x: real values of one layer.
      scale, zero_point: broadcastable to x.
      layer: whose code range is taken.

    Returns: int64 codes, of the shape of x.
    """
    qmin, qmax = (int(r[layer]) for r in code_range(spec))
    q = np.rint(np.asarray(x, np.float64) / np.asarray(scale, np.float64)) + zero_point
    return np.clip(q, qmin, qmax).astype(np.int64)


def expand(scale: Array, spec: TensorSpec) -> Array:
    """Reshapes per-channel scales to broadcast along the tensor's channel axis; leaves scalars."""
    if spec.quant.axis is None:
        return scale
    shape = [1] * len(spec.shape)
    shape[spec.quant.axis] = spec.shape[spec.quant.axis]
    return scale.reshape(shape)


def from_range(lo: Array, hi: Array, bits: Array, symmetric: bool, narrow: bool = False) -> QParams:
    """Scale and zero point whose code range spans [min(lo, 0), max(hi, 0)].

    Symmetric: s = max(-lo, hi) / qmax, z = 0. Asymmetric: s = (hi - lo) / (qmax - qmin),
    z = round(qmin - lo / s).

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
