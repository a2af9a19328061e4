"""What is done to a model: a `Recipe` (bits, rotation, initialization, stages of learning) and an
`Effort` (how much of it). Frozen dataclasses that read and write JSON; nothing here computes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.recipes.fields import LARGEST, check, chosen, read, within

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


@dataclass(frozen=True)
class Stage:
    """Calibrate, round, learn: each part optional, in this order.

    Attributes:
      learn: (group, peak learning rate): the groups of GROUPS that learn, none for no learning.
        Rates are relative changes of scales and ranges, half-angles of rotations; that of rounding
        is how far an offset can get in the whole stage by sign descent, and by Adam its change in
        a step (codes).
      share: of the effort's steps.
      quantized: what is quantized meanwhile: `all`, or weights and `rotated` activations only.
      calibrate: set the ranges of `unrotated` or `all` activations by `ranges` first, everything
        learned so far active.
      ranges: as `Recipe.activation_init`.
      gptq: round weights by GPTQ first.
      gptaq: how far GPTQ's target moves from the outputs of the weights on the quantized model's
        inputs (0, GPTQ) to the float model's outputs (1, GPTAQ); 1 lost where it was measured
        (SmolLM2-135M, 8,192 tokens), 0.25 gained 6% of the KL before learning.
      gptq_tokens: of calibration text that GPTQ reads, those that set the ranges first, or as many
        as there are: a weight per input takes more of them to fit than a range does.
      damping: lambda of GPTQ's H = E[x x^T] + lambda I, as a fraction of the mean of H's diagonal.
      loss: `kl` to the float teacher, `ce` of the next token, or `hidden` (mean squared error of
        every layer's residual stream, relative to its square).
      top_k: KL over the teacher's k likeliest tokens, renormalised; 0 takes all.
      hidden_mse: weight of the hidden loss, added to `kl` or `ce`.
      warmup: share of the stage's steps in which the local errors of all quantizers are added.
      optimizer: of everything but rotations and rounding offsets.
      rounding_optimizer: `sign` descent, which decides which way a weight rounds and ends half a
        code from where it began, or `adam`, which may move a weight by any number of codes.
      rotation_optimizer: `adam` on A of R = R0 cayley(A), or `cayley_sgd` on the Stiefel manifold.
      masked: clipped activations pass no gradient (LSQ) or all of it (Quant.npu).

    Raises:
      UserError: a value of another type or outside its range, an unknown or repeated group.

    Example:
      >>> Stage(learn=(("rotated", 0.01), ("weights", 0.005))).rate("weights")
      0.005
    """

    learn: tuple[tuple[str, float], ...] = chosen(GROUPS)
    share: float = within(0, 1, 1.0)
    quantized: Literal["all", "rotated"] = "all"
    calibrate: Literal["none", "unrotated", "all"] = "none"
    ranges: Ranges = "minmax"
    gptq: bool = False
    gptaq: float = within(0, 1, 0.0)
    gptq_tokens: int = within(1, LARGEST, 32_768)
    damping: float = within(1e-6, 1e3, 0.05)
    loss: Literal["kl", "ce", "hidden"] = "kl"
    top_k: int = within(0, LARGEST, 0)
    hidden_mse: float = within(0, 1e6, 0.0)
    warmup: float = within(0, 1, 0.0)
    optimizer: Literal["adam", "sgd"] = "adam"
    rounding_optimizer: Literal["sign", "adam"] = "sign"
    rotation_optimizer: Literal["adam", "cayley_sgd"] = "adam"
    masked: bool = True

    def __post_init__(self) -> None:
        check(self)

    def rate(self, group: str) -> float:
        """Learning rate of a group, 0 where it does not learn."""
        return dict(self.learn).get(group, 0.0)


LEAST_LIMIT = 0.0625
"""Least `Recipe.peak_limit`: at half the 99th percentile a tenth of the channels are scaled, and
more is lost than won. Weights take the factors' inverses, which would overflow without a limit."""


@dataclass(frozen=True)
class Recipe:
    """All settings of one quantization run but its effort.

    Attributes:
      bits: bits of every tensor.
      rotation: `hadamard` merges random Hadamard R1 and R2 into the weights, `none` leaves them.
      prefix: `auto` searches tokens that tame outliers and leave the output alone, and puts their
        K/V in the graph; `none` leaves the model's own BOS there, if it has one.
      max_prefix: the longest prefix the search may choose (tokens).
      centre_keys: take a constant vector per layer and KV head from all keys
        (`transform.key_centring`).
      double_norms: take norms of the residual stream twice where its tokens differ much in length
        (`transform.double_norms`).
      smooth: alpha of SmoothQuant's diagonal scales (up->down, v->o, q/k); 0 for none.
      smooth_stream: alpha of those of what blocks read and make where R1 cannot rotate it (Gemma:
        gamma -> linears; o and down, whose rows take any factor); 0 for none.
      peak_limit: channels of `down`'s input whose peak is above this many times the 99th percentile
        of their layer's peaks are scaled down to it (`transform.limit_peaks`) where that input has
        8 bits; 0 for none, else at least LEAST_LIMIT.
      split_channels: channels by which the MLP of every layer grows: copies of those that reach
        furthest, each with its share (`transform.channel_splitting`); 0 for none.
      activation_init: range of 8-bit activations: `minmax`, `sigma` (mean +- 3 sigma),
        `sigma-rotated` (sigma where rotated, min-max elsewhere: Quant.npu's), `mse`, or `class` (by
        tensor class, see `qnpu_jax.calibrate.ranges`). 16-bit tensors always take min-max.
      weight_init: per-channel range of weights: `minmax`, `sigma` or `mse`.
      calibration_tokens: tokens of calibration text used.
      calibration_length: tokens per calibration window, prefix not counted.
      calibration_pool: tokens of text from whose windows those of calibration are chosen
        (`calibrate.coverage`); 0 takes the first `calibration_tokens`. Not smaller than those.
      seed: rotation signs, sampling of the default calibration text, order of the learning text.
      stages: what follows calibration.

    Raises:
      UserError: a value of another type or outside its range.

    Example:
      >>> import dataclasses
      >>> from qnpu_jax import RECIPES
      >>> unrotated = dataclasses.replace(RECIPES["w8a8"], name="mine", rotation="none")
      >>> unrotated.rotation, unrotated.bits == RECIPES["w8a8"].bits
      ('none', True)
    """

    name: str
    bits: BitPlan
    rotation: Literal["hadamard", "none"] = "hadamard"
    prefix: Literal["auto", "none"] = "auto"
    max_prefix: int = within(1, LARGEST, 6)
    centre_keys: bool = True
    double_norms: bool = True
    smooth: float = within(0, 1, 0.0)
    smooth_stream: float = within(0, 1, 0.5)
    peak_limit: float = within(0, 1e6, 0.0)
    split_channels: int = within(0, 2**16, 0)
    activation_init: Ranges = "class"
    weight_init: Literal["minmax", "sigma", "mse"] = "mse"
    calibration_tokens: int = within(1, LARGEST, 8192)
    calibration_length: int = within(8, LARGEST, 256)
    calibration_pool: int = within(0, LARGEST, 0)
    seed: int = within(0, 2**32 - 1, 0)  # what a key of jax.random holds
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.peak_limit < LEAST_LIMIT:
            raise UserError(
                f"peak_limit: {self.peak_limit} times the 99th percentile; expected 0, or at least"
                f" {LEAST_LIMIT}: less would scale every channel; raise it"
            )
        if 0 < self.calibration_pool < self.calibration_tokens:
            raise UserError(
                f"calibration_pool: {self.calibration_pool} tokens; expected 0, or at"
                f" least calibration_tokens, {self.calibration_tokens}; raise it"
            )

    def pool_tokens(self) -> int:
        """Returns the tokens of calibration text that coverage chooses from or GPTQ reads, where
        they are more than set the ranges; else 0.

        >>> from qnpu_jax import RECIPES
        >>> RECIPES["w8a8"].pool_tokens(), RECIPES["w4a8"].pool_tokens()
        (0, 32768)
        """
        rounding = (stage.gptq_tokens for stage in self.stages if stage.gptq)
        most = max(self.calibration_pool, *rounding, 0)
        return most if most > self.calibration_tokens else 0

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON values: what `from_json` reads."""
        return {**dataclasses.asdict(self), "bits": [list(r) for r in self.bits.rules]}

    @staticmethod
    def from_json(data: dict[str, Any], source: str = "recipe") -> Recipe:
        """Reads a recipe.

        Args:
          source: the file, for messages.

        Raises:
          UserError: an unknown key, a missing one or a value out of range.
        """
        return read(Recipe, data, source)


@dataclass(frozen=True)
class Effort:
    """How much is learned.

    Attributes:
      steps: of all stages together; 0 learns nothing (stages still calibrate and round).
      batch, length: sequences of a step, and tokens of each.
      accumulate: parts that a step's batch is cut into, one after the other, to save memory.
      tokens: of learning text, at most; passed over again when used up.
      own_tokens: that the model writes itself to learn from, where no text is given; at most
        `tokens`.
      held_out: sequences of each held-out text whose KL decides which step is kept.
      patience: evaluations without a better held-out KL before a stage ends; many, because the gain
        of a cosine schedule comes near its end.
      without: groups that do not learn at this effort.
      precision: of matrix products: `highest` (float32), `default` (TF32 on a GPU), or `bfloat16`
        operands with float32 sums (on a GPU), in steps alone: they are judged by `default`.
      teacher_bytes: of host memory, at most, in which the teacher's `top_k` likeliest tokens are
        kept (8 bytes each) and not recomputed at every step; 0 recomputes them. Of stages with loss
        `kl`, a `top_k` and no `hidden_mse`: the others need more of the teacher.

    Raises:
      UserError: a value of another type or outside its range, an unknown group.

    Example:
      >>> Effort("short", steps=4, length=64, tokens=512, held_out=2).batch
      1
    """

    name: str
    steps: int = within(0, LARGEST)
    batch: int = within(1, LARGEST, 1)
    length: int = within(2, LARGEST, 256)
    accumulate: int = within(1, LARGEST, 1)
    tokens: int = within(0, LARGEST, 0)
    own_tokens: int = within(0, LARGEST, 65_536)
    held_out: int = within(0, LARGEST, 0)
    patience: int = within(1, LARGEST, 8)
    without: tuple[str, ...] = chosen(GROUPS)
    precision: Literal["highest", "default", "bfloat16"] = "highest"
    teacher_bytes: int = within(0, 2**63 - 1, 0)

    def __post_init__(self) -> None:
        check(self)


EFFORTS = {
    "none": Effort("none", steps=0),
    "fast": Effort(
        "fast", 60, batch=2, length=256, tokens=16_384, held_out=4, without=("rotation", "rounding")
    ),
    "full": Effort(
        "full",
        steps=600,
        batch=16,
        length=512,
        tokens=5_000_000,
        own_tokens=1_048_576,
        held_out=16,
        precision="bfloat16",
    ),
    "best": Effort(
        "best",
        steps=2300,
        batch=32,
        length=512,
        tokens=40_000_000,
        own_tokens=6_000_000,
        held_out=16,
        precision="bfloat16",
    ),
}
"""By name: none; fast, for two CPU cores; full, for minutes of a GPU; best, for a quarter of an
hour of it and more."""
