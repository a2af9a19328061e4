"""RoPE scaling of GGUF files, as llama.cpp computes it.

The angle of pair i at position t is t theta^(-2i/K) / (factor divisor_i), cos and sin are
multiplied by attn_factor; with `yarn` the division by `factor` is blended in by frequency.

Reference: llama.cpp src/llama-model.cpp (keys), src/llama-context.cpp (which one counts),
ggml/src/ggml-cpu/ops.cpp, `rope_yarn`.
"""

from __future__ import annotations

import math

import numpy as np

from qnpu_jax.config import RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.models.fields import Fields, is_real
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.gguf_tensors import read_tensor
from qnpu_jax.models.rope_factors import llama3_from_factors
from qnpu_jax.models.rope_scaling import YARN_BETAS, yarn_attention_factor

FREQS = "rope_freqs.weight"
"""Tensor of divisors of the frequencies, in place of llama3 scaling's own parameters."""
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
"""Tensors of longrope's divisors, for the original context and for more."""
ROPE_TENSORS = (FREQS, SHORT, LONG)
KIND, FACTOR, ATTENTION = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"
ORIGINAL = "rope.scaling.original_context_length"
YARN = "rope.scaling.yarn_"


def rope_scaling(
    file: GgufFile, meta: Fields, rotated: int, theta: float, context: int | None
) -> RopeScaling | None:
    """Reads the scaling of a file.

    Args:
      rotated: channels of a head that rotate.
      context: tokens that the model must hold; None for the original context.

    Raises:
      UserError: parameters that contradict each other, or that readers of GGUF take differently.
    """
    kind = meta.get(KIND, "linear")  # as in llama.cpp, if the file does not say
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise meta.bad(KIND, "'none', 'linear', 'yarn' or 'longrope'")
    # Files from before 2023-10 have scale_linear alone. 0 means none.
    key = FACTOR if FACTOR in meta else "rope.scale_linear"
    factor = meta.real(key) if meta.get(key) and kind != "none" else 1.0
    attention = meta.real(ATTENTION, 1.0)
    divisors = _divisors(file, meta, rotated, context)
    if _extrapolates(meta, kind):
        if divisors or FREQS in file.tensors:
            raise meta.bad(KIND, "without YaRN beside tensors of RoPE factors")
        return _yarn(meta, factor, attention)
    if meta.get(f"{YARN}attn_factor", 1.0) != 1.0:
        raise meta.bad(f"{YARN}attn_factor", "1.0 without YaRN")
    if FREQS in file.tensors:
        if factor != 1.0 or attention != 1.0 or divisors:
            raise meta.bad(KIND, f"'none', and factors 1, beside {FREQS}")
        original = meta.count(ORIGINAL, 8192)
        return llama3_from_factors(
            read_tensor(file, FREQS), rotated, theta, original, file.path.name
        )
    if divisors or attention != 1.0:
        trained = meta.count("context_length")
        original = meta.count(ORIGINAL, trained)
        return RopeScaling(
            "longrope",
            trained / original,
            original_max_positions=original,
            attention_factor=attention,
            divisors=tuple(d * factor for d in divisors or (1.0,) * (rotated // 2)),
        )
    return RopeScaling("linear", factor) if factor != 1.0 else None


def _divisors(file: GgufFile, meta: Fields, rotated: int, context: int | None) -> tuple[float, ...]:
    """Reads longrope's divisors for this context; none where the file has none."""
    if not {SHORT, LONG} & file.tensors.keys():
        return ()
    original = meta.count(ORIGINAL, meta.count("context_length"))
    name = LONG if context and context > original else SHORT
    if name not in file.tensors:
        raise UserError(
            f"{meta.where}: tensor {name} is missing; expected both {SHORT} and {LONG};"
            f" {meta.way_out}"
        )
    factors = read_tensor(file, name)
    if factors.shape != (rotated // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise UserError(
            f"{meta.where}: tensor {name} (shape {list(factors.shape)}) must be {rotated // 2}"
            f" positive numbers; {meta.way_out}"
        )
    return tuple(float(str(f)) for f in factors)


def _extrapolates(meta: Fields, kind: str) -> bool:
    """Whether high frequencies stay as they are: yarn_ext_factor, below 0 for what `kind` says."""
    key = f"{YARN}ext_factor"
    mix = meta.get(key, -1.0)
    if not is_real(mix) or (mix > 0.0 and mix != 1.0):
        raise meta.bad(key, "-1, 0 or 1")
    return kind == "yarn" if mix < 0.0 else mix == 1.0


def _yarn(meta: Fields, factor: float, attention: float) -> RopeScaling:
    """Reads YaRN's parameters. llama.cpp has changed how it takes two of them."""
    default = yarn_attention_factor(factor)
    own = meta.real(f"{YARN}attn_factor", default)
    if not math.isclose(own, default, rel_tol=1e-5):
        raise meta.bad(f"{YARN}attn_factor", f"{default:.6g}, which every llama.cpp computes")
    if meta.get(f"{YARN}log_multiplier", 0.0):
        raise meta.bad(f"{YARN}log_multiplier", "0")
    fast, slow = (meta.real(f"{YARN}{k}", d) for k, d in YARN_BETAS.items())
    return RopeScaling(
        "yarn",
        factor,
        original_max_positions=meta.count(ORIGINAL, meta.count("context_length")),
        attention_factor=attention * default,
        beta_fast=fast,
        beta_slow=slow,
    )
