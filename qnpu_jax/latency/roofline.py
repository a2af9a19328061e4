"""Roofline ESTIMATE of latency on an NPU that is not at hand, with the error of its fit.

    seconds = start + max(DDR bytes / bandwidth, sum_w MACs_w f_w / rate)

where w is the number of bits of the activations. Start (seconds a call), bandwidth (bytes/s) and
rate (MACs/s) of an SoC are fitted to published measurements, so they include the losses of those
programs. There is no model of cycles.

The fits have few points, `published.PUBLISHED`: nine decode and eight prefill rates for SM8750,
three and two for SM8650 (`validation` predicts each from the others). All are models with 16-bit
activations at a short context, with 4-bit weights but for the smallest. For other models the error
of the fit says less. SA8295's are of float16 activations, and converted by how much slower these
are where both are published (`SLOWER`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import nnls

from qnpu_jax.errors import UserError
from qnpu_jax.graph import BatchMatmul, Decoder, FullyConnected, Graph
from qnpu_jax.latency.published import BOTH, CHUNK, PUBLISHED, Both, Published

LABEL = "estimate"
"""Word that must stand beside every number of this module that is shown."""
WIDTH_TIME = {16: 1.0, 8: 1 / 1.2}
"""f_w: time of a MAC with w-bit activations, relative to the 16 bits of the measured rates.
Published is that W4A8 prefills about 20% faster than W4A16 (the Quant.npu paper, where the weights
also went from per block to per channel). A multiplier array that does twice as many 8-bit products
would give 1/2; no measurement at hand shows that."""


@dataclass(frozen=True)
class Fit:
    """Quantity that each measurement gives a value of, fitted by their mean.

    Example:
      >>> fit = Fit((4.0, 8.0))
      >>> fit.mean, fit.errors
      (6.0, (1.0, -0.5))
    """

    points: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the points."""
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
        """Relative error (mean - own) / own of each point, predicted by the mean of the others."""
        total = math.fsum(self.points)
        others = len(self.points) - 1
        return tuple((total - x) / others / x - 1 for x in self.points) if others else (math.inf,)

    @property
    def worst(self) -> float:
        """Largest absolute value of the errors."""
        return max(map(abs, self.errors))


@dataclass(frozen=True)
class Memory:
    """Seconds of a call that is bound by memory: start + bytes / bandwidth.

    Attributes:
      start: seconds that every call takes.
      bandwidth: bytes per second.
      errors: relative error of each measurement's seconds, predicted by the fit to the others.
    """

    start: float
    bandwidth: float
    errors: tuple[float, ...] = ()

    def seconds(self, ddr_bytes: float | int) -> float:
        """Returns the time of a call that moves this many bytes."""
        return self.start + ddr_bytes / self.bandwidth

    @property
    def worst(self) -> float:
        """Largest absolute value of the errors."""
        return max(map(abs, self.errors), default=math.inf)


class Slower(NamedTuple):
    """How many times as long float16 activations take as 16-bit integers, a point an SoC."""

    decode: Fit
    prefill: Fit


def slower(rows: Sequence[Both]) -> Slower:
    """Fits how much slower float16 activations are; models of one SoC are averaged first."""
    socs = dict.fromkeys(r.soc for r in rows)
    own = [[r for r in rows if r.soc == soc] for soc in socs]
    decode = tuple(Fit(tuple(r.decode[0] / r.decode[1] for r in mine)).mean for mine in own)
    prefill = tuple(Fit(tuple(r.first[1] / r.first[0] for r in mine)).mean for mine in own)
    return Slower(Fit(decode), Fit(prefill))


SLOWER = slower(BOTH)


@dataclass(frozen=True)
class Soc:
    """Fits of an SoC.

    Attributes:
      rate: MACs per second with 16-bit activations.
      converted: fitted to rates of float16 activations, as integers' by `SLOWER`.
    """

    name: str
    memory: Memory
    rate: Fit
    converted: bool = False

    @property
    def decode_error(self) -> float:
        """Largest relative error of the fit of decode, with that of the conversion on top."""
        return _compounded(self.memory.worst, SLOWER.decode.worst if self.converted else 0.0)

    @property
    def prefill_error(self) -> float:
        """Largest relative error of the fit of prefill, with that of the conversion on top."""
        return _compounded(self.rate.worst, SLOWER.prefill.worst if self.converted else 0.0)


def _compounded(a: float, b: float) -> float:
    return (1 + a) * (1 + b) - 1


@dataclass(frozen=True)
class RooflineEstimate:
    """Estimated time of one call. It is no measurement.

    Attributes:
      limit: which term of the equation is larger.
      error: largest relative error with which the fit of that term predicts a published measurement
        from the others.
    """

    seconds: float
    limit: Literal["memory", "compute"]
    error: float


@dataclass(frozen=True)
class Validation:
    """Published rate beside the prediction from the other measurements of its SoC.

    Attributes:
      points: number of measurements that the prediction rests on.
      predicted, measured: tokens per second.
    """

    soc: str
    model: str
    phase: Literal["decode", "prefill"]
    points: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured - 1


