"""Proof that no accumulator overflows: the interval each can reach, from the actual integer
weights.

FULLY_CONNECTED: y_j = sum_k w_jk (x_k - z) + b_j with x_k - z in [lo, hi] lies in
[P_j lo + N_j hi + b_j, P_j hi + N_j lo + b_j], P and N the sums of the positive and negative
weights of row j. BATCH_MATMUL: K times the interval of one product; of a square, K times
[0, max|x - z|^2]. Both ends are reached by an input, so a bound is tight.

lo <= 0 <= hi, so no term of an extreme sum has the other sign: a sum that starts at its bias stays
in the interval at every step, in whatever order its terms come, and also where hardware folds the
zero point into the bias. An accumulator as wide as `needed` says neither wraps nor saturates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int

from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    WIDENING,
    BatchMatmul,
    Decoder,
    FullyConnected,
    Graph,
    Node,
    Requantize,
    TensorSpec,
)
from qnpu_jax.integer.model import QTensor, blocks

Interval = tuple[int, int]
"""Lowest and highest value, codes."""


@dataclass(frozen=True)
class Bound:
    """The proved interval of one op's accumulator.

    Attributes:
      tensor: output of the op, by global name with the layer's number.
      low, high: smallest and largest sum, in codes; an input reaches each.
      available: bits of the accumulator.
      input_bits: bits of the op's first input, after widening.
    """

    tensor: str
    op: Literal["FULLY_CONNECTED", "BATCH_MATMUL"]
    low: int
    high: int
    available: int
    input_bits: int

    @property
    def needed(self) -> int:
        """Bits of the smallest two's-complement integer that holds the interval."""
        return needed_bits(self.low, self.high)


@dataclass(frozen=True)
class ChannelBounds:
    """The proved interval of every channel of one op's accumulator.

    Attributes:
      op: as in `Bound`; so are `tensor`, `available` and `input_bits`.
      low, high: one per output channel of a FULLY_CONNECTED; one for all of a BATCH_MATMUL, which
        has no weights.
    """

    tensor: str
    op: Literal["FULLY_CONNECTED", "BATCH_MATMUL"]
    low: tuple[int, ...]
    high: tuple[int, ...]
    available: int
    input_bits: int

    @cached_property
    def bound(self) -> Bound:
        """The interval that holds those of all channels."""
        low, high = min(self.low), max(self.high)
        return Bound(self.tensor, self.op, low, high, self.available, self.input_bits)

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """Bits of the smallest two's-complement integer that holds each channel's interval."""
        return tuple(map(needed_bits, self.low, self.high))


def needed_bits(low: int, high: int) -> int:
    """Bits of the smallest two's-complement integer that holds [low, high].

    >>> needed_bits(-128, 127), needed_bits(0, 128)
    (8, 9)
    """
    return max(high.bit_length() if high > 0 else 0, (-low - 1).bit_length() if low < 0 else 0) + 1


def proved_bounds(
    dec: Decoder,
    tensors: Mapping[str, QTensor],
    *,
    linears: bool = True,
) -> list[Bound]:
    """Proves the interval of every accumulator: one per FULLY_CONNECTED and BATCH_MATMUL and layer.

    Args:
      dec: graphs of the length in question.
      tensors: `IntegerModel.tensors`.
      linears: False leaves FULLY_CONNECTED out: its weights take a second to read, and its bounds
        do not depend on the length.
    """
    found = channel_bounds(dec, tensors, linears=linears)
    return [channels.bound for channels in found]


def channel_bounds(
    dec: Decoder,
    tensors: Mapping[str, QTensor],
    *,
    linears: bool = True,
) -> list[ChannelBounds]:
    """Proves the interval of every channel's accumulator, as `proved_bounds` does for whole ops."""
    return [
        bounds
        for graph in dec.graphs
        for layer in range(graph.layers)
        for bounds in _graph_bounds(graph, layer, tensors, linears)
    ]


def _graph_bounds(
    graph: Graph, layer: int, tensors: Mapping[str, QTensor], linears: bool
) -> Iterator[ChannelBounds]:
    interval = intervals(graph, layer, tensors)
    for node in graph.nodes:
        name = graph.global_name(layer, node.output)
        match node.op:
            case FullyConnected() if linears:
                x, w, b = node.inputs
                bits, available = (_bits(graph[n], layer) for n in (x, b))
                own_w, own_b = (graph.at(tensors[graph.prefix + n].codes, layer) for n in (w, b))
                low, high = linear_interval(own_w, own_b, *interval(x))
                yield ChannelBounds(name, "FULLY_CONNECTED", low, high, available, bits)
            case BatchMatmul():
                x, y = node.inputs
                _, rows, terms = graph[x].shape
                square = x == y and rows == 1 and node.op.adj_y
                low, high = product(interval(x), interval(y), square=square)
                bits = _bits(graph[x], layer)
                available = 32 if bits <= 8 else 64
                yield ChannelBounds(
                    name, "BATCH_MATMUL", (terms * low,), (terms * high,), available, bits
                )
            case _:
                pass


