"""Rounding profiles: the arithmetic that brings an accumulator to the output's scale.

Every kernel ends in y = round(acc r) with a real factor r, for example input scale * weight scale /
output scale. Machines round it differently. Each way is a `Scale` type below; `rescale` defines all
of them. A profile is a table of `Rules` that names the way for each op.

A kernel sees a profile only as the types of its constants. So it is compiled once per type, not
once per layer. A new profile needs a new table, and a new type only where its arithmetic is new.
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
"""Name of a rounding profile: see `PROFILES`."""


class DoubleScale(NamedTuple):
    """Rescales in float64: round_half_away(float64(acc) factor).

    LiteRT's reference FULLY_CONNECTED is floating point, unlike its other integer kernels.

    Reference: LiteRT tflite/kernels/internal/reference/integer_ops/fully_connected.h, the overload
      of `FullyConnectedPerChannel` with scales.
    """

    factor: np.ndarray


class FloatScale(NamedTuple):
    """Rescales in float32: round_half_even(float32(acc) factor).

    Large results are clipped before rounding. Small ones are not: a result below -2^31 becomes
    -2^31, and adding a negative zero point then wraps it to the highest code, as in the kernels.

    Reference: XNNPACK src/qs8-gemm, AVX512: min, CVTPS2DQ, then the zero point.
    """

    factor: np.ndarray


class FixedScale(NamedTuple):
    """Rescales int32 accumulators by MBQM: `fixedpoint.multiply_by_quantized_multiplier`."""

    multiplier: np.ndarray
    shift: np.ndarray


class SingleScale(NamedTuple):
    """Rescales int32 accumulators by MBQM as vector code does, ties upwards in both roundings:
    `fixedpoint.multiply_by_quantized_multiplier_single`."""

    multiplier: np.ndarray
    shift: np.ndarray


class FixedScale64(NamedTuple):
    """Rescales int64 accumulators with 15 bits of the multiplier:
    `fixedpoint.multiply_by_quantized_multiplier_64`."""

    multiplier: np.ndarray
    shift: np.ndarray


class FixedScaleWide(NamedTuple):
    """Rescales int64 accumulators with all 31 bits of the multiplier:
    `fixedpoint.multiply_by_quantized_multiplier_wide`."""

    multiplier: np.ndarray
    shift: np.ndarray


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("multiplier", "shift"),
    meta_fields=("rounding", "ties"),
)
@dataclass(frozen=True)
class ChosenScale:
    """Rescales accumulators of any width with the roundings that an `Npu` chooses:
    `fixedpoint.multiply_by_quantized_multiplier_wide`."""

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
"""A rescaling: its factor and, by its type, how the product is rounded. Arrays are scalars or have
one value per output channel."""

Rule = Callable[[Any], Scale]
"""Makes a `Scale` from a real factor: float64, a scalar or one per channel."""


def double(real: Any) -> DoubleScale:
    """Makes a `DoubleScale`: the rule that multiplies in float64."""
    return DoubleScale(np.asarray(real, np.float64))


def fixed(kind: Callable[[np.ndarray, np.ndarray], Scale]) -> Rule:
    """Returns the rule of a type that holds a multiplier and a shift."""
    return lambda real: kind(*fixedpoint.quantize_multiplier(real))


@dataclass(frozen=True)
class Rules:
    """Choices of a profile. Ops that are not named here have the same bits in all profiles.

    Attributes:
      linear8: rule of FULLY_CONNECTED on int8.
      linear16, linear16_wide: rules of FULLY_CONNECTED on int16 with a 32-bit and a 64-bit bias.
      matmul8, matmul16: rules of BATCH_MATMUL on int8 and on int16.
      elementwise: rule of ADD, MUL and QUANTIZE.
      one_scale: precision of the product x_scale * weight_scale of a FULLY_CONNECTED with one
        weight scale and a 32-bit accumulator; other products are float64.
      lanes: int8 ADD, MUL and QUANTIZE and int16 ADD run in vector code, 16 elements at a time. It
        rounds and saturates differently from the scalar code that computes the remaining elements.
      xnnpack: XNNPACK takes the ops that its limits allow (`qnpu_sim.xnnpack`).
      softmax8: arithmetic of int8 SOFTMAX.
      sqrt: `float32` computes in float32 and truncates; `integer` takes an exact integer square
        root.
      table_entries: samples of LOGISTIC, GELU, RSQRT and SOFTMAX's exp; None: LiteRT's own tables.
      accumulator_bits: width of the accumulators of FULLY_CONNECTED and BATCH_MATMUL; None: as in
        the file, the bias's width, and for BATCH_MATMUL 32 (int8) or 64 (int16).
      rescaled_bits: width of the widest accumulator that the rules can rescale.
      overflow: what an accumulator of `accumulator_bits` does where a sum may pass it; `error`
        refuses the model.
      floats: floating point may be used where it is exact (`qnpu_sim.exact_dots`).
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
"""Widest accumulator, in bits, that `fixedpoint.multiply_by_quantized_multiplier_wide` takes."""