def fit(name: str, rows: Sequence[Published]) -> Soc:
    """Fits an SoC to measurements.

    Decode is bound by memory: 1 / rate = start + bytes / bandwidth, with least squares of relative
    errors and no start below 0. Prefill is bound by compute: a chunk takes start + MACs / rate.
    Rates of float16 activations count as `SLOWER` times as many.
    """
    converted = any(r.activations == "float16" for r in rows)
    rows = [_in_integers(r) for r in rows]
    memory = _memory(rows)
    if len(rows) > 1:
        left = ((r, _memory([x for x in rows if x is not r])) for r in rows)
        errors = tuple(m.seconds(r.bytes_per_token) * r.decode - 1 for r, m in left)
        memory = replace(memory, errors=errors)
    rate = tuple(
        r.macs * CHUNK / (CHUNK / r.prefill - memory.start) for r in rows if r.macs and r.prefill
    )
    return Soc(name, memory, Fit(rate), converted)


def _in_integers(row: Published) -> Published:
    """The row as it would be with 16-bit integer activations."""
    if row.activations == "int16":
        return row
    prefill = row.prefill and row.prefill * SLOWER.prefill.mean
    decode = row.decode * SLOWER.decode.mean
    return replace(row, decode=decode, prefill=prefill, activations="int16")


def _memory(rows: Sequence[Published]) -> Memory:
    if len(rows) == 1:  # one point has no start
        return Memory(0.0, rows[0].bytes_per_token * rows[0].decode)
    seconds = np.array([1 / r.decode for r in rows])
    columns = np.array([[1.0, r.bytes_per_token * 1e-9] for r in rows]) / seconds[:, None]
    (start, gigabyte), _ = nnls(columns, np.ones(len(rows)))
    return Memory(float(start), 1e9 / float(gigabyte))


SOCS = {
    name: fit(name, [r for r in PUBLISHED if r.soc == name])
    for name in dict.fromkeys(r.soc for r in PUBLISHED)
}


def soc(name: str) -> Soc:
    """Returns the fits of an SoC by its name.

    Raises:
      UserError: no measurement of it is known.
    """
    if name not in SOCS:
        raise UserError(
            f"{name}: no published measurement to estimate from; expected one of {sorted(SOCS)};"
            " choose one of them, or measure on the phone"
        )
    return SOCS[name]


def estimate(soc: Soc, ddr_bytes: float | int, macs: Mapping[int, int]) -> RooflineEstimate:
    """Estimates the time of one call of a signature, by the module's equation.

    Args:
      ddr_bytes: bytes that one call moves: a compiler's count (`hexagon.Traffic`), or
        `least_bytes`.
      macs: MACs of one call, by bits of the activations (`macs`).

    Raises:
      UserError: activations of a width whose speed is not known.
    """
    if unknown := macs.keys() - WIDTH_TIME.keys():
        raise UserError(
            f"activations of {sorted(unknown)} bits: no rate is known; expected"
            f" {sorted(WIDTH_TIME)} bits; estimate a model of those"
        )
    memory = soc.memory.seconds(ddr_bytes)
    compute = sum(n * WIDTH_TIME[bits] for bits, n in macs.items()) / soc.rate.mean
    compute += soc.memory.start
    if memory >= compute:
        return RooflineEstimate(memory, "memory", soc.decode_error)
    return RooflineEstimate(compute, "compute", soc.prefill_error)


def validation() -> list[Validation]:
    """Predicts every published rate from the others of its SoC (leave one out).

    Weights are read once per token in decode, and once per CHUNK tokens in prefill. A rate of
    float16 activations stands, converted, beside the prediction for integers.
    """
    rows = []
    for row in map(_in_integers, PUBLISHED):
        others = [r for r in PUBLISHED if r.soc == row.soc and r.model != row.model]
        left, own, macs = fit(row.soc, others), (row.soc, row.model), row.macs or 0
        step = estimate(left, row.bytes_per_token, {16: macs}).seconds
        rows.append(Validation(*own, "decode", len(others), 1 / step, row.decode))
        if row.prefill:
            chunk = estimate(left, row.bytes_per_token, {16: macs * CHUNK}).seconds
            points = len(left.rate.points)
            rows.append(Validation(*own, "prefill", points, CHUNK / chunk, row.prefill))
    return rows


def macs(dec: Decoder) -> dict[int, int]:
    """Counts multiply-accumulates of one call over all layers, by bits of the activations.

    FULLY_CONNECTED of (T, K) and (N, K) has T K N. BATCH_MATMUL of (B, M, K) and (B, K, N) has
    B M K N. Padding and masked keys count, because they are computed.
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
    """Returns a lower bound of the DDR bytes of one call.

    Each parameter, cached key and cached value is read once, and new keys and values are written
    once. Of the embedding table only the rows of the tokens are read. Activations that do not fit
    on the chip come on top, so a compiler's count is better.
    """
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
    """Returns the bits of a tensor in every layer."""
    quant = graph[name].quant
    return quant.bits
