"""The constants of every op of a layer, from a model's integers by a profile's rules."""

from __future__ import annotations

from collections.abc import Callable
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
from qnpu_sim.rounding import Rules


def dtype_of(spec: TensorSpec, layer: int) -> np.dtype:
    """int8 for codes of up to 8 bits, int16 above."""
    assert spec.quant is not None
    return np.dtype(np.int8 if spec.quant.bits[layer] <= 8 else np.int16)


def narrow_source(graph: Graph, name: str, layer: int) -> str:
    """The 8-bit tensor that `name` was widened from (exactly), or `name`."""
    producer = next((n for n in graph.nodes if n.output == name), None)
    if producer is None or not isinstance(producer.op, Requantize):
        return name
    source, target = graph[producer.inputs[0]].quant, graph[name].quant
    assert source is not None and target is not None
    widens = source.bits[layer] == 8 and target.bits[layer] == 16
    return producer.inputs[0] if widens else name


def _at(array: np.ndarray, graph: Graph, layer: int) -> Any:
    return array[layer] if graph.prefix == "layers." else array[()]


def tight_sums(model: IntegerModel, dec: Any, rules: Rules) -> frozenset[str]:
    """Outputs of ops whose sums are not proved to fit the profile's accumulators, by global name.

    Raises:
      UserError: there are some, and the profile does not say what happens to them; or a sum passes
        what the file and the profile's kernels have for it.
    """
    intermediates.check(intermediates.proved_intermediates(dec, model.zero_point))
    bits = rules.accumulator_bits
    int4 = _int4_linears(dec) if rules.xnnpack else frozenset()
    # Of linears, `freeze` has proved that they fit what the file has for them.
    proved = bits is None and rules.rescaled_bits == 64 and not int4
    bounds = accumulators.proved_bounds(dec, model.codes, model.zero_point, linears=not proved)
    if bits is None:
        accumulators.check(bounds)
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
    """Outputs of what XNNPACK may take with int4 weights."""
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
    assert quant is not None
    return quant.bits[layer]


def _too_wide(passing: list[Bound], got: str, way_out: str) -> UserError:
    worst = max(passing, key=lambda b: b.needed)
    return UserError(
        f"{worst.tensor}: its accumulator ({worst.op}) can reach [{worst.low}, {worst.high}], which"
        f" needs {worst.needed} bits; {got}; {len(passing)} ops are past it: {way_out}"
    )


def constants_of(
    model: IntegerModel,
    graph: Graph,
    layer: int,
    codes: dict[str, np.ndarray],
    rules: Rules,
    tight: frozenset[str],
) -> dict[str, Any]:
    def scale(name: str) -> Any:
        return _at(model.scale[graph.prefix + name], graph, layer)

    def pair(name: str) -> tuple[Any, int]:
        return scale(name), int(_at(model.zero_point[graph.prefix + name], graph, layer))

    made = {}
    for node in graph.nodes:
        if not is_identity(graph, node, layer):
            name = graph.global_name(layer, node.output)
            try:
                constants = _prepare(graph, node, layer, codes, rules, name in tight, scale, pair)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            if constants is not None:
                made[node.output] = constants
    return made


def _prepare(
    graph: Graph,
    node: Node,
    layer: int,
    codes: dict[str, np.ndarray],
    rules: Rules,
    tight: bool,
    scale: Callable[[str], Any],
    pair: Callable[[str], tuple[Any, int]],
) -> Any:
    names, out = node.inputs, node.output
    if isinstance(node.op, Embedding | Reshape | Transpose | Slice | Concat):
        return None
    dtype = dtype_of(graph[names[0]], layer)
    match node.op:
        case FullyConnected():
            weights = graph[names[1]].quant
            assert weights is not None
            return op_constants.prepare_fully_connected(
                rules,
                dtype,
                codes[names[1]],
                codes[names[2]],
                *pair(names[0]),
                scale(names[1]),
                *pair(out),
                weight_bits=weights.bits[layer],
                tight=tight,
            )
        case BatchMatmul():
            x, y = (pair(operand(graph, n, layer, tight)) for n in names)
            return op_constants.prepare_batch_matmul(rules, dtype, *x, *y, *pair(out), tight=tight)
        case Add() | AddMask():
            return op_constants.prepare_add(
                rules, dtype, *pair(names[0]), *pair(names[1]), *pair(out)
            )
        case Mul() | Keep():
            return op_constants.prepare_mul(
                rules, dtype, *pair(names[0]), *pair(names[1]), *pair(out)
            )
        case Requantize():
            output = dtype_of(graph[out], layer)
            return op_constants.prepare_quantize(rules, dtype, output, *pair(names[0]), *pair(out))
        case Softmax() if dtype == np.int8:
            return op_constants.prepare_softmax_int8(rules, scale(names[0]))
        case Softmax():
            return op_constants.prepare_softmax_int16(rules, scale(names[0]))
        case Logistic() | Sqrt() | Rsqrt():
            kind: Any = type(node.op).__name__.lower()
            return op_constants.prepare_unary(kind, rules, dtype, *pair(names[0]), *pair(out))
        case _:
            assert_never(node.op)


def operand(graph: Graph, name: str, layer: int, tight: bool) -> str:
    """What a BATCH_MATMUL multiplies: the byte behind a widened operand (`narrow_source`), but
    where its sum is limited and so has to be the file's own."""
    return name if tight else narrow_source(graph, name, layer)
