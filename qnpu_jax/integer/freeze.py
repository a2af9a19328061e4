"""Rounding, once: float parameters and scales become an `IntegerModel`, which the simulator and the
writer read.

Everything a device needs is in it: codes of weights, biases and prefix, and scale and zero point of
every tensor. Nothing in it depends on a sequence length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax
import numpy as np

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    MASK,
    AddMask,
    Decoder,
    FullyConnected,
    Graph,
    Node,
    Params,
    Scales,
    TensorSpec,
    decoder,
    expand,
    quantize,
    resolve,
)
from qnpu_jax.integer.accumulators import check, narrow_biases, proved_bounds, wider_linear
from qnpu_jax.integer.model import IntegerModel, _layers


def check_bits(dec: Decoder) -> None:
    """Raises UserError for a tensor whose bits no kernel has.

    Kernels take 4 or 8-bit weights, 32 or 64-bit biases and 8 or 16-bit activations; what enters an
    activation as a constant (embedding, prefix) is stored in 8 bits.
    """
    for graph in dec.graphs:
        for spec in graph.tensors:
            if re.search(r"\.i\d+$", spec.name):
                continue  # widened for a tensor that is checked too
            allowed = _allowed_bits(graph.prefix, spec)
            for bits in spec.quant.bits if spec.quant else ():
                if bits not in allowed:
                    raise UserError(
                        f"{graph.prefix}{spec.name}: the bit plan gives it {bits} bits; expected"
                        f" {' or '.join(map(str, allowed))}; correct the rule that matches it"
                    )


def _allowed_bits(prefix: str, spec: TensorSpec) -> tuple[int, ...]:
    match spec.kind, spec.name.rpartition(".")[2]:
        case "param", "bias":
            return (32, 64)
        case "param", "weight" if prefix != "embed.":
            return (4, 8)
        case "param", _:
            return (8,)
        case _:
            return (8, 16)


def freeze(dec: Decoder, params: Params, free: Scales, prefix: tuple[int, ...]) -> IntegerModel:
    """Rounds weights, biases and prefix to codes at the given scales.

    code = clip(round(w / s)), half to even; bias code = round(b / (s_x s_w)), s_x s_w in float32.

    Args:
      dec: staged for any length, with the prefix's.
      params: folded float parameters by global name.
      free: QParams of every free tensor (`scales.is_free`).
      prefix: the token ids behind `layers.attn.prefix_*`.

    Raises:
      UserError: bits that no kernel has (`check_bits`), a non-finite parameter or scale, a bias
        that does not fit its bits, an accumulator that can overflow (`accumulators`).
    """
    check_bits(dec)
    # A cache, and logits of the last position alone, have tensors of their own, which these scales
    # must know too.
    every = decoder(dec.config, dec.plan, 1, dec.prefix, 1, "last")
    resolved = jax.tree.map(np.asarray, resolve(every, free))
    scale = {n: np.asarray(q.scale, np.float32) for n, q in resolved.items()}
    zero_point = {n: np.asarray(np.rint(q.zero_point), np.int32) for n, q in resolved.items()}
    for name, s in scale.items():
        if not (np.isfinite(s).all() and (s > 0).all()):
            raise UserError(
                f"{name}: scale must be finite and positive, got {s.ravel()[:4]}; calibrate again"
            )
    check_mask(dec, scale)
    codes: dict[str, np.ndarray] = {}
    for graph in dec.graphs:
        _freeze_weights(graph, params, scale, zero_point, codes)
        _freeze_biases(graph, params, scale, zero_point, codes)
    plan, codes = _narrow_biases(dec, codes, zero_point)
    return IntegerModel(dec.config, plan, tuple(prefix), codes, scale, zero_point)


def check_mask(dec: Decoder, scale: Mapping[str, np.ndarray]) -> None:
    """Raises UserError where the highest score, masked, would not be the lowest code: where it lies
    above -2^(b-1) times the scale of masked scores."""
    quant = dec.layer["mask"].quant
    assert quant is not None
    bits = quant.bits[0]
    top = 2 ** (bits - 1)
    for node in dec.layer.nodes:
        if isinstance(node.op, AddMask):
            scores, masked = (scale[f"layers.{n}"] for n in (node.inputs[0], node.output))
            highest = (top - 1) * scores + MASK[bits] + top * masked
            if highest.max() > 0:
                layer = int(highest.argmax())
                raise UserError(
                    f"layers.{layer}.{node.inputs[0]}: scores reach"
                    f" {(top - 1) * scores[layer]:.0f}, which the {bits}-bit mask of"
                    f" {MASK[bits]:.0f} does not hide; expected at most"
                    f" about {-MASK[bits] / 2:.0f}; give *.scores, *.masked and *.softmax 16 bits"
                    " in the bit plan, or calibrate on other text"
                )


def _narrow_biases(
    dec: Decoder, codes: dict[str, np.ndarray], zero_point: dict[str, np.ndarray]
) -> tuple[BitPlan, dict[str, np.ndarray]]:
    """The plan and codes with 32 bits for a 64-bit bias wherever its linear provably needs no more:
    CPU kernels then accumulate in 32 bits, several times as fast.

    Raises:
      UserError: an accumulator can overflow.
    """
    bounds = proved_bounds(dec, codes, zero_point)
    check(bounds)
    biases = {
        g.prefix + t.name: [g.global_name(i, t.name) for i in range(g.layers)]
        for g in dec.graphs
        for t in g.named("param")
        if t.name.endswith("bias")
    }
    names = [n for every in biases.values() for n in every]
    plan = dec.plan.replaced(narrow_biases(bounds), names)
    narrowed = dict(codes)
    for name, every in biases.items():
        wide = any(plan.bits(n) == 64 for n in every)
        narrowed[name] = codes[name].astype(np.int64 if wide else np.int32)
    return plan, narrowed


def _stack(graph: Graph, rows: list[np.ndarray]) -> np.ndarray:
    return np.stack(rows) if graph.prefix == "layers." else rows[0]


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    if not np.isfinite(x).all():
        raise UserError(f"{name}: holds NaN or Inf; expected finite values; check the model file")
    return x


def _freeze_weights(
    graph: Graph,
    params: Params,
    scale: dict[str, np.ndarray],
    zero_point: dict[str, np.ndarray],
    codes: dict[str, np.ndarray],
) -> None:
    for spec in graph.named("param"):
        name = graph.prefix + spec.name
        if name not in scale:
            continue
        w = _layers(graph, np.asarray(params[name]))
        rows = [
            quantize(_finite(name, layer), expand(s, spec), np.int64(0), spec, i).astype(np.int8)
            for i, (layer, s) in enumerate(zip(w, _layers(graph, scale[name]), strict=True))
        ]
        codes[name] = _stack(graph, rows)
        if spec.quant is not None and spec.quant.axis is not None:
            zero_point[name] = zero_point[name][..., 0]


def _freeze_biases(
    graph: Graph,
    params: Params,
    scale: dict[str, np.ndarray],
    zero_point: dict[str, np.ndarray],
    codes: dict[str, np.ndarray],
) -> None:
    for node in graph.nodes:
        if not isinstance(node.op, FullyConnected):
            continue
        x, w, b = (graph.prefix + n for n in node.inputs)
        spec = graph[node.inputs[2]]
        assert spec.quant is not None
        s_x = scale[x][..., None].astype(np.float64)
        scale[b] = (s_x * scale[w].astype(np.float64)).astype(np.float32)
        zero_point[b] = np.zeros_like(zero_point[x])
        values = np.rint(
            _finite(b, np.asarray(params[b], np.float64)) / scale[b].astype(np.float64)
        )
        _check_bias_codes(graph, node, values)
        codes[b] = values.astype(np.int32 if max(spec.quant.bits) == 32 else np.int64)


def _check_bias_codes(graph: Graph, node: Node, values: np.ndarray) -> None:
    """Raises UserError for codes (L, out), or (out,), that their bits do not hold."""
    x, _, b = (graph[n].quant for n in node.inputs)
    assert x is not None and b is not None
    for i, codes in enumerate(_layers(graph, values)):
        if (worst := np.abs(codes).max()) >= 2.0 ** (b.bits[i] - 1):
            where = f"layers.{i}." if graph.prefix == "layers." else graph.prefix
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
