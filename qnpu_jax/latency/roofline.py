"""How long an NPU that is not at hand would take: an ESTIMATE, and its error where it can be had.

    seconds = max(DDR bytes / bandwidth, sum_w MACs_w f_w / rate)

Bandwidth (bytes/s) and rate (MACs/s) of an SoC are means over what published measurements
achieved, so they hold what those programs lost on the way; there is no cycle model behind them.
Few points decide: six decode and three prefill rates for SM8750, two and two for SM8650
(`validation` predicts each from the others). All of them are 4-bit weights with 16-bit activations
at a short context, so the less a model looks like that, the less the error of the fit says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qnpu_jax.errors import UserError
from qnpu_jax.graph import BatchMatmul, Decoder, FullyConnected, Graph

LABEL = "estimate"
"""What every number of this module has to be shown as."""
CHUNK = 128
"""Tokens that the published prefills take at a time."""
WIDTH_TIME = {16: 1.0, 8: 1 / 1.2}
"""f_w: time of a MAC by the bits of its activations, against the 16 that the rates were measured
with. The published figure is W4A8 prefilling about 20% faster than W4A16 (npu.md, section 1: the
Quant.npu paper, where the weights also went from per block to per channel). Twice the work in the
multiplier array would make it 1/2 in the limit; no measurement at hand shows that."""


@dataclass(frozen=True)
class Published:
    """A vendor's measurement of a model with 4-bit weights and 16-bit activations.

    Attributes:
      bytes_per_token: between DDR and the NPU in one decode step, by the compiler's count.
      decode: tokens per second.
      macs: per token: the weights of all matrices, the head's included; attention is left out, as
        its context is not published.
      prefill: tokens per second; the middle of the published range, None where none is published.
    """

    soc: str
    model: str
    bytes_per_token: float
    decode: float
    macs: int | None = None
    prefill: float | None = None


_1B, _3B, _8B = 1_235_746_816, 3_212_574_720, 7_504_658_432
PUBLISHED = (
    Published("SM8750", "Qwen3-0.6B", 372e6, 125.0),
    Published("SM8750", "Llama-3.2-1B", 677e6, 67.2, _1B, (1783 + 2547) / 2),
    Published("SM8750", "Qwen3-1.7B", 947e6, 56.7),
    Published("SM8750", "Llama-3.2-3B", 1726e6, 26.5, _3B, 728.0),
    Published("SM8750", "Qwen3-4B", 2135e6, 26.1),
    Published("SM8750", "Llama-3-8B", 3907e6, 13.7, _8B, 399.0),
    Published("SM8650", "Llama-3.2-1B", 677e6, 59.0, _1B, 1877.0),
    Published("SM8650", "Llama-3-8B", 3907e6, 12.0, _8B, 468.0),
)
"""Rates: qai-hub-models, perf.yaml (genie; SM8750 in the Galaxy S25, SM8650 the 8 Gen 3). Bytes:
npu.md, section 1, counted for SM8750 and taken for SM8650 too."""


@dataclass(frozen=True)
class Fit:
    """A quantity as each of some measurements has it; the fit is their mean."""

    points: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.points) / len(self.points)

    @property
    def spread(self) -> float:
        """Sample standard deviation; infinite for a single point."""
        if len(self.points) < 2:
            return math.inf
        squares = math.fsum((x - self.mean) ** 2 for x in self.points)
        return math.sqrt(squares / (len(self.points) - 1))

    @property
    def errors(self) -> tuple[float, ...]:
        """Of each point predicted by the mean of the others, relative: (others - own) / own."""
        total = math.fsum(self.points)
        others = len(self.points) - 1
        return tuple((total - x) / others / x - 1 for x in self.points) if others else (math.inf,)

    @property
    def worst(self) -> float:
        """The largest of the absolute errors."""
        return max(map(abs, self.errors))


@dataclass(frozen=True)
class Soc:
    """What is fitted of an SoC: `bandwidth` in bytes/s, `rate` in MACs/s at 16-bit activations."""

    name: str
    bandwidth: Fit
    rate: Fit


@dataclass(frozen=True)
class RooflineEstimate:
    """An estimate, never a measurement.

    Attributes:
      limit: what takes that long: reading `memory`, or `compute`.
      error: relative, the largest that the fit of this limit makes when it predicts a published
        measurement from the others.
    """

    seconds: float
    limit: Literal["memory", "compute"]
    error: float


@dataclass(frozen=True)
class Validation:
    """A published rate, and what the others of its SoC predict: tokens per second.

    Attributes:
      points: measurements that the prediction rests on.
      error: (predicted - measured) / measured.
    """

    soc: str
    model: str
    phase: Literal["decode", "prefill"]
    points: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def fit(name: str, rows: Sequence[Published]) -> Soc:
    """Bandwidth from decode, which is bound by memory: bytes per token times tokens per second.
    Rate from prefill, which is bound by compute: MACs per token times tokens per second."""
    bandwidth = tuple(r.bytes_per_token * r.decode for r in rows)
    rate = tuple(r.macs * r.prefill for r in rows if r.macs and r.prefill)
    return Soc(name, Fit(bandwidth), Fit(rate))


SOCS = {
    name: fit(name, [r for r in PUBLISHED if r.soc == name])
    for name in dict.fromkeys(r.soc for r in PUBLISHED)
}


def soc(name: str) -> Soc:
    """One of SOCS.

    Raises:
      UserError: nothing is published of it here.
    """
    if name not in SOCS:
        raise UserError(
            f"{name}: no published measurement to estimate from; expected one of {sorted(SOCS)};"
            " choose one of them, or measure on the phone"
        )
    return SOCS[name]


def estimate(soc: Soc, ddr_bytes: float | int, macs: Mapping[int, int]) -> RooflineEstimate:
    """The module's equation, for one call of a signature.

    Args:
      ddr_bytes: that one call moves: a compiler's count (`hexagon.Traffic`), or `least_bytes`.
      macs: by bits of activations (`macs`).

    Raises:
      UserError: MACs of a width that nothing is known of.
    """
    if unknown := macs.keys() - WIDTH_TIME.keys():
        raise UserError(
            f"activations of {sorted(unknown)} bits: no rate is known; expected"
            f" {sorted(WIDTH_TIME)} bits; estimate a model of those"
        )
    memory = ddr_bytes / soc.bandwidth.mean
    compute = sum(n * WIDTH_TIME[bits] for bits, n in macs.items()) / soc.rate.mean
    if memory >= compute:
        return RooflineEstimate(memory, "memory", soc.bandwidth.worst)
    return RooflineEstimate(compute, "compute", soc.rate.worst)


def validation() -> list[Validation]:
    """Every published rate as the others of its SoC predict it (leave one out).

    A decode step moves its bytes once per token; a prefill does as often per CHUNK tokens.
    """
    rows = []
    for row in PUBLISHED:
        left = fit(row.soc, [r for r in PUBLISHED if r.soc == row.soc and r is not row])
        own, macs = (row.soc, row.model), row.macs or 0
        step = estimate(left, row.bytes_per_token, {16: macs}).seconds
        points = len(left.bandwidth.points)
        rows.append(Validation(*own, "decode", points, 1 / step, row.decode))
        if row.prefill:
            chunk = estimate(left, row.bytes_per_token, {16: macs * CHUNK}).seconds
            points = len(left.rate.points)
            rows.append(Validation(*own, "prefill", points, CHUNK / chunk, row.prefill))
    return rows


def macs(dec: Decoder) -> dict[int, int]:
    """Multiply-accumulates of one call, all layers, by bits of activations.

    FULLY_CONNECTED of (T, K) and (N, K): T K N. BATCH_MATMUL of (B, M, K) and (B, K, N): B M K N.
    Padding and masked keys count: they are computed.
    """
    found: Counter[int] = Counter()
    for graph in dec.graphs:
        for node in graph.nodes:
            if isinstance(node.op, FullyConnected | BatchMatmul):
                x, size = graph[node.inputs[0]], math.prod(graph[node.output].shape)
                for bits in _bits(graph, x.name):
                    found[bits] += size * x.shape[-1]
    return dict(found)


def least_bytes(dec: Decoder) -> float:
    """A lower bound of DDR bytes of one call: each parameter and cached key or value is read once,
    new keys and values are written once, and of the embedding table only the rows of the tokens
    count. A compiler adds what does not fit on the chip; its count is the better input."""
    total = 0.0
    for graph in dec.graphs:
        cached = [t for t in graph.named("input") if t.name.startswith("attn.cache_")]
        moved = [*graph.named("param"), *cached]
        moved += [graph[name] for name in graph.outputs[1:]]  # the layers' new keys and values
        for spec in moved:
            shape = (dec.tokens, *spec.shape[1:]) if graph is dec.embed else spec.shape
            total += sum(bits / 8 * math.prod(shape) for bits in _bits(graph, spec.name))
    return total


def _bits(graph: Graph, name: str) -> tuple[int, ...]:
    """Of a tensor, in every layer."""
    quant = graph[name].quant
    return quant.bits
