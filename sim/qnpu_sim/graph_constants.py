"""Constants of every op of a layer, made from a model's integers by a profile's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    Embedding,
    FullyConnected,
    Gelu,
    Graph,
    Keep,
    Logistic,
    Mul,
    Node,
    Requantize,
    Reshape,
    Rsqrt,
    Slice,
    Softmax,
    Sqrt,
    TensorSpec,
    Transpose,
    is_identity,
)
from qnpu_jax.integer import Bound, IntegerModel, accumulators, intermediates
from qnpu_sim import op_constants, xnnpack
from qnpu_sim.op_constants import QuantizedType, Weights
from qnpu_sim.rounding import Rules


def dtype_of(spec: TensorSpec, layer: int) -> np.dtype:
    """Type of a tensor's codes in one layer: int8 up to 8 bits, int16 above."""
    return np.dtype(np.int8 if spec.quant.bits[layer] <= 8 else np.int16)


def narrow_source(graph: Graph, name: str, layer: int) -> str:
    """Name of the 8-bit tensor that a 16-bit one was widened from, exactly (`graph.WIDENING`);
    `name` itself if there is none."""
    producer = next((n for n in graph.nodes if n.output == name), None)
    if producer is None or not isinstance(producer.op, Requantize):
        return name
    source, target = graph[producer.inputs[0]].quant, graph[name].quant
    widens = source.bits[layer] == 8 and target.bits[layer] == 16
    return producer.inputs[0] if widens else name


def tight_sums(model: IntegerModel, dec: Any, rules: Rules) -> frozenset[str]:
    """Finds the sums that are not proved to fit the profile's accumulators.

    Args:
      dec: the graphs (`IntegerModel.decoder`).

    Returns:
      Global names of the outputs of their ops; empty for a profile without `accumulator_bits`.

    Raises:
      UserError: there are such sums, and the profile's `overflow` is `error`; or a sum does not fit
        the accumulator that the file and the profile's kernels have for it.
    """
    intermediates.check_intermediates(intermediates.proved_intermediates(dec, model.tensors))
    bits = rules.accumulator_bits
    int4 = _int4_linears(dec) if rules.xnnpack else frozenset()
    # `freeze` has proved that the sums of linears fit the accumulators that the file has for them.
    proved = bits is None and rules.rescaled_bits == 64 and not int4
    bounds = accumulators.proved_bounds(dec, model.tensors, linears=not proved)
    if bits is None:
        accumulators.check_accumulators(bounds)
        if passing := accumulators.overflowing(bounds, rules.rescaled_bits):
            takes = f"this profile's requantization takes {rules.rescaled_bits}"
            raise _too_wide(passing, takes, "choose a shorter length, or narrower codes")
        narrow = [b for b in bounds if b.tensor in int4]
        if passing := accumulators.overflowing(narrow, xnnpack.INT4_BITS):
            takes = f"XNNPACK has {xnnpack.INT4_BITS} beside int4 weights"
            raise _too_wide(passing, takes, "choose profile litert_opt, or weights of 8 bits")
        return frozenset()
    passing = accumulators.overflowing(bounds, bits)
    if passing and rules.overflow == "error":
        options = "widen it, or choose overflow='wrap' or 'saturate'"
        raise _too_wide(passing, f"got accumulator_bits={bits}", options)
    return frozenset(b.tensor for b in passing)


def _int4_linears(dec: Any) -> frozenset[str]:
    """Global names of the outputs of linears with 8-bit input and int4 weights, which XNNPACK may
    take."""
    return frozenset(
        graph.global_name(layer, node.output)
        for graph in dec.graphs
        for layer in range(graph.layers)
        for node in graph.nodes
        if isinstance(node.op, FullyConnected)
        and _bits(graph, node.inputs[0], layer) == 8
        and _bits(graph, node.inputs[1], layer) == 4
    )


def _bits(graph: Graph, name: str, layer: int) -> int:
    quant = graph[name].quant
    return quant.bits[layer]


