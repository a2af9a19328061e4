"""Proved intervals of what ADD, MUL, QUANTIZE and SOFTMAX hold before they round.

No weight takes part, so an interval follows from codes, zero points and shapes alone. It fits
32 bits in every kernel but for one: the sum of int8 SOFTMAX over 4,096 keys or more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, assert_never

from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    Decoder,
    Embedding,
    FullyConnected,
    Gelu,
    Graph,
    Keep,
    Logistic,
    Mul,
    Node,
    Op,
    Requantize,
    Reshape,
    Rsqrt,
    Slice,
    Softmax,
    Sqrt,
    Transpose,
    is_identity,
)
from qnpu_jax.integer.accumulators import Interval, intervals, needed_bits, product
from qnpu_jax.integer.model import QTensor

ADD_SHIFT = {8: 20, 16: 15}
"""Left shift of ADD's operands, by their bits. Reference: LiteRT kernels/add.cc, `Prepare`."""
EXP_ONE = {8: 2**19, 16: 32762}
"""exp(0) as SOFTMAX sums it, by the scores' bits: Q12.19, or Q0.15, whose table ends below 1.

Reference: LiteRT reference/softmax.h."""
AVAILABLE = 32
"""Bits of every intermediate here."""

NO_SUM: Mapping[str, str] = {
    "GATHER": "copies rows of the embedding",
    "LOGISTIC": "one code in, one out: a table, or an interpolation in one",
    "GELU": "one code in, one out: a table, or an interpolation in one",
    "SQRT": "one code in, one out: a table",
    "RSQRT": "one code in, one out: a table, or an interpolation in one",
    "RESHAPE": "copies codes",
    "TRANSPOSE": "copies codes",
    "SLICE": "copies codes",
    "CONCATENATION": "copies codes",
}
"""Ops that hold nothing wider than a code, and why: there is nothing to prove."""


@dataclass(frozen=True)
class Intermediate:
    """The proved interval of what an op holds before it rounds.

    Attributes:
      tensor: output of the op, by global name with the layer's number.
      what: name of the widest value that the op holds.
      low, high: its smallest and largest value, in codes.
    """

    tensor: str
    op: Literal["ADD", "MUL", "QUANTIZE", "SOFTMAX"]
    what: str
    low: int
    high: int

    @property
    def needed(self) -> int:
        """Bits of the smallest two's-complement integer that holds the interval."""
        return needed_bits(self.low, self.high)


def proved_intermediates(dec: Decoder, tensors: Mapping[str, QTensor]) -> list[Intermediate]:
    """Proves the interval of every intermediate: one per ADD, MUL, QUANTIZE, SOFTMAX and layer.

    Args:
      tensors: `IntegerModel.tensors`.
    """
    return list(_found(dec, tensors))


def check_intermediates(found: Iterable[Intermediate]) -> None:
    """Raises UserError for the first intermediate that does not fit `AVAILABLE` bits."""
    for i in found:
        if i.needed > AVAILABLE:
            raise UserError(
                f"{i.tensor}: its {i.what} ({i.op}) can reach {max(-i.low, i.high)}, which needs"
                f" {i.needed} bits; expected at most {AVAILABLE}; choose a shorter length, or give"
                " *.scores, *.masked and *.softmax 16 bits in the bit plan"
            )


def _found(dec: Decoder, tensors: Mapping[str, QTensor]) -> Iterator[Intermediate]:
    for graph in dec.graphs:
        for layer in range(graph.layers):
            interval = intervals(graph, layer, tensors)
            for node in graph.nodes:
                if not is_identity(graph, node, layer) and (
                    found := _intermediate(graph, node, layer, interval)
                ):
                    kind, what, (low, high) = found
                    yield Intermediate(graph.global_name(layer, node.output), kind, what, low, high)


def _intermediate(
    graph: Graph, node: Node, layer: int, interval: Callable[[str], Interval]
) -> tuple[Literal["ADD", "MUL", "QUANTIZE", "SOFTMAX"], str, Interval] | None:
    op: Op = node.op
    bits = 16 if graph[node.output].quant.bits[layer] > 8 else 8
    match op:
        case Add() | AddMask():
            # Each operand, shifted; its share of the sum is at most half of it.
            shift = ADD_SHIFT[bits]
            low, high = zip(*map(interval, node.inputs), strict=True)
            return "ADD", f"(x - zero_point) 2^{shift}", (min(low) << shift, max(high) << shift)
        case Mul() | Keep():
            x, y = node.inputs
            return "MUL", "product", product(interval(x), interval(y), square=x == y)
        case Requantize():
            return "QUANTIZE", "x - zero_point", interval(node.inputs[0])
        case Softmax():
            one, terms = EXP_ONE[bits], graph[node.output].shape[-1]
            return "SOFTMAX", "sum of exp", (one, terms * one)  # the largest term is exp(0)
        case FullyConnected() | BatchMatmul():
            return None  # `accumulators`
        case Embedding() | Logistic() | Gelu() | Sqrt() | Rsqrt():
            return None
        case Reshape() | Transpose() | Slice() | Concat():
            return None
        case _:
            assert_never(op)