@dataclass(frozen=True)
class Npu:
    """Options of the `npu` profile, a fixed-point machine that computes with integers only.

    >>> Npu(rounding="single", ties="even", accumulator_bits=24).overflow
    'error'

    Attributes:
      rounding: of FULLY_CONNECTED, BATCH_MATMUL, ADD, MUL and QUANTIZE. `double` rounds twice, as
        MBQM does; `single` rounds the whole product once. The other ops are tables, and SOFTMAX is
        LiteRT's fixed point.
      ties: of the last rounding. The first one of `double` always goes upwards, as in the high
        multiply of vector units.
      multiplier_bits: width of the multipliers of these five ops, without the sign.
      accumulator_bits: width of the accumulators of FULLY_CONNECTED and BATCH_MATMUL, 16 to 48;
        None: as in the file.
      overflow: `error` refuses a model whose accumulators are not proved to fit. `wrap` keeps the
        low bits. `saturate` clips after every product, in the order of the inner index; the bias
        comes first.
      table_entries: samples of LOGISTIC, GELU, RSQRT and SOFTMAX's exp over the range of codes,
        2^n + 1 with n from 5 to 16, interpolated linearly; None: LiteRT's own tables.

    Raises:
      UserError: a value is out of its range.
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
        """Returns the rules of this NPU."""
        plain = (self.rounding, self.ties, self.multiplier_bits) == ("double", "away", 31)
        # Special cases of `_chosen`: the same bits in fewer operations.
        narrow = _MBQM if plain else self._chosen
        wide = fixed(FixedScaleWide) if plain else self._chosen
        # `op_constants` takes the wide rules where an accumulator may have more than 32 bits.
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
            # A multiplier of 15 bits, held as the upper bits of a 31-bit one.
            rounded = np.minimum((multiplier.astype(np.int64) + 2**15) >> 16, 2**15 - 1)
            multiplier = (rounded << 16).astype(np.int32)
        return ChosenScale(multiplier, shift, self.rounding, self.ties)


PROFILES: dict[ProfileName, Rules] = {
    "litert_ref": _REF,
    "litert_opt": _OPT,
    "litert_xnn": replace(_OPT, xnnpack=True),
    "npu": Npu().rules(),
}
"""Rules of each profile by name:

litert_ref: LiteRT's reference kernels on x86 (OpResolverType BUILTIN_REF), bit for bit.
litert_opt: its optimized kernels (BUILTIN_WITHOUT_DEFAULT_DELEGATES), bit for bit.
litert_xnn: the default of an application (BUILTIN), bit for bit: XNNPACK where it takes the op,
  the optimized kernels elsewhere.
npu: `Npu` with its defaults.
"""

Profile = ProfileName | Npu
"""A profile by name, or an NPU's options."""


def rules_of(profile: Profile) -> Rules:
    """Returns the rules of a profile.

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
    """Multiplies an accumulator by a real factor and rounds: round(acc r), by the scale's type.

    Args:
      acc: int32 for `FixedScale`, `SingleScale` and `FloatScale`; int64 for `FixedScaleWide`;
        either for the others. Channels are the last axis.
      scale: its arrays have shape () or (channels,).

    Returns:
      int32 of acc's shape, to which the output's zero point is still to be added.
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
    """Adds axes in front of a per-channel array, up to the rank of `acc`; a scalar stays one."""
    leaf = jnp.asarray(leaf)
    return leaf.reshape((1,) * (acc.ndim - leaf.ndim) + leaf.shape) if leaf.ndim else leaf
