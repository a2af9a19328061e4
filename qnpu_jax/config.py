"""Everything a run is configured by: frozen dataclasses that read and write JSON.

Nothing here computes. A model is a `ModelConfig`, a quantization is a `Recipe` (which holds a
`BitPlan`), and both travel beside the files they produced.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal


class UserError(Exception):
    """A mistake of the caller: the message names the file or tensor, expected, got, and the way
    out.

    The command line prints it as one line and exits with status 2.
    """


@dataclass(frozen=True)
class RopeScaling:
    """RoPE frequency scaling. `linear` divides every frequency by `factor`; `llama3` only the low
    ones.

    Reference: transformers/modeling_rope_utils.py, `_compute_llama3_parameters`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder LLM (Llama family)."""

    family: Literal["llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelConfig:
        scaling = data.get("rope_scaling")
        return ModelConfig(**{**data, "rope_scaling": RopeScaling(**scaling) if scaling else None})


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized: what is known before any value is seen.

    `bits` has one entry, or one per layer for tensors of the layer graph. `symmetric` fixes the
    zero point at 0. `axis` is the channel axis of per-channel scales, None for one scale per
    tensor. 16-bit tensors are always
    symmetric: int16 kernels take no zero point.
    """

    bits: tuple[int, ...]
    symmetric: bool = False
    axis: int | None = None


@dataclass(frozen=True)
class BitPlan:
    """Bits of every tensor: the first rule whose pattern matches the tensor's name decides.

    Names are `embed.*`, `layers.<i>.*`, `head.*`; patterns are shell-style. A rule that matches no
    tensor is an error (`check_used`): a misspelt pattern must not silently leave a tensor at the
    default.
    """

    rules: tuple[tuple[str, int], ...]

    def match(self, name: str) -> int | None:
        """Index of the first rule that matches `name`, None if none does."""
        return next((i for i, (p, _) in enumerate(self.rules) if fnmatchcase(name, p)), None)

    def bits(self, name: str) -> int:
        index = self.match(name)
        if index is None:
            raise UserError(
                f"{name}: no rule of the bit plan matches; expected one, got"
                f" {[p for p, _ in self.rules]};"
                ' end the plan with a rule ["*", 8]'
            )
        return self.rules[index][1]

    def check_used(self, names: list[str]) -> None:
        used = {self.match(n) for n in names}
        for i, (pattern, bits) in enumerate(self.rules):
            if i not in used:
                raise UserError(
                    f"bit plan rule {pattern!r}: {bits}: matches no tensor that an earlier rule"
                    " has not taken;"
                    " remove it or correct the pattern (`qnpu graph` prints every name)"
                )


def bit_plan(weights: int, activations: int) -> BitPlan:
    """The plan behind the named recipes: w<weights>a<activations>.

    8-bit activations except the residual stream, norm internals, RoPE and scores (16); KV cache,
    embedding and head weights always 8. With 16-bit activations FULLY_CONNECTED accumulates in 64
    bits, because 32 can overflow.
    """
    sixteen = ["*.residual", "*.norm.*", "*.rope.*", "*.scores", "*.masked", "*.softmax"]
    rules: list[tuple[str, int]] = [
        ("embed.weight", 8),
        ("head.weight", 8),
        ("*.weight", weights),
        ("*.bias", 32 if activations == 8 else 64),
        ("*.k_cache", 8),
        ("*.v_cache", 8),
    ]
    if activations == 8:
        rules += [(p, 16) for p in sixteen]
    return BitPlan((*rules, ("*", activations)))