def _too_wide(passing: list[Bound], got: str, way_out: str) -> UserError:
    worst = max(passing, key=lambda b: b.needed)
    return UserError(
        f"{worst.tensor}: its accumulator ({worst.op}) can reach [{worst.low}, {worst.high}], which"
        f" needs {worst.needed} bits; {got}; {len(passing)} ops are past it: {way_out}"
    )


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer of a graph, with everything that the constants of its ops are made from.

    Attributes:
      codes: of parameters and shared inputs by local name.
      tight: `tight_sums`.
    """

    model: IntegerModel
    graph: Graph
    index: int
    codes: dict[str, np.ndarray]
    rules: Rules
    tight: frozenset[str]

    def global_name(self, name: str) -> str:
        """`layers.3.attn.q` of `attn.q`."""
        return self.graph.global_name(self.index, name)

    def scale(self, name: str) -> Any:
        """float32: a scalar, or one value per channel of weights."""
        return self.graph.at(self.model.tensors[self.graph.prefix + name].scale, self.index)[()]

    def type_of(self, name: str) -> QuantizedType:
        """Quantization of an activation or input."""
        tensor = self.model.tensors[self.graph.prefix + name]
        zero_point = int(self.graph.at(tensor.zero_point, self.index))
        bits = self.graph[name].quant.bits[self.index]
        return QuantizedType(self.scale(name), zero_point, bits)

    def weights(self, name: str, bias: str) -> Weights:
        """Constant operands of a FULLY_CONNECTED."""
        bits = self.graph[name].quant.bits[self.index]
        return Weights(self.codes[name], self.codes[bias], self.scale(name), bits)

    def factor(self, name: str, tight: bool) -> QuantizedType:
        """Quantization of an operand of BATCH_MATMUL: its own bits, and scale and zero point of the
        tensor that is multiplied in its place (`matmul_operand`)."""
        multiplied = self.type_of(matmul_operand(self.graph, name, self.index, tight))
        return multiplied._replace(bits=self.type_of(name).bits)


def constants_of(
    model: IntegerModel,
    graph: Graph,
    layer: int,
    codes: dict[str, np.ndarray],
    rules: Rules,
    tight: frozenset[str],
) -> dict[str, Any]:
    """Makes the kernels' constants of one layer.

    Args:
      codes: of parameters and shared inputs, by local name.
      tight: `tight_sums` of the same rules.

    Returns:
      By local name of the op's output. Ops that move codes have none, nor have identities.

    Raises:
      UserError: the profile cannot represent an op; its global name comes first.
    """
    own = _Layer(model, graph, layer, codes, rules, tight)
    made = {}
    for node in graph.nodes:
        if not is_identity(graph, node, layer):
            try:
                constants = _prepare(own, node)
            except UserError as error:
                raise UserError(f"{own.global_name(node.output)}: {error}") from None
            if constants is not None:
                made[node.output] = constants
    return made


def _prepare(layer: _Layer, node: Node) -> Any:
    """Constants of one op; None for an op that only moves codes."""
    names, rules = node.inputs, layer.rules
    tight = layer.global_name(node.output) in layer.tight
    if isinstance(node.op, Embedding | Reshape | Transpose | Slice | Concat):
        return None
    out = layer.type_of(node.output)
    match node.op:
        case FullyConnected():
            x, weights = layer.type_of(names[0]), layer.weights(*names[1:])
            return op_constants.prepare_fully_connected(x, weights, out, rules, tight=tight)
        case BatchMatmul():
            x, y = (layer.factor(n, tight) for n in names)
            return op_constants.prepare_batch_matmul(x, y, out, rules, tight=tight)
        case Add() | AddMask():
            x, y = (layer.type_of(n) for n in names)
            return op_constants.prepare_add(x, y, out, rules)
        case Mul() | Keep():
            x, y = (layer.type_of(n) for n in names)
            return op_constants.prepare_mul(x, y, out, rules)
        case Requantize():
            return op_constants.prepare_quantize(layer.type_of(names[0]), out, rules)
        case Softmax() if layer.type_of(names[0]).narrow:
            return op_constants.prepare_softmax_int8(layer.scale(names[0]), rules)
        case Softmax():
            return op_constants.prepare_softmax_int16(layer.scale(names[0]), rules)
        case Logistic() | Gelu() | Sqrt() | Rsqrt():
            kind: Any = type(node.op).__name__.lower()
            return op_constants.prepare_unary(kind, layer.type_of(names[0]), out, rules)
        case _:
            assert_never(node.op)


def matmul_operand(graph: Graph, name: str, layer: int, tight: bool) -> str:
    """Name of the tensor that a BATCH_MATMUL multiplies in place of an operand: the 8-bit tensor
    that it was widened from (`narrow_source`).

    A `tight` sum is limited product by product, so its products have to be the file's: it
    multiplies the operand itself.
    """
    return name if tight else narrow_source(graph, name, layer)
