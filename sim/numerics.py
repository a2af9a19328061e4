"""Rounding profiles: which arithmetic brings an accumulator to the output's scale.

A profile is one row of `PROFILES`. Its choices show up in a kernel only as the *type* of a prepared
constant: each type below is one rounding rule, and `rescale` is the rule's definition. So a kernel
is compiled once per rule, not once per layer, and a new profile is a new row, with a new type where
its arithmetic is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from sim import fixedpoint

Profile = Literal["litert_ref", "npu"]


class DoubleScale(NamedTuple):
    """round_half_away(double(acc) * factor); the reference FULLY_CONNECTED, which is not fixed
    point.

    Reference: LiteRT tflite/kernels/internal/reference/integer_ops/fully_connected.h,
      `FullyConnectedPerChannel`
    with scales.
    """

    factor: np.ndarray


class FixedScale(NamedTuple):
    """MBQM(acc, multiplier, shift) on int32 accumulators."""

    multiplier: np.ndarray
    shift: np.ndarray


class FixedScale64(NamedTuple):
    """MBQM64(acc, multiplier, shift) on int64 accumulators, with 15 bits of the multiplier."""

    multiplier: np.ndarray
    shift: np.ndarray


class FixedScaleWide(NamedTuple):
    """MBQM on int64 accumulators, with all 31 bits of the multiplier."""

    multiplier: np.ndarray
    shift: np.ndarray


Scale = DoubleScale | FixedScale | FixedScale64 | FixedScaleWide
"""How an accumulator is brought to the output's scale; leaves are scalars or one value per
channel."""


@dataclass(frozen=True)
class Rules:
    """What a profile does where profiles differ. Ops that are not named are equal in all of them.

    Attributes:
      fully_connected: rule of an int32 accumulator.
      fully_connected_wide: rule of an int64 accumulator (int16 activations with an int64 bias).
      sqrt: `float32` computes in float32 and truncates; `integer` takes an exact integer square
        root.
    """

    fully_connected: type[Scale]
    fully_connected_wide: type[Scale]
    sqrt: Literal["float32", "integer"]


PROFILES: dict[Profile, Rules] = {
    "litert_ref": Rules(DoubleScale, DoubleScale, "float32"),
    "npu": Rules(FixedScale, FixedScaleWide, "integer"),
}
"""`litert_ref`: LiteRT's reference kernels (OpResolverType.BUILTIN_REF), bit for bit.
`npu`: integers only, as a fixed-point machine computes."""


def make_scale(rule: type[Scale], real: np.ndarray | float) -> Scale:
    """The constant of a rule for a real factor (float64, scalar or per channel)."""
    if rule is DoubleScale:
        return DoubleScale(np.asarray(real, np.float64))
    fixed: Any = rule  # every other rule holds a multiplier and a shift
    return fixed(*fixedpoint.quantize_multiplier(real))


def rescale(acc: jax.Array, scale: Scale) -> jax.Array:
    """acc times the real factor of `scale`, rounded by its rule.

    Args:
      acc: int32 for `FixedScale`, int64 for `FixedScale64` and `FixedScaleWide`, either for
        `DoubleScale`; channels last.
      scale: leaves of shape () or (channels,).

    Returns:
      int32, before the output's zero point and clipping.
    """
    match scale:
        case DoubleScale(factor):
            product = acc.astype(jnp.float64) * _channels(factor, acc)
            return fixedpoint.cast_to_int32(fixedpoint.round_half_away(product))
        case FixedScale(multiplier, shift):
            m, s = _channels(multiplier, acc), _channels(shift, acc)
            return fixedpoint.multiply_by_quantized_multiplier(acc, m, s)
        case FixedScale64(multiplier, shift):
            m, s = _channels(multiplier, acc), _channels(shift, acc)
            return fixedpoint.multiply_by_quantized_multiplier_64(acc, m, s)
        case FixedScaleWide(multiplier, shift):
            m, s = _channels(multiplier, acc), _channels(shift, acc)
            return fixedpoint.multiply_by_quantized_multiplier_wide(acc, m, s)
        case _:
            assert_never(scale)


def _channels(leaf: np.ndarray | jax.Array, acc: jax.Array) -> jax.Array:
    """A scalar or per-channel leaf, with axes added in front to the rank of `acc`."""
    leaf = jnp.asarray(leaf)
    return leaf.reshape((1,) * (acc.ndim - leaf.ndim) + leaf.shape) if leaf.ndim else leaf
