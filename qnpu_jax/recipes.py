"""What is done to a model: a `Recipe` (bits, rotation, initialization, stages of learning) and an
`Effort` (how much of it). Frozen dataclasses that read and write JSON; nothing here computes.

Ours and the published methods differ in nothing but these values: no method has code of its own.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from qnpu_jax.config import BitPlan, bit_plan
from qnpu_jax.errors import UserError

T = TypeVar("T")

Ranges = Literal["minmax", "sigma", "sigma-rotated", "mse", "class"]
GROUPS = (
    "rotation",
    "diagonal",
    "rotated",
    "unrotated",
    "weights",
    "biases",
    "prefix",
    "rounding",
)
"""What a stage can learn: R1 and R2; the mergeable diagonal scales; scale and zero point of rotated
and of all other activations; the weights' scales; biases; the prefix's keys and values; the
rounding offset of each weight (codes)."""


def _within(low: int | float, high: int | float, default: int | float) -> Any:
    """A number from `low` to `high`."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Stage:
    """Calibrate, round, learn: each part optional, in this order.

    Attributes:
      learn: (group, peak learning rate): the groups of GROUPS that learn, none for no learning.
        Rates are relative changes of scales and ranges, half-angles of rotations; that of rounding
        is how far an offset can get in the whole stage (codes).
      share: of the effort's steps.
      quantized: what is quantized meanwhile: `all`, or weights and `rotated` activations only.
      calibrate: set the ranges of `unrotated` or `all` activations by `ranges` first, everything
        learned so far active.
      ranges: as `Recipe.activation_init`.
      gptq: round weights by GPTQ first.
      loss: `kl` to the float teacher, `ce` of the next token, or `hidden` (mean squared error of
        every layer's residual stream, relative to its square).
      top_k: KL over the teacher's k likeliest tokens, renormalised; 0 takes all.
      hidden_mse: weight of the hidden loss, added to `kl` or `ce`.
      warmup: share of the stage's steps in which the local errors of all quantizers are added.
      optimizer: of everything but rotations and rounding offsets (sign descent).
      rotation_optimizer: `adam` on A of R = R0 cayley(A), or `cayley_sgd` on the Stiefel manifold.
      masked: clipped activations pass no gradient (LSQ) or all of it (Quant.npu).
    """

    learn: tuple[tuple[str, float], ...] = ()
    share: float = _within(0, 1, 1.0)
    quantized: Literal["all", "rotated"] = "all"
    calibrate: Literal["none", "unrotated", "all"] = "none"
    ranges: Ranges = "minmax"
    gptq: bool = False
    loss: Literal["kl", "ce", "hidden"] = "kl"
    top_k: int = _within(0, 2**31 - 1, 0)
    hidden_mse: float = _within(0, 1e6, 0.0)
    warmup: float = _within(0, 1, 0.0)
    optimizer: Literal["adam", "sgd"] = "adam"
    rotation_optimizer: Literal["adam", "cayley_sgd"] = "adam"
    masked: bool = True

    def rate(self, group: str) -> float:
        """Learning rate of a group, 0 where it does not learn."""
        return dict(self.learn).get(group, 0.0)


