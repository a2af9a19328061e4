"""Rounding profiles: which arithmetic brings an accumulator to the output's scale.

A profile is a table of `Rules`. Its choices show up in a kernel only as the *type* of a prepared
constant: each type below is one rounding rule, and `rescale` is the rule's definition. So a kernel
is compiled once per rule, not once per layer, and a new profile is a new table, with a new type
where its arithmetic is new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.errors import UserError
from qnpu_sim import fixedpoint
from qnpu_sim.fixedpoint import Rounding, Ties

ProfileName = Literal["litert_ref", "litert_opt", "litert_xnn", "npu"]


class DoubleScale(NamedTuple):
    """round_half_away(double(acc) * factor); the reference FULLY_CONNECTED, which is not fixed
    point.

    Reference: LiteRT tflite/kernels/internal/reference/integer_ops/fully_connected.h,
      `FullyConnectedPerChannel`
    with scales.
    """

    factor: np.ndarray


class FloatScale(NamedTuple):
    """round_half_even(float32(acc) * factor), all in float32.

    Large results are clipped on the way, small ones are not: what is below -2^31 becomes that, and
    a negative zero point then wraps it to the other end, as in the kernels.

    Reference: XNNPACK src/qs8-gemm, AVX512: min, CVTPS2DQ, then the zero point.
    """

    factor: np.ndarray


class FixedScale(NamedTuple):
    """MBQM(acc, multiplier, shift) on int32 accumulators."""

    multiplier: np.ndarray
    shift: np.ndarray


class SingleScale(NamedTuple):
    """MBQM with ties upwards in both of its roundings, on int32 accumulators: vector code."""

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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("multiplier", "shift"),
    meta_fields=("rounding", "ties"),
)
@dataclass(frozen=True)
class ChosenScale:
    """What an NPU's designer chose: `fixedpoint.multiply_by_quantized_multiplier_wide` with these
    roundings, on accumulators of any width."""

    multiplier: Any
    shift: Any
    rounding: Rounding
    ties: Ties


Scale = (
    DoubleScale
    | FloatScale
    | FixedScale
    | SingleScale
    | FixedScale64
    | FixedScaleWide
    | ChosenScale
)
"""How an accumulator is brought to the output's scale; leaves are scalars or one value per
channel."""

Rule = Callable[[Any], Scale]
"""Makes the constant of a rounding rule from a real factor (float64, scalar or per channel)."""


def double(real: Any) -> DoubleScale:
    """A `Rule`."""
    return DoubleScale(np.asarray(real, np.float64))


def fixed(kind: Callable[[np.ndarray, np.ndarray], Scale]) -> Rule:
    """The `Rule` of a type that holds a multiplier and a shift."""
    return lambda real: kind(*fixedpoint.quantize_multiplier(real))


@dataclass(frozen=True)
class Rules:
    """What a profile does where profiles differ. Ops that are not named are equal in all of them.

    Attributes:
      linear8: rule of FULLY_CONNECTED on int8.
      linear16, linear16_wide: of FULLY_CONNECTED on int16 with a 32-bit and with a 64-bit bias.
      one_scale: in which x_scale * weight_scale of FULLY_CONNECTED is computed, where all weights
        have one scale and the accumulator has 32 bits.
      matmul8, matmul16: of BATCH_MATMUL.
      elementwise: of ADD, MUL and QUANTIZE.
      lanes: int8 ADD, MUL and QUANTIZE and int16 ADD run in vector code, 16 elements at a time,
        which rounds and saturates otherwise than the scalar code that does the rest.
      xnnpack: XNNPACK takes what its limits allow (`qnpu_sim.xnnpack`).
      softmax8: int8 SOFTMAX in fixed point or in float32.
      sqrt: `float32` computes in float32 and truncates; `integer` takes an exact integer square
        root.
      table_entries: of LOGISTIC, RSQRT and SOFTMAX's exp; None: as LiteRT has them.
      accumulator_bits: of FULLY_CONNECTED and BATCH_MATMUL; None: those of the bias, 32 for int8
        BATCH_MATMUL, 64 for int16.
      rescaled_bits: of the widest accumulator that its rules bring to an output.
      overflow: what an accumulator of these bits does where a sum may pass it; `error` refuses.
      floats: floating point may serve where it is exact (`qnpu_sim.exact_dots`).
    """

    linear8: Rule
    linear16: Rule
    linear16_wide: Rule
    matmul8: Rule
    matmul16: Rule
    elementwise: Rule
    one_scale: Literal["float64", "float32"] = "float64"
    lanes: bool = False
    xnnpack: bool = False
    softmax8: Literal["fixed", "float32"] = "fixed"
    sqrt: Literal["float32", "integer"] = "float32"
    table_entries: int | None = None
    accumulator_bits: int | None = None
    rescaled_bits: int = 64
    overflow: Literal["error", "wrap", "saturate"] = "error"
    floats: bool = True


_MBQM, _MBQM64, _RUY = fixed(FixedScale), fixed(FixedScale64), fixed(SingleScale)
_REF = Rules(double, double, double, _MBQM, _MBQM64, _MBQM)
_OPT = replace(
    _REF, linear8=_RUY, linear16=_RUY, one_scale="float32", lanes=True, softmax8="float32"
)


WIDEST = 48
"""Bits that `fixedpoint.multiply_by_quantized_multiplier_wide` takes."""


@dataclass(frozen=True)
class Npu:
    """The options of the `npu` profile: integers only, as a fixed-point machine computes.

    Attributes:
      rounding: of FULLY_CONNECTED, BATCH_MATMUL, ADD, MUL and QUANTIZE: `double` as MBQM, or the
        whole product once. The other ops are tables, and SOFTMAX's fixed point is LiteRT's.
      ties: of the last rounding; in `double` the first one goes upwards, as the high multiply of
        all vector units does.
      multiplier_bits: of the multipliers of these five, without their sign.
      accumulator_bits: 16 to 48, of FULLY_CONNECTED and BATCH_MATMUL; None: as the file has it.
      overflow: `error` refuses a model whose accumulators are not proved to fit; `wrap` keeps the
        low bits; `saturate` clips after every product, in the order of the inner index, the bias
        first.
      table_entries: 2^n + 1, n from 5 to 16: samples of LOGISTIC, RSQRT and of SOFTMAX's exp over
        the range of codes, interpolated linearly; None: LiteRT's own tables.

    Raises:
      UserError: a value out of its range.
    """

    rounding: Rounding = "double"
    ties: Ties = "away"
    multiplier_bits: Literal[31, 15] = 31
    accumulator_bits: int | None = None
    overflow: Literal["error", "wrap", "saturate"] = "error"
    table_entries: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in {
            "rounding": ("double", "single"),
            "ties": ("up", "away", "even"),
            "multiplier_bits": (31, 15),
            "accumulator_bits": (None, *range(16, WIDEST + 1)),
            "overflow": ("error", "wrap", "saturate"),
            "table_entries": (None, *(2**n + 1 for n in range(5, 17))),
        }.items():
            if getattr(self, name) not in allowed:
                some = ", ".join(str(a) for a in allowed)
                got = getattr(self, name)
                raise UserError(f"{name}: expected one of {some}; got {got}; choose one of them")

    def rules(self) -> Rules:
        """The table of this NPU."""
        plain = (self.rounding, self.ties, self.multiplier_bits) == ("double", "away", 31)
        # The same bits, in fewer operations.
        narrow = _MBQM if plain else self._chosen
        wide = fixed(FixedScaleWide) if plain else self._chosen
        # A sum of more than 32 bits needs the wide form; see `prepare`.
        return Rules(
            *(narrow, narrow, wide, narrow, wide, narrow),
            sqrt="integer",
            table_entries=self.table_entries,
            accumulator_bits=self.accumulator_bits,
            rescaled_bits=WIDEST,
            overflow=self.overflow,
            floats=False,
        )

    def _chosen(self, real: Any) -> ChosenScale:
        multiplier, shift = fixedpoint.quantize_multiplier(real)
        if self.multiplier_bits == 15:
            # The upper 15 bits: a product with them is the one with 15 bits, times 2^16.
            rounded = np.minimum((multiplier.astype(np.int64) + 2**15) >> 16, 2**15 - 1)
            multiplier = (rounded << 16).astype(np.int32)
        return ChosenScale(multiplier, shift, self.rounding, self.ties)


PROFILES: dict[ProfileName, Rules] = {
    "litert_ref": _REF,
    "litert_opt": _OPT,
    "litert_xnn": replace(_OPT, xnnpack=True),
    "npu": Npu().rules(),
}
"""`litert_ref`, `litert_opt`: LiteRT's reference and optimized kernels on x86 (OpResolverType
BUILTIN_REF, BUILTIN_WITHOUT_DEFAULT_DELEGATES), bit for bit. `litert_xnn`: what an application gets
(BUILTIN): XNNPACK where it takes the op, the optimized kernels elsewhere. `npu`: `Npu`."""

Profile = ProfileName | Npu


def rules_of(profile: Profile) -> Rules:
    """The table of a profile.

    Raises:
      UserError: no profile has this name.
    """
    if isinstance(profile, Npu):
        return profile.rules()
    if not isinstance(profile, str) or profile not in PROFILES:
        names = ", ".join(PROFILES)
        raise UserError(f"profile {profile!r}: expected one of {names}; choose one of them")
    return PROFILES[profile]


def rescale(acc: jax.Array, scale: Scale) -> jax.Array:
    """acc times the real factor of `scale`, rounded by its rule.

    Args:
      acc: int32 for `FixedScale`, `SingleScale` and `FloatScale`, int64 for `FixedScale64` and
        `FixedScaleWide`, either for the others; channels last.
      scale: leaves of shape () or (channels,).

    Returns:
      int32, before the output's zero point and clipping.
    """

    def at(leaf: Any) -> jax.Array:
        return _channels(leaf, acc)

    match scale:
        case DoubleScale(factor):
            product = acc.astype(jnp.float64) * at(factor)
            return fixedpoint.cast_to_int32(fixedpoint.round_half_away(product))
        case FloatScale(factor):
            product = acc.astype(jnp.float32) * at(factor)
            low, high = np.float32(-(2.0**31)), np.float32(2**15)
            return jnp.round(jnp.clip(product, low, high)).astype(jnp.int32)
        case FixedScale(multiplier, shift):
            return fixedpoint.multiply_by_quantized_multiplier(acc, at(multiplier), at(shift))
        case SingleScale(multiplier, shift):
            return fixedpoint.multiply_by_quantized_multiplier_single(
                acc, at(multiplier), at(shift)
            )
        case FixedScale64(multiplier, shift):
            function = fixedpoint.multiply_by_quantized_multiplier_64
            if acc.dtype == jnp.int32:
                function = fixedpoint.multiply_by_quantized_multiplier_64_in_double
            return function(acc, at(multiplier), at(shift))
        case FixedScaleWide(multiplier, shift):
            return fixedpoint.multiply_by_quantized_multiplier_wide(acc, at(multiplier), at(shift))
        case ChosenScale(multiplier, shift, rounding, ties):
            return fixedpoint.multiply_by_quantized_multiplier_wide(
                acc, at(multiplier), at(shift), rounding, ties
            )
        case _:
            assert_never(scale)


def _channels(leaf: np.ndarray | jax.Array, acc: jax.Array) -> jax.Array:
    """A scalar or per-channel leaf, with axes added in front to the rank of `acc`."""
    leaf = jnp.asarray(leaf)
    return leaf.reshape((1,) * (acc.ndim - leaf.ndim) + leaf.shape) if leaf.ndim else leaf
