"""Everything a run is configured by: frozen dataclasses that read and write JSON.

Nothing here computes. A model is a `ModelConfig`, the widths of its tensors are a `BitPlan`; both
travel beside the files they produced. What is done with them is a `qnpu_jax.recipes.Recipe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from qnpu_jax.errors import UserError, nearest
from qnpu_jax.width_ties import Ties


@dataclass(frozen=True)
class RopeScaling:
    """RoPE frequency scaling.

    `linear` divides every frequency by `factor`; `llama3` only the low ones; `yarn` blends between
    the two by how often a frequency turns in the original context; `longrope` divides frequency i
    by `divisors[i]`. The last two also multiply cos and sin by `attention_factor`.

    Reference: transformers/modeling_rope_utils.py, `_compute_llama3_parameters`,
    `_compute_yarn_parameters`, `_compute_longrope_parameters`.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerKind:
    """What attention layers of one kind have for themselves: values of shared inputs, never ops.

    Attributes:
      rope_theta: base of the rotary frequencies; None for layers without positions (NoPE).
      window: tokens that a token sees, itself included; None for all before it.
    """

    rope_theta: float | None = 10000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None

    @staticmethod
    def from_json(data: dict[str, Any]) -> LayerKind:
        scaling = data.get("rope_scaling")
        if scaling:
            scaling = RopeScaling(**{**scaling, "divisors": tuple(scaling.get("divisors", ()))})
        return LayerKind(**{**data, "rope_scaling": scaling or None})


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder LLM, in facts: what is computed, never whose model it is.

    Attributes:
      family: for people; nothing branches on it.
      kinds: distinct kinds of layers.
      kind_of_layer: index into `kinds` of each layer; empty where all are of the first.
      biases: linears of a layer that have one, of `attn.{q,k,v,o}` and `mlp.{gate,up,down}`.
      activation: of the gate.
      norms: where a block's RMS norms stand: `before` it (Llama), `after` it, before the residual
        sum (OLMo-2), or `both` (Gemma 3).
      qk_norm: RMS norm of queries and keys before RoPE: of each `head`, or over `all` heads.
      rotary_dim: channels of each head that rotate, the first ones; None for all.
      query_scale: factor of the scores; None for head_dim^-1/2.
      embed_scale, residual_scale, logits_scale: factors of the embeddings, of what a block adds to
        the residual stream, and of the logits.
      centred_keys: keys are stored less one constant vector per layer and KV head
        (`transform.key_centring`).
      double_norms: norms of the residual stream are taken twice, for tokens that differ so much in
        length that 16 bits cannot hold their squares (`graph.norms.rms_norm`).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    kind_of_layer: tuple[int, ...] = ()
    tie_embeddings: bool = False
    biases: tuple[str, ...] = ()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["head", "all"] | None = None
    rotary_dim: int | None = None
    query_scale: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    centred_keys: bool = False
    double_norms: bool = False

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """Index into `kinds` of every layer."""
        return self.kind_of_layer or (0,) * self.num_layers

    @property
    def rotated(self) -> int:
        """Channels of each head that RoPE rotates."""
        return self.rotary_dim or self.head_dim

    @property
    def late_biases(self) -> tuple[str, ...]:
        """Which of q and k have a bias that the graph adds at RoPE's width, not in the linear: all
        that have one, unless a norm stands between."""
        return tuple(x for x in "qk" if f"attn.{x}" in self.biases and self.qk_norm is None)

    @property
    def merges_r1(self) -> bool:
        """Whether a rotation of the residual stream merges into the weights: not where a norm's
        gamma stands between a block and the residual sum."""
        return self.norms == "before"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelConfig:
        kinds = tuple(LayerKind.from_json(kind) for kind in data["kinds"])
        tuples = {name: tuple(data[name]) for name in ("kind_of_layer", "biases")}
        return ModelConfig(**{**data, **tuples, "kinds": kinds})


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


WIDTHS = (2, 4, 8, 16, 32, 64)
"""Bits that a tensor can have."""
RULES = f"a list of [pattern, bits] with bits in {', '.join(map(str, WIDTHS))}"
"""What a bit plan is made of, in words."""