@dataclass(frozen=True)
class Recipe:
    """All settings of one quantization run but its effort.

    Attributes:
      bits: bits of every tensor.
      rotation: `hadamard` merges random Hadamard R1 and R2 into the weights, `none` leaves them.
      prefix: `auto` searches outlier tokens and puts their K/V in the graph, `none` does not.
      max_prefix: the longest prefix the search may choose (tokens, BOS included).
      smooth: alpha of SmoothQuant's diagonal scales (up->down, v->o, q/k); 0 for none.
      activation_init: range of 8-bit activations: `minmax`, `sigma` (mean +- 3 sigma),
        `sigma-rotated` (sigma where rotated, min-max elsewhere: Quant.npu's), `mse`, or `class` (by
        tensor class, see `qnpu_jax.calibrate.ranges`). 16-bit tensors always take min-max.
      weight_init: per-channel range of weights: `minmax`, `sigma` or `mse`.
      calibration_tokens: tokens of calibration text used.
      calibration_length: tokens per calibration window, prefix not counted.
      seed: rotation signs, sampling of the default calibration text, order of the learning text.
      stages: what follows calibration.
    """

    name: str
    bits: BitPlan
    rotation: Literal["hadamard", "none"] = "hadamard"
    prefix: Literal["auto", "none"] = "auto"
    max_prefix: int = _within(1, 2**31 - 1, 6)
    smooth: float = _within(0, 1, 0.0)
    activation_init: Ranges = "class"
    weight_init: Literal["minmax", "sigma", "mse"] = "mse"
    calibration_tokens: int = _within(1, 2**31 - 1, 8192)
    calibration_length: int = _within(8, 2**31 - 1, 256)
    seed: int = _within(0, 2**32 - 1, 0)  # what a key of jax.random holds
    stages: tuple[Stage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bits": [list(r) for r in self.bits.rules]}

    @staticmethod
    def from_json(data: dict[str, Any], source: str = "recipe") -> Recipe:
        """Reads a recipe.

        Raises:
          UserError: an unknown key, a missing one or a value out of range.
        """
        recipe = _read(Recipe, data, source)
        for i, stage in enumerate(recipe.stages):
            named = [group for group, _ in stage.learn]
            for group in named:
                if group not in GROUPS:
                    raise UserError(
                        f"{source}: stages[{i}]: learn must name groups of {list(GROUPS)}; got"
                        f" {group!r}; correct it"
                    )
                if named.count(group) > 1:
                    raise UserError(
                        f"{source}: stages[{i}]: learn names {group!r} twice; correct it"
                    )
        return recipe


@dataclass(frozen=True)
class Effort:
    """How much is learned.

    Attributes:
      steps: of all stages together; 0 learns nothing (stages still calibrate and round).
      batch, length: sequences of a step, and tokens of each.
      accumulate: parts that a step's batch is cut into, one after the other, to save memory.
      tokens: of learning text, at most; passed over again when used up.
      held_out: sequences of the held-out text whose KL decides which step is kept.
      patience: evaluations without a better held-out KL before a stage ends; many, because the gain
        of a cosine schedule comes near its end.
      without: groups that do not learn at this effort.
      precision: of matrix products: `highest` (float32), `default` (TF32 on a GPU), `bfloat16`.
      teacher_bytes: of host memory, at most, in which the teacher's `top_k` likeliest tokens are
        kept (8 bytes each) and not recomputed at every step; 0 recomputes them. Of stages with loss
        `kl`, a `top_k` and no `hidden_mse`: the others need more of the teacher.
    """

    name: str
    steps: int
    batch: int = 1
    length: int = 256
    accumulate: int = 1
    tokens: int = 0
    held_out: int = 0
    patience: int = 8
    without: tuple[str, ...] = ()
    precision: Literal["highest", "default", "bfloat16"] = "highest"
    teacher_bytes: int = 0


EFFORTS = {
    "none": Effort("none", steps=0),
    "fast": Effort(
        "fast", 60, batch=2, length=256, tokens=16_384, held_out=4, without=("rotation", "rounding")
    ),
    "full": Effort(
        "full", steps=500, batch=8, length=512, tokens=500_000, held_out=16, precision="default"
    ),
}
"""By name: none; fast, for two CPU cores; full, for a GPU."""


def _read(kind: type[T], data: Any, source: str) -> T:
    """A dataclass of this file from JSON, every key and value checked."""
    if not isinstance(data, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(data).__name__}; correct it")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(
                f"{source}: unknown key {key!r}; expected one of {sorted(fields)}; remove or"
                " correct it"
            )
    for key, f in fields.items():
        if key not in data and f.default is dataclasses.MISSING:
            raise UserError(
                f"{source}: key {key!r} is missing; add it (see `qnpu recipe w8a8` for an example)"
            )
    hints = typing.get_type_hints(kind)
    return kind(**{k: _value(hints[k], fields[k].metadata, v, source, k) for k, v in data.items()})


def _value(hint: Any, limits: types.MappingProxyType, value: Any, source: str, key: str) -> Any:
    """One value of the type that the field declares, within its limits."""

    def refuse(expected: str) -> UserError:
        return UserError(f"{source}: {key} must be {expected}; got {value!r}; correct it")

    if hint is BitPlan:
        return _plan(value, source)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if not isinstance(value, str) or value not in choices:
            raise refuse(f"one of {list(choices)}")
        return value
    if hint == tuple[Stage, ...]:
        if not isinstance(value, list | tuple):
            raise refuse("a list of stages")
        return tuple(_read(Stage, s, f"{source}: stages[{i}]") for i, s in enumerate(value))
    if hint == tuple[tuple[str, float], ...]:
        ok = isinstance(value, list | tuple) and all(
            isinstance(r, list | tuple) and len(r) == 2 and isinstance(r[0], str) and _real(r[1])
            for r in value
        )
        if not ok:
            raise refuse("a list of [group, learning rate above 0]")
        return tuple((str(g), float(r)) for g, r in value)
    if hint is str or hint is bool:
        if not isinstance(value, hint):
            raise refuse("a string" if hint is str else "true or false")
        return value
    whole = hint is int
    low, high = limits["low"], limits["high"]
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise refuse(f"{'an integer' if whole else 'a number'} from {low} to {high}")
    return value if whole else float(value)


