"""RoPE of config.json: frequencies' base and scaling, as transformers 5 reads them.

Reference: transformers/modeling_rope_utils.py, `RotaryEmbeddingConfigMixin` (which key wins) and
`_compute_*_parameters` (defaults).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qnpu_jax.config import LayerKind, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.models.fields import Fields

ORIGINAL = "original_max_position_embeddings"
POSITIONS = "max_position_embeddings"


def rope_parameters(config: Fields) -> Fields:
    """Finds the RoPE parameters: `rope_scaling` (transformers 4) if not empty, or those of 5.

    transformers 5 too lets `rope_scaling` win where a file has both.

    Raises:
      UserError: they are no object, or nested by layer type.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parameters = nested(config, found)
    if any(isinstance(value, Mapping) for value in parameters.data.values()):
        raise UserError(
            f"{config.where}: RoPE parameters differ by layer type, {sorted(parameters.data)};"
            " expected one set; use a model of another family"
        )
    return parameters


def nested(config: Fields, found: object) -> Fields:
    """Makes fields of an object in config.json that holds RoPE parameters, without its nulls.

    Raises:
      UserError: it is no object.
    """
    if not isinstance(found, Mapping):
        raise UserError(
            f"{config.where}: RoPE scaling must be an object; got {found!r}; correct it"
        )
    data = {key: value for key, value in found.items() if value is not None}
    return Fields(data, config.where, "RoPE scaling's ")


def layer_kind(config: Fields, rope: Fields, context: int | None) -> LayerKind:
    """Reads the kind of layers with full attention and these RoPE parameters.

    Args:
      config: with `rope_theta`, which counts where `rope` has none.
      context: tokens that the model must hold; None for what it was trained on.

    Raises:
      UserError: a value is missing or impossible, or the scaling is of another type.
    """
    theta = rope.real("rope_theta", config.real("rope_theta"))
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return LayerKind(theta)
        case "linear":
            return LayerKind(theta, RopeScaling("linear", rope.real("factor")))
        case "llama3":
            return LayerKind(theta, _llama3(config, rope))
        case "yarn":
            return LayerKind(theta, _yarn(config, rope))
        case "longrope":
            return LayerKind(theta, _longrope(config, rope, context))
        case kind:
            raise UserError(
                f"{config.where}: RoPE scaling {kind!r} is not supported; expected 'default',"
                " 'linear', 'llama3', 'yarn' or 'longrope'; use a model without it"
            )


def _original(config: Fields, rope: Fields) -> int:
    """Reads the original context. One beside the RoPE parameters wins over one among them."""
    if ORIGINAL in config:
        return config.count(ORIGINAL)
    return rope.count(ORIGINAL, config.count(POSITIONS))


def _llama3(config: Fields, rope: Fields) -> RopeScaling:
    low, high = rope.real("low_freq_factor"), rope.real("high_freq_factor")
    if low >= high:
        raise UserError(
            f"{config.where}: low_freq_factor must be below high_freq_factor;"
            f" got {low} and {high}; correct them"
        )
    return RopeScaling("llama3", rope.real("factor"), low, high, _original(config, rope))


def _yarn(config: Fields, rope: Fields) -> RopeScaling:
    original = _original(config, rope)
    factor = rope.real("factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        default = yarn_attention_factor(factor, rope.real("mscale"))
        default /= yarn_attention_factor(factor, rope.real("mscale_all_dim"))
    else:
        default = yarn_attention_factor(factor)
    fast, slow = (rope.real(k) if rope.get(k) else d for k, d in YARN_BETAS.items())
    return RopeScaling(
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=rope.real("attention_factor", default),
        beta_fast=fast,
        beta_slow=slow,
        truncate=rope.flag("truncate", True),
    )


YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Turns in the original context above which a frequency stays, and below which it is divided."""


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Computes 0.1 mscale ln(factor) + 1, YaRN's factor of cos and sin; 1 for factors up to 1."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(config: Fields, rope: Fields, context: int | None) -> RopeScaling:
    original = _original(config, rope)
    if original < 2:  # its logarithm divides
        raise UserError(f"{config.where}: {ORIGINAL} must be 2 or more; got 1; correct it")
    factor = rope.real("factor", config.count(POSITIONS) / original)
    default = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor,
        original_max_positions=original,
        attention_factor=rope.real("attention_factor", default),
        divisors=rope.reals("long_factor" if context and context > original else "short_factor"),
    )


def positions(where: str, trained: int, kinds: tuple[LayerKind, ...], context: int | None) -> int:
    """Gives the tokens that a model holds: `context`, or those for which its RoPE factors are.

    With longrope the original context is what its short factors were made for.

    Args:
      where: the file, for messages.
      trained: tokens that the file states.

    Raises:
      UserError: `context` is more.
    """
    if context is None:
        scalings = [k.rope_scaling for k in kinds if k.rope_scaling]
        short = [s.original_max_positions for s in scalings if s.kind == "longrope"]
        return min(trained, *short) if short else trained
    if not 1 <= context <= trained:
        raise UserError(
            f"{where}: context is {context}; expected 1 to {trained} tokens, which the model was"
            " made for; choose a smaller one"
        )
    return context
