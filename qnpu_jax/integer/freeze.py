"""Freezing: float parameters and scales are rounded once, to an `IntegerModel`.

The simulator and the writer read only that object. It holds the codes of weights, biases and
prefix, and scale and zero point of every tensor. Nothing in it depends on a sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    Decoder,
    FullyConnected,
    Graph,
    Node,
    Params,
    QParams,
    Scales,
    TensorSpec,
    decoder,
    expand,
    is_constant,
    is_widened,
    quantize,
    resolve,
)
from qnpu_jax.integer.accumulators import (
    check_accumulators,
    narrow_biases,
    proved_bounds,
    wider_linear,
)
from qnpu_jax.integer.model import IntegerModel, QTensor, blocks


def check_bits(dec: Decoder) -> None:
    """Raises UserError for a tensor whose bits no kernel has.

    Kernels take 4 or 8-bit weights, 32 or 64-bit biases, and activations and constants beside them
    of 8 or 16 bits. Constants that become activations (embedding table, prefix K/V) have 8 bits.
    """
    for graph in dec.graphs:
        for spec in graph.tensors:
            if is_widened(spec.name):
                continue  # widened for a tensor that is checked too
            allowed = allowed_bits(graph.prefix, spec)
            for layer, bits in enumerate(spec.quant.bits):
                if bits not in allowed:
                    raise UserError(
                        f"{graph.global_name(layer, spec.name)}: the bit plan gives it"
                        f" {bits} bits; expected {' or '.join(map(str, allowed))}; correct the"
                        " rule that matches it"
                    )


def allowed_bits(prefix: str, spec: TensorSpec) -> tuple[int, ...]:
    """Widths that kernels have for a tensor of the graph with this prefix."""
    match spec.kind, spec.name.rpartition(".")[2]:
        case "param", "bias":
            return (32, 64)
        case "param", "weight" if prefix != "embed.":
            return (4, 8)
        case "param", _ if is_constant(spec):
            return (8, 16)
        case "param", _:
            return (8,)
        case _:
            return (8, 16)


def freeze(dec: Decoder, params: Params, free: Scales, prefix: tuple[int, ...]) -> IntegerModel:
    """Rounds weights, biases and prefix to codes at the given scales.

    code = clip(round(w / s)), half to even; bias code = round(b / (s_x s_w)), s_x s_w in float32.

    Args:
      dec: graphs of any length, staged with the prefix.
      params: folded float parameters by stacked global name.
      free: QParams of every free tensor (`scales.is_free`).
      prefix: token ids whose keys and values are `layers.attn.prefix_k` and `prefix_v`.

    Raises:
      UserError: bits that no kernel has (`check_bits`), a non-finite parameter or scale, a bias
        that does not fit its bits, an accumulator that can overflow (`accumulators`).
    """
    check_bits(dec)
    # A cache, and logits of the last position alone, have tensors of their own, which these scales
    # must know too.
    every = decoder(dec.config, dec.plan, 1, dec.prefix, 1, "last")
    resolved = jax.tree.map(np.asarray, resolve(every, free))
    tensors = {name: _integer(name, q) for name, q in resolved.items()}
    for graph in dec.graphs:
        tensors |= _freeze_weights(graph, params, tensors)
        tensors |= _freeze_biases(graph, params, tensors)
    plan, narrowed = _narrow_biases(dec, tensors)
    return IntegerModel(dec.config, plan, tuple(prefix), tensors | narrowed)


def _integer(name: str, q: QParams) -> QTensor:
    """Casts a scale to float32 and a zero point to int32.

    Raises:
      UserError: a scale is not finite and positive.
    """
    scale = np.asarray(q.scale, np.float32)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise UserError(
            f"{name}: scale must be finite and positive, got {scale.ravel()[:4]}; calibrate again"
        )
    return QTensor(scale=scale, zero_point=np.asarray(np.rint(q.zero_point), np.int32))


def _narrow_biases(
    dec: Decoder, tensors: Mapping[str, QTensor]
) -> tuple[BitPlan, dict[str, QTensor]]:
    """Narrows 64-bit biases to 32 bits wherever the linear provably needs no more.

    CPU kernels then accumulate in 32 bits, several times as fast.

    Returns:
      The plan with their bits, and the biases by stacked global name.

    Raises:
      UserError: an accumulator can overflow.
    """
    bounds = proved_bounds(dec, tensors)
    check_accumulators(bounds)
    biases = {
        g.prefix + t.name: [g.global_name(i, t.name) for i in range(g.layers)]
        for g in dec.graphs
        for t in g.named("param")
        if t.name.endswith("bias")
    }
    names = [n for every in biases.values() for n in every]
    plan = dec.plan.replaced(narrow_biases(bounds), names)
    narrowed = {}
    for name, every in biases.items():
        dtype = np.int64 if any(plan.bits(n) == 64 for n in every) else np.int32
        narrowed[name] = replace(tensors[name], codes=tensors[name].codes.astype(dtype))
    return plan, narrowed


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    if not np.isfinite(x).all():
        raise UserError(f"{name}: holds NaN or Inf; expected finite values; check the model file")
    return x


def _freeze_weights(
    graph: Graph, params: Params, tensors: Mapping[str, QTensor]
) -> dict[str, QTensor]:
    """Rounds weights, gammas and prefix K/V: tensors with codes, by stacked global name."""
    frozen = {}
    for spec in graph.named("param"):
        name = graph.prefix + spec.name
        if name not in tensors:
            continue  # a bias
        real, tensor = np.asarray(params[name]), tensors[name]
        rows = []
        for i in range(graph.layers):
            layer, scale = _finite(name, graph.at(real, i)), graph.at(tensor.scale, i)
            rows.append(_codes(layer, np.broadcast_to(expand(scale, spec), layer.shape), spec, i))
        zero_point = tensor.zero_point if spec.quant.axis is None else tensor.zero_point[..., 0]
        frozen[name] = replace(tensor, codes=graph.stack(rows), zero_point=zero_point)
    return frozen


def _codes(real: np.ndarray, scales: np.ndarray, spec: TensorSpec, layer: int) -> np.ndarray:
    """Rounds a parameter of one layer, block by block: tables of a vocabulary are the largest
    arrays there are, and rounding makes float64 ones."""
    codes = np.empty(real.shape, np.int16 if max(spec.quant.bits) > 8 else np.int8)
    for block in blocks(real):
        codes[block] = quantize(real[block], scales[block], np.int64(0), spec, layer)
    return codes


def _freeze_biases(
    graph: Graph, params: Params, tensors: Mapping[str, QTensor]
) -> dict[str, QTensor]:
    """Rounds biases, round(b / (s_x s_w)) with the product in float32: by stacked global name."""
    frozen = {}
    for node in graph.nodes:
        if not isinstance(node.op, FullyConnected):
            continue
        x, w = (tensors[graph.prefix + n] for n in node.inputs[:2])
        name = graph.prefix + node.inputs[2]
        scale = x.scale[..., None].astype(np.float64) * w.scale.astype(np.float64)
        scale = scale.astype(np.float32)
        real = _finite(name, np.asarray(params[name], np.float64))
        values = np.rint(real / scale.astype(np.float64))
        _check_bias_codes(graph, node, values)
        wide = max(graph[node.inputs[2]].quant.bits) > 32
        codes = values.astype(np.int64 if wide else np.int32)
        frozen[name] = QTensor(scale=scale, zero_point=np.zeros_like(x.zero_point), codes=codes)
    return frozen


def _check_bias_codes(graph: Graph, node: Node, values: np.ndarray) -> None:
    """Raises UserError for bias codes, (L, out) or (out,), that their bits do not hold."""
    x, _, b = (graph[n].quant for n in node.inputs)
    for i in range(graph.layers):
        if (worst := np.abs(graph.at(values, i)).max()) >= 2.0 ** (b.bits[i] - 1):
            where = graph.global_name(i, "")
            way_out = (
                f"{wider_linear(where + node.output, x.bits[i])} in the bit plan"
                if b.bits[i] == 32 and worst < 2.0**63
                else f"a scale of {where}{node.inputs[0]} or {where}{node.inputs[1]} is next to 0;"
                " check them for values that are all 0"
            )
            raise UserError(
                f"{where}{node.inputs[2]}: code {worst:.0f} does not fit {b.bits[i]} bits;"
                f" {way_out}"
            )