@dataclass(frozen=True)
class Recipe:
    """All settings of one quantization run.

    Attributes:
      bits: bits of every tensor.
      rotation: `hadamard` merges random Hadamard R1 and R2 into the weights, `none` leaves them.
      prefix: `auto` searches outlier tokens and puts their K/V in the graph, `none` does not.
      max_prefix: the longest prefix the search may choose (tokens, BOS included).
      activation_init: range of 8-bit activations: `minmax`, `sigma` (mean +- 3 sigma), `mse`, or
        `class` (by tensor class, see `qnpu_jax.calibrate`). 16-bit tensors always take min-max.
      weight_init: per-channel range of weights: `minmax`, `sigma` or `mse`.
      calibration_tokens: tokens of calibration text used.
      calibration_length: tokens per calibration window, prefix not counted.
      seed: rotation signs, sampling of the default calibration text.
    """

    name: str
    bits: BitPlan
    rotation: Literal["hadamard", "none"] = "hadamard"
    prefix: Literal["auto", "none"] = "auto"
    max_prefix: int = 6
    activation_init: Literal["minmax", "sigma", "mse", "class"] = "class"
    weight_init: Literal["minmax", "sigma", "mse"] = "mse"
    calibration_tokens: int = 8192
    calibration_length: int = 256
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bits": [list(r) for r in self.bits.rules]}

    @staticmethod
    def from_json(data: dict[str, Any], source: str = "recipe") -> Recipe:
        """Reads a recipe; raises UserError on an unknown key, a missing one or a value out of
        range."""
        known = {f.name for f in dataclasses.fields(Recipe)}
        for key in data:
            if key not in known:
                raise UserError(
                    f"{source}: unknown key {key!r}; expected one of {sorted(known)}; remove or"
                    " correct it"
                )
        for key in ("name", "bits"):
            if key not in data:
                raise UserError(
                    f"{source}: key {key!r} is missing; add it (see `qnpu recipe w8a8` for an"
                    " example)"
                )
        _check_values(data, source)
        return Recipe(**{**data, "bits": _plan_from_json(data["bits"], source)})


def _plan_from_json(rules: Any, source: str) -> BitPlan:
    ok = isinstance(rules, list) and all(
        isinstance(r, list)
        and len(r) == 2
        and isinstance(r[0], str)
        and r[1] in (2, 4, 8, 16, 32, 64)
        for r in rules
    )
    if not ok:
        raise UserError(
            f'{source}: key "bits" must be a list of [pattern, bits] with bits in 2, 4, 8, 16,'
            f" 32, 64; got {rules!r}; correct it"
        )
    return BitPlan(tuple((str(p), int(b)) for p, b in rules))


_CHOICES: dict[str, tuple[Any, ...]] = {
    "rotation": ("hadamard", "none"),
    "prefix": ("auto", "none"),
    "activation_init": ("minmax", "sigma", "mse", "class"),
    "weight_init": ("minmax", "sigma", "mse"),
}
_RANGES = {
    "max_prefix": (1, 2**31),
    "calibration_tokens": (1, 2**31),
    "calibration_length": (8, 2**31),
    "seed": (0, 2**32),  # what a key of jax.random holds
}
"""Least value, and one more than the largest."""


def _check_values(data: dict[str, Any], source: str) -> None:
    if not isinstance(data["name"], str):
        raise UserError(f"{source}: name must be a string; got {data['name']!r}; correct it")
    for key, choices in _CHOICES.items():
        if key in data and data[key] not in choices:
            raise UserError(
                f"{source}: {key} must be one of {list(choices)}; got {data[key]!r}; correct it"
            )
    for key, (low, end) in _RANGES.items():
        got = data.get(key, low)
        if not isinstance(got, int) or isinstance(got, bool) or not low <= got < end:
            raise UserError(
                f"{source}: {key} must be an integer from {low} to {end - 1}; got {got!r};"
                " correct it"
            )


RECIPES: dict[str, Recipe] = {
    f"w{w}a{a}": Recipe(name=f"w{w}a{a}", bits=bit_plan(w, a)) for w in (8, 4) for a in (8, 16)
}


def load_recipe(name: str) -> Recipe:
    """A named recipe (`w8a8`, `w4a8`, `w8a16`, `w4a16`) or a JSON file of one's own."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"{name}: no such recipe; expected one of {sorted(RECIPES)} or a JSON file that exists"
        )
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error}); correct the file") from None
    if not isinstance(data, dict):
        raise UserError(f"{name}: expected a JSON object of recipe keys, got {type(data).__name__}")
    return Recipe.from_json(data, source=name)
