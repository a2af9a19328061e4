"""Proof that no accumulator overflows: the interval each can reach, from the actual integer
weights.

FULLY_CONNECTED: y_j = sum_k w_jk (x_k - z) + b_j with x_k - z in [lo, hi] lies in
[P_j lo + N_j hi + b_j, P_j hi + N_j lo + b_j], P and N the sums of the positive and negative
weights of row j. Both ends are reached by an input, so the bound is tight. BATCH_MATMUL: K max|x -
z_x| max|y - z_y|.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from qnpu_jax.config import UserError
from qnpu_jax.decoder import Decoder
from qnpu_jax.graph import Graph, Node, TensorSpec
from qnpu_jax.ops import WIDENING, BatchMatmul, FullyConnected, Requantize


@dataclass(frozen=True)
class Bound:
    """The proved interval of one op's accumulator.

    Attributes:
      tensor: the op's output, by global name with the layer's number.
      low, high: in codes; an input reaches each.
      available: bits of the accumulator.
      input_bits: of the op's first input, widened where the plan has it so.
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
        return max(self.high.bit_length(), (-self.low - 1).bit_length() if self.low < 0 else 0) + 1


def proved_bounds(
    dec: Decoder, codes: Mapping[str, np.ndarray], zero_point: Mapping[str, np.ndarray]
) -> list[Bound]:
    """One bound per FULLY_CONNECTED and BATCH_MATMUL and layer, by global name.

    Args:
      codes: integer weights and biases by global name, as in `IntegerModel`.
      zero_point: by global name.
    """
    return [
        bound
        for graph in dec.graphs
        for layer in range(graph.layers)
        for bound in _graph_bounds(graph, layer, codes, zero_point)
    ]


def _graph_bounds(
    graph: Graph, layer: int, codes: Mapping[str, np.ndarray], zero_point: Mapping[str, np.ndarray]
) -> Iterator[Bound]:
    layered = graph.prefix == "layers."
    producer = {n.output: n for n in graph.nodes}

    def at(values: Mapping[str, np.ndarray], name: str) -> Any:
        array = values[graph.prefix + name]
        return array[layer] if layered else array

    def interval(name: str) -> tuple[int, int]:
        """Reachable values of code - zero point; of a widened tensor, those of its source made
        wider."""
        node: Node | None = producer.get(name)
        if node is not None and isinstance(node.op, Requantize):
            source = node.inputs[0]
            if _bits(graph[source], layer) < _bits(graph[name], layer):
                low, high = interval(source)
                return WIDENING * low, WIDENING * high
        low, high = _limits(graph[name], layer)
        zero = int(at(zero_point, name))
        return low - zero, high - zero

    for node in graph.nodes:
        name = f"layers.{layer}.{node.output}" if layered else graph.prefix + node.output
        match node.op:
            case FullyConnected():
                x, w, b = node.inputs
                bits, available = (_bits(graph[n], layer) for n in (x, b))
                low, high = _linear(at(codes, w), at(codes, b), *interval(x))
                yield Bound(name, "FULLY_CONNECTED", low, high, available, bits)
            case BatchMatmul():
                x, y = node.inputs
                largest = [max(abs(v) for v in interval(n)) for n in (x, y)]
                reach = largest[0] * largest[1] * graph[x].shape[2]
                bits = _bits(graph[x], layer)
                available = 32 if bits <= 8 else 64
                yield Bound(name, "BATCH_MATMUL", -reach, reach, available, bits)
            case _:
                pass


def _linear(
    w: Int[np.ndarray, "n k"], b: Int[np.ndarray, " n"], low: int, high: int
) -> tuple[int, int]:
    """Smallest and largest accumulator over all rows."""
    positive = np.where(w > 0, w, 0).sum(axis=1, dtype=np.int64)
    negative = w.sum(axis=1, dtype=np.int64) - positive
    ends = (positive * low + negative * high + b, positive * high + negative * low + b)
    return int(ends[0].min()), int(ends[1].max())


def _bits(spec: TensorSpec, layer: int) -> int:
    assert spec.quant is not None
    return spec.quant.bits[layer]


def _limits(spec: TensorSpec, layer: int) -> tuple[int, int]:
    bits = _bits(spec, layer)
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def check(bounds: list[Bound]) -> None:
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
    """The ops whose interval does not fit a two's-complement accumulator of `bits` bits, in the
    order given: on [-2^(bits-1), 2^(bits-1) - 1] all others neither wrap nor saturate, whatever the
    input. What these have available (`Bound.available`) plays no part."""
    return [bound for bound in bounds if bound.needed > bits]


def narrow_biases(bounds: list[Bound]) -> dict[str, int]:
    """Bits of the 64-bit biases whose linears provably need no more than 32, by name; by a pattern
    where that holds for all layers."""
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
    """What gives a linear a 64-bit accumulator: its bias is as wide as that, and LiteRT reads a
    64-bit bias beside a 16-bit input only, which a 16-bit output brings about."""
    wide = f"give {tensor} 16 bits and" if input_bits <= 8 else "give"
    return f"{wide} {_bias(tensor)} 64 bits"


def _bias(linear: str) -> str:
    return "head.bias" if linear == "head.logits" else f"{linear}.bias"