@dataclass(frozen=True)
class BitPlan:
    """Bits of every tensor: the first rule whose pattern matches the tensor's name decides.

    Names are `embed.*`, `layers.<i>.*`, `head.*`; patterns are shell-style. A rule that matches no
    tensor is an error (`check_used`): a misspelt pattern must not silently leave a tensor at the
    default.

    Attributes:
      rules: (pattern, bits) in order, bits one of WIDTHS; end with ("*", 8).

    Raises:
      UserError: anything else.

    Example:
      >>> plan = BitPlan((("layers.0.*", 16), ("*.weight", 4), ("*", 8)))
      >>> plan.bits("layers.0.attn.q.weight"), plan.bits("layers.1.attn.q.weight")
      (16, 4)
    """

    rules: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not are_rules(self.rules):
            raise UserError(f"BitPlan: rules must be {RULES}; got {wrong(self.rules)}; correct it")
        object.__setattr__(self, "rules", tuple((pattern, bits) for pattern, bits in self.rules))

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

    def replaced(self, bits: Mapping[str, int], names: Sequence[str]) -> BitPlan:
        """The plan that gives what the patterns of `bits` match those bits.

        Args:
          names: of the tensors among which a rule that loses some must keep one, or it goes.
        """
        rules = [*bits.items(), *self.rules]
        plan = BitPlan(tuple(rules))
        now = {n: plan.match(n) for n in names}
        losing = {self.match(n) for n, i in now.items() if i is not None and i < len(bits)}
        gone = {len(bits) + i for i in losing if i is not None} - {*now.values()}
        return BitPlan(tuple(r for i, r in enumerate(rules) if i not in gone))

    def set(self, name: str, bits: int, ties: Ties, follow: bool = False) -> BitPlan:
        """The plan that gives a tensor, or all that a pattern matches, these bits.

        A linear's bias moves along: 64 bits beside an output of 16, 32 beside one of 8.

        Args:
          name: global name or shell-style pattern: `layers.2.mlp.act`, `layers.*.mlp.act`.
          ties: of the model, from `qnpu_jax.plan.ties`.
          follow: move everything else along that these bits ask for.

        Raises:
          UserError: no such tensor, a width that no kernel has, or other tensors that must move too
            without `follow`; says which.
        """
        return self.set_all({name: bits}, ties, follow)

    def set_all(self, bits: Mapping[str, int], ties: Ties, follow: bool = False) -> BitPlan:
        """The plan that gives several tensors their bits at once, as `set` does one.

        Of two patterns that match a tensor the later one counts.
        """
        asked = {n: b for pattern, b in bits.items() for n in ties.named(pattern)}
        now = {n: self.bits(n) for n in ties.names}
        moved = ties.moved(now, asked)
        others = {n for n in moved if n not in asked and n not in ties.biases}
        if others and not follow:
            raise UserError(_must_move(bits, moved, others, asked, ties))
        then, rules = now | moved, {}
        for width in dict.fromkeys(moved.values()):
            mine = [n for n, b in moved.items() if b == width]
            also = [n for n, b in then.items() if b == width]
            found = ties.patterns(mine, also, [p for p, _ in self.rules])
            rules |= dict.fromkeys(found, width)
        return self.replaced(rules, ties.names)._without_idle(rules, ties.names)

    def _without_idle(self, patterns: Iterable[str], names: Sequence[str]) -> BitPlan:
        """Leaves out those rules of these patterns that change nothing."""
        plan = self
        for pattern in patterns:
            fewer = BitPlan(tuple(r for r in plan.rules if r[0] != pattern))
            if all(fewer.match(n) is not None and fewer.bits(n) == plan.bits(n) for n in names):
                plan = fewer
        return plan

    def check_used(self, names: list[str]) -> None:
        used = {self.match(n) for n in names}
        for i, (pattern, bits) in enumerate(self.rules):
            if i not in used:
                raise UserError(
                    f"bit plan rule {pattern!r}: {bits}: matches no tensor that an earlier rule"
                    " has not taken;"
                    " remove it or correct the pattern (`qnpu graph` prints every name)"
                    + self._nearest(pattern, names)
                )

    def _nearest(self, pattern: str, names: list[str]) -> str:
        matched = any(fnmatchcase(n, pattern) for n in names)
        return "" if matched else nearest(pattern, names)


def _must_move(
    bits: Mapping[str, int],
    moved: Mapping[str, int],
    others: Collection[str],
    asked: Collection[str],
    ties: Ties,
) -> str:
    """The message that other tensors must move too."""
    wanted = []
    for width in sorted({moved[n] for n in others}):
        mine = [n for n in others if moved[n] == width]
        wanted.append(f"{', '.join(ties.patterns(mine, asked))} must move to {width}")
    given = ", ".join(f"{name} at {width}" for name, width in bits.items())
    return (
        f"{given} bits: {' and '.join(wanted)} too, as no kernel gives fewer bits than it takes,"
        " and what is copied or shared has one width; set follow=True (--follow), or set them too"
    )


def are_rules(value: Any) -> bool:
    """Whether this is RULES: what a `BitPlan` takes."""
    return isinstance(value, list | tuple) and all(map(_is_rule, value))


def wrong(value: Any) -> str:
    """Shows the first thing that is no rule, or all where there are no rules to look at."""
    rules = value if isinstance(value, list | tuple) else ()
    return repr(next((rule for rule in rules if not _is_rule(rule)), value))


def _is_rule(rule: Any) -> bool:
    pair = isinstance(rule, list | tuple) and [type(part) for part in rule] == [str, int]
    return pair and rule[1] in WIDTHS


def bit_plan(weights: int, activations: int, scores: int = 16, stream: int = 16) -> BitPlan:
    """The plan behind the named recipes: w<weights>a<activations>, then s8 with 8-bit scores, i8
    with 8 bits everywhere.

    8-bit activations except attention scores with their softmax (`scores`), and the residual
    stream, norms with their gammas, and RoPE (`stream`); KV cache, embedding and head weights
    always 8. With 16-bit activations all of these are of 16 bits too, and FULLY_CONNECTED
    accumulates in 64, because 32 can overflow.
    """
    kinds = {
        ("*.residual", "*norm.*", "*.rope.*"): stream,
        ("*.scores", "*.masked", "*.softmax"): scores,
    }
    rules: list[tuple[str, int]] = [
        ("embed.weight", 8),
        ("head.weight", 8),
        ("*.weight", weights),
        ("*.bias", 32 if activations == 8 else 64),
        ("*.k_cache", 8),
        ("*.v_cache", 8),
    ]
    if activations == 8:
        rules += [(p, 16) for patterns, bits in kinds.items() if bits == 16 for p in patterns]
    return BitPlan((*rules, ("*", activations)))