def intervals(
    graph: Graph, layer: int, tensors: Mapping[str, QTensor]
) -> Callable[[str], Interval]:
    """Returns a function: local name -> [min, max] of code - zero_point in this layer.

    A widened tensor has WIDENING times the interval of its source.
    """
    producer = {n.output: n for n in graph.nodes}

    def interval(name: str) -> Interval:
        node: Node | None = producer.get(name)
        if node is not None and isinstance(node.op, Requantize):
            source = node.inputs[0]
            if _bits(graph[source], layer) < _bits(graph[name], layer):
                low, high = interval(source)
                return WIDENING * low, WIDENING * high
        half = 2 ** (_bits(graph[name], layer) - 1)
        zero = int(graph.at(tensors[graph.prefix + name].zero_point, layer))
        return -half - zero, half - 1 - zero

    return interval


def product(x: Interval, y: Interval, *, square: bool = False) -> Interval:
    """Smallest and largest product of a value of x and one of y.

    Args:
      square: both factors are the same value, of an interval that holds 0.

    >>> product((-2, 3), (-2, 3)), product((-2, 3), (-2, 3), square=True)
    ((-6, 9), (0, 9))
    """
    ends = [a * b for a in x for b in y]
    return (0 if square else min(ends)), max(ends)


def linear_interval(
    w: Int[np.ndarray, "n k"], b: Int[np.ndarray, " n"], low: int, high: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Smallest and largest accumulator of each row of w, where x - z lies in [low, high].

    With P and N the sums of a row's positive and negative weights: P low + N high + b and
    P high + N low + b. Sums are Python integers, since NumPy's would wrap beside a 64-bit bias near
    its limit.
    """
    rows = []
    for block in blocks(w):  # sums in int64 take eight times the codes
        positive = np.maximum(w[block], 0).sum(axis=1, dtype=np.int64).tolist()
        total = w[block].sum(axis=1, dtype=np.int64).tolist()
        rows += zip(positive, total, b[block].tolist(), strict=True)
    return (
        tuple(p * low + (t - p) * high + b for p, t, b in rows),
        tuple(p * high + (t - p) * low + b for p, t, b in rows),
    )


def _bits(spec: TensorSpec, layer: int) -> int:
    return spec.quant.bits[layer]


def check_accumulators(bounds: list[Bound]) -> None:
    """Raises UserError for the first op whose accumulator can overflow."""
    for bound in bounds:
        if bound.needed > bound.available:
            reach = max(-bound.low, bound.high)
            match bound.op:
                case "FULLY_CONNECTED":
                    way_out = wider_linear(bound.tensor, bound.input_bits)
                case "BATCH_MATMUL":
                    way_out = f"choose a shorter length, or give {bound.tensor} 16 bits"
            raise UserError(
                f"{bound.tensor}: its accumulator can reach {reach}, which needs {bound.needed}"
                f" bits; expected at most {bound.available}; {way_out} in the bit plan"
            )


def overflowing(bounds: Iterable[Bound], bits: int) -> list[Bound]:
    """Selects the ops whose interval does not fit a two's-complement accumulator of `bits` bits.

    On [-2^(bits-1), 2^(bits-1) - 1] all others neither wrap nor saturate, whatever the input.
    `Bound.available` plays no part.
    """
    return [bound for bound in bounds if bound.needed > bits]


def narrow_biases(bounds: list[Bound]) -> dict[str, int]:
    """Finds the 64-bit biases whose linears provably need no more than 32 bits.

    Returns:
      32 by global name, or by a pattern such as `layers.*.mlp.down.bias` where that holds for all
      layers: rules for `BitPlan.replaced`.
    """
    fits: dict[str, dict[str, bool]] = {}
    for b in (b for b in bounds if b.op == "FULLY_CONNECTED" and b.available == 64):
        name = _bias(b.tensor)
        every = fits.setdefault(re.sub(r"^layers\.\d+\.", "layers.*.", name), {})
        every[name] = b.needed <= 32
    bits: dict[str, int] = {}
    for pattern, every in fits.items():
        names = [pattern] if all(every.values()) else [n for n, fit in every.items() if fit]
        bits |= dict.fromkeys(names, 32)
    return bits


def wider_linear(tensor: str, input_bits: int) -> str:
    """Says how to give a linear a 64-bit accumulator, for the end of an error.

    The bias is as wide as the accumulator. LiteRT reads a 64-bit bias beside a 16-bit input only;
    with a 16-bit output the input has 16 bits too.
    """
    wide = f"give {tensor} 16 bits and" if input_bits <= 8 else "give"
    return f"{wide} {_bias(tensor)} 64 bits"


def _bias(linear: str) -> str:
    return "head.bias" if linear == "head.logits" else f"{linear}.bias"
