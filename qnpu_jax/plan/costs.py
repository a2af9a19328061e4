"""What a plan costs on a target: seconds a token and a chunk, bytes of weights, by group.

    decode  = start + bytes / bandwidth + casts op
    prefill = start + max(sum_w MACs_w mac_w, bytes / bandwidth) + casts op

with the rates of a target (`targets.Rates`) and their errors. Where MACs and bytes do not overlap,
their times add up in place of the larger one. A cast is a QUANTIZE that a plan has and another has
not: one that widens an activation, and one at a block's input, which goes where both its sides have
16 bits. It takes `op`: for Snapdragons, of which nobody publishes the time of an op, the start
shared out over the ops of the model's own decode step; for Ethos-U the op that vela's estimates
give, whose product with the number of ops is the start. All of it is an estimate. Targets without
rates have no seconds: decode and prefill are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    BatchMatmul,
    Decoder,
    FullyConnected,
    Narrowed,
    constraint,
    decoder,
    is_identity,
)
from qnpu_jax.latency import roofline
from qnpu_jax.plan import targets
from qnpu_jax.plan.groups import STREAM, Choices, Member


class Cast(NamedTuple):
    """A QUANTIZE that depends on the plan.

    Attributes:
      source: group of what is cast; None where all plans give it the same bits.
      targets: groups of what is made of it; none where they have the same bits in every plan.
      when: it is there `unless` source and targets all are high (a requantize of a block's input,
        what is widened for a kernel of 16 bits), or `if` a target is high and the source is low
        (widened), or where the two `differ` (a requantize that 8 bits on both sides do not need,
        as neither has a zero point).
    """

    source: int | None
    targets: tuple[int, ...]
    when: Literal["unless", "if", "differ"]


@dataclass(frozen=True)
class Cost:
    """Terms of the estimates, of one target; seconds are NaN where it has no rates.

    Attributes:
      start: seconds a call.
      memory: seconds of the bytes of the low plan, start left out.
      compute: seconds of the MACs of a chunk in the low plan, start left out.
      size: bytes of weights in the low plan.
      more_memory, more_compute, more_size: by group, what raising it adds to these.
      casts: those that depend on the plan.
      op: seconds of one.
      overlap: whether memory and compute of a chunk run at once.
      error: largest relative error of the fit behind decode, and behind prefill.
    """

    start: float
    memory: float
    compute: float
    size: float
    more_memory: Float64[np.ndarray, " g"]
    more_compute: Float64[np.ndarray, " g"]
    more_size: Float64[np.ndarray, " g"]
    casts: tuple[Cast, ...]
    op: float
    overlap: bool
    error: tuple[float, float]

    @property
    def timed(self) -> bool:
        """Whether there are seconds."""
        return not math.isnan(self.start)

    def decode(self, raised: Sequence[bool]) -> float:
        """Estimates the seconds of a token."""
        up = np.asarray(raised, float)
        return self.start + self.memory + float(self.more_memory @ up) + self._casting(raised)

    def prefill(self, raised: Sequence[bool]) -> float:
        """Estimates the seconds of a chunk of `roofline.CHUNK` tokens."""
        up = np.asarray(raised, float)
        memory = self.memory + float(self.more_memory @ up)
        compute = self.compute + float(self.more_compute @ up)
        both = max(memory, compute) if self.overlap else memory + compute
        return self.start + both + self._casting(raised)

    def bytes(self, raised: Sequence[bool]) -> float:
        """Counts the bytes of the weights."""
        return self.size + float(self.more_size @ np.asarray(raised, float))

    def casting(self, raised: Sequence[bool]) -> int:
        """Counts the casts that the plan has."""
        return sum(present(cast, raised) for cast in self.casts)

    def _casting(self, raised: Sequence[bool]) -> float:
        return self.op * self.casting(raised)


def present(cast: Cast, raised: Sequence[bool]) -> bool:
    """Tells whether a plan has a cast."""
    up = [raised[t] for t in cast.targets]
    match cast.when:
        case "unless":
            return not (all(up) and (cast.source is None or raised[cast.source]))
        case "if":
            return any(up) and (cast.source is None or not raised[cast.source])
        case "differ":
            return any(up) != (cast.source is not None and raised[cast.source])


_NONE = targets.Rates(
    math.nan, math.nan, {8: math.nan, 16: math.nan}, math.nan, True, (math.nan, math.nan)
)


def cost(found: Choices, soc: str, context: int) -> Cost:
    """Estimates what groups cost on a target.

    Args:
      found: staged for any length.
      soc: one of `targets.TARGETS`.
      context: slots of the cache that decode reads.

    Raises:
      UserError: an unknown target, or a context that holds no chunk.
    """
    if context <= roofline.CHUNK:
        raise UserError(
            f"context: {context} slots; expected more than the {roofline.CHUNK} of a chunk, whose"
            " time is estimated; choose more"
        )
    rates = targets.target(soc).rates or _NONE
    token, chunk = (_at(found.low, n, context) for n in (1, roofline.CHUNK))
    moved, stored, macs_of = (np.zeros(len(found.groups)) for _ in range(3))
    for i, group in enumerate(found.groups):
        for member in group.members:
            spec = next(g for g in token.graphs if g.prefix == member.prefix)[member.name]
            if group.kind == "weight":
                stored[i] += math.prod(spec.shape) * (group.high - group.low) / 8
            macs_of[i] += _macs(chunk, member)
            moved[i] += 4 * _outputs(token, member)  # biases of 64 bits
    nodes = sum(len(g.nodes) * g.layers for g in token.graphs)
    op = rates.start / nodes if rates.op is None else rates.op
    return Cost(
        start=rates.start if rates.op is None else rates.op * nodes,
        memory=roofline.least_bytes(token) / rates.bandwidth,
        compute=sum(n * rates.mac[bits] for bits, n in roofline.macs(chunk).items()),
        size=_size(found.low),
        more_memory=(moved + stored) / rates.bandwidth,
        more_compute=macs_of * (rates.mac[16] - rates.mac[8]),
        more_size=stored,
        casts=tuple(_casts(found)),
        op=op,
        overlap=rates.overlap,
        error=rates.errors,
    )


def _at(dec: Decoder, tokens: int, context: int) -> Decoder:
    return decoder(dec.config, dec.plan, tokens, dec.prefix, context - tokens, "last")


def _macs(dec: Decoder, member: Member) -> int:
    """MACs of the product that makes a tensor, 0 where none does."""
    graph = next(g for g in dec.graphs if g.prefix == member.prefix)
    for node in graph.nodes:
        if node.output == member.name and isinstance(node.op, FullyConnected | BatchMatmul):
            return math.prod(graph[node.output].shape) * graph[node.inputs[0]].shape[-1]
    return 0


def _outputs(dec: Decoder, member: Member) -> int:
    """Channels of the linear that makes a tensor, 0 where none does."""
    graph = next(g for g in dec.graphs if g.prefix == member.prefix)
    node = next((n for n in graph.nodes if n.output == member.name), None)
    return graph[node.output].shape[-1] if node and isinstance(node.op, FullyConnected) else 0


def _size(dec: Decoder) -> float:
    return sum(
        math.prod(t.shape) * bits / 8
        for g in dec.graphs
        for t in g.named("param")
        if t.name.endswith("weight")
        for bits in t.quant.bits
    )


def _casts(found: Choices) -> list[Cast]:
    """Casts that depend on the plan, in the order of the graph."""
    made: list[Cast] = []
    for graph in found.low.graphs:
        params = {t.name for t in graph.tensors if t.kind != "activation" and t.name != STREAM}
        for layer in range(graph.layers):
            group = partial(_group_of, found, graph.prefix, layer)
            widened: dict[tuple[int | None, str], set[int]] = {}
            for node in graph.nodes:
                source, target = group(node.inputs[0]), group(node.output)
                if isinstance(constraint(node.op), Narrowed):
                    known = {node.inputs[0]: source, node.output: target}
                    fixed = [graph[x].quant.bits[layer] for x, g in known.items() if g is None]
                    when = "differ" if is_identity(graph, node, layer) else "unless"
                    # With 8 bits on one side in every plan, what 8 on both need is always there.
                    if len(fixed) < 2 and not (when == "unless" and min(fixed, default=16) < 16):
                        made.append(Cast(source, () if target is None else (target,), when))
                    continue
                if target is None:
                    continue
                for x in node.inputs:
                    if x not in params and group(x) != target:
                        widened.setdefault((group(x), x), set()).add(target)
            made += [Cast(a, tuple(sorted(b)), "if") for (a, _), b in widened.items()]
    return made


def _group_of(found: Choices, prefix: str, layer: int, name: str) -> int | None:
    return found.index.get(Member(prefix, name, layer))