def _real(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < float("inf")


def _plan(rules: Any, source: str) -> BitPlan:
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


_SCALES = (("rotated", 0.01), ("unrotated", 0.01), ("weights", 0.005))
_TOGETHER = Stage(
    learn=(
        ("rotation", 0.002),
        *_SCALES,
        ("biases", 3e-4),
        ("diagonal", 0.002),
        ("prefix", 3e-4),
    )
)
_ROUNDING = Stage(
    learn=(
        ("rounding", 0.15),
        ("rotated", 0.003),
        ("unrotated", 0.003),
        ("weights", 0.001),
        ("biases", 3e-4),
    ),
    share=0.5,
    gptq=True,
)


def _ours(weights: int, activations: int, scores: int = 16, stream: int = 16) -> Recipe:
    """Everything at once; then, at 4 bits, which way each weight rounds: GPTQ, then by gradient.

    With 8-bit weights and 16-bit activations nothing learns: calibrated, the model is as good as
    float, and every step made it worse (benchmarks/README.md).
    """
    stages: tuple[Stage, ...] = (_TOGETHER,)
    if weights < 8:
        stages = (dataclasses.replace(_TOGETHER, share=0.5), _ROUNDING)
    elif activations > 8:
        stages = ()
    suffix = "i8" if stream == 8 else "s8" if scores == 8 else ""
    plan = bit_plan(weights, activations, scores, stream)
    return Recipe(name=f"w{weights}a{activations}{suffix}", bits=plan, stages=stages)


_PLAIN: dict[str, Any] = {"rotation": "none", "prefix": "none", "activation_init": "minmax"}
METHODS: dict[str, dict[str, Any]] = {
    "rtn-minmax": {**_PLAIN, "weight_init": "minmax"},
    "smoothquant": {**_PLAIN, "weight_init": "minmax", "smooth": 0.5},
    "quarot": {"prefix": "none", "activation_init": "minmax"},
    "spinquant": {
        "prefix": "none",
        "activation_init": "minmax",
        "stages": (
            Stage(learn=(("rotation", 0.15),), loss="ce", rotation_optimizer="cayley_sgd"),
            Stage(calibrate="all"),
        ),
    },
    "prefixquant": {},
    "mobilequant": {
        **_PLAIN,
        "stages": (Stage(learn=(*_SCALES, ("diagonal", 0.002)), loss="hidden"),),
    },
    "quant-npu": {
        "prefix": "none",
        "activation_init": "sigma-rotated",
        "weight_init": "sigma",
        "stages": (
            Stage(
                learn=(("rotation", 0.1), ("rotated", 0.01), ("weights", 0.005)),
                quantized="rotated",
                loss="ce",
                warmup=0.25,
                rotation_optimizer="cayley_sgd",
            ),
            Stage(calibrate="unrotated"),
        ),
    },
}
"""What published methods do, in our static graph with every tensor quantized. `smoothquant` and
`mobilequant` have the diagonal scales that merge into this graph (up->down, v->o, q/k): its norms
have no gamma that could take those of their outputs. `spinquant` learns with everything quantized,
where its authors quantize dynamically; Cayley-SGD at their rate of 1.5 does worse here than at
0.15. `quant-npu` is arXiv 2605.20295 with Adam and masked gradients, the best of eight settings
tried: SGD at its rate of 0.01 and unmasked gradients diverge here (benchmarks/README.md)."""

RECIPES: dict[str, Recipe] = {f"w{w}a{a}": _ours(w, a) for w in (8, 4) for a in (8, 16)}
RECIPES |= {r.name: r for w in (8, 4) for r in (_ours(w, 8, 8), _ours(w, 8, 8, 8))}
RECIPES |= {
    f"{method}-{bits}": Recipe(name=f"{method}-{bits}", bits=ours.bits, **settings)
    for method, settings in METHODS.items()
    for bits, ours in RECIPES.items()
}


def load_recipe(name: str) -> Recipe:
    """A named recipe (`w8a8`, `w4a8`, `w8a16`, `w4a16`, `w8a8s8`, `w4a8s8`, or one of METHODS as in
    `quarot-w4a8`) or a JSON file of one's own."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if not path.is_file():
        ours = [n for n in RECIPES if "-" not in n]
        raise UserError(
            f"{name}: no such recipe; expected one of {ours}, one of {[*METHODS]} before any of"
            " these (quarot-w4a8), or a JSON file that exists"
        )
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error}); correct the file") from None
    if not isinstance(data, dict):
        raise UserError(f"{name}: expected a JSON object of recipe keys, got {type(data).__name__}")
    return Recipe.from_json(data, name)
