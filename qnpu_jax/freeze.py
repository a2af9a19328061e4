"""Rounding, once: float parameters and scales become an `IntegerModel`, which the simulator and the
writer read.

Everything a device needs is in it: codes of weights, biases and prefix, and scale and zero point of
every tensor. Nothing in it depends on a sequence length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from qnpu_jax.accumulators import check, narrow_biases, proved_bounds, wider_linear
from qnpu_jax.config import BitPlan, ModelConfig, UserError
from qnpu_jax.decoder import MASK, Decoder, decoder, layer_inputs
from qnpu_jax.evaluate import Params
from qnpu_jax.graph import Graph, Node, TensorSpec
from qnpu_jax.ops import AddMask, FullyConnected
from qnpu_jax.quant import QParams, Scales, expand, quantize
from qnpu_jax.resolve import resolve

FORMAT = 3
"""Version of the stored form; a reader refuses any other."""


@dataclass(frozen=True, eq=False)
class IntegerModel:
    """A frozen quantized decoder.

    Attributes:
      codes: integer codes by global name: weights (int8; 4-bit codes in int8 arrays), biases (int32
        or int64), prefix K/V (int8). Arrays of `layers.*` have a leading layer axis.
      scale: float32 by global name of every quantized tensor: (L,) or (L, channels) in `layers.*`.
      zero_point: int32, of the same shapes without channels.
      prefix: token ids whose K/V are constants of the graph.
    """

    config: ModelConfig
    plan: BitPlan
    prefix: tuple[int, ...]
    codes: dict[str, np.ndarray]
    scale: dict[str, np.ndarray]
    zero_point: dict[str, np.ndarray]

    def decoder(self, tokens: int, cache: int = 0, logits: Any = "all") -> Decoder:
        """The graphs for `tokens` new positions after the prefix and `cache` slots."""
        return decoder(self.config, self.plan, tokens, len(self.prefix), cache, logits)

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        """Codes of a graph's parameters in one layer, by local name: int8, biases as wide as the
        plan has them in this layer (the stack of all layers is as wide as the widest)."""
        codes = {}
        for spec in graph.named("param"):
            assert spec.quant is not None
            own = _layers(graph, self.codes[graph.prefix + spec.name])[layer]
            codes[spec.name] = own.astype(np.int32) if spec.quant.bits[layer] == 32 else own
        return codes

    def inputs(self, dec: Decoder, filled: int = 0) -> dict[str, np.ndarray]:
        """Codes of the inputs that all layers share, by local name: int16, an 8-bit mask int8."""
        real = layer_inputs(dec, filled)
        codes = {}
        for name, x in real.items():
            spec = dec.layer[name]
            assert spec.fixed is not None and spec.quant is not None
            dtype = np.int8 if spec.quant.bits[0] == 8 else np.int16
            codes[name] = quantize(x, np.float64(spec.fixed[0]), np.int64(0), spec).astype(dtype)
        return codes


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
      free: QParams of every free tensor (`resolve.is_free`).
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


def dequantize(model: IntegerModel) -> dict[str, np.ndarray]:
    """Real values (float32) of weights, biases and prefix K/V: code times scale.

    With `activation_scales` they make the fake-quantized model that the integers came from.
    """
    out = {}
    for graph in model.decoder(1).graphs:
        for spec in graph.named("param"):
            name = graph.prefix + spec.name
            codes, scale = model.codes[name], model.scale[name]
            scale = scale.reshape(scale.shape + (1,) * (codes.ndim - scale.ndim))
            out[name] = (codes * scale.astype(np.float64)).astype(np.float32)
    return out


def activation_scales(model: IntegerModel) -> Scales:
    """QParams of every activation and input, without those of parameters."""
    names = [g.prefix + t.name for g in model.decoder(1).graphs for t in g.tensors]
    return {
        name: QParams(scale=model.scale[name], zero_point=model.zero_point[name].astype(np.float32))
        for name in names
        if name in model.scale and name not in model.codes
    }


def _layers(graph: Graph, x: np.ndarray) -> np.ndarray:
    return x if graph.prefix == "layers." else np.asarray(x)[None]


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


def save(model: IntegerModel, folder: Path) -> None:
    """Writes `integer_model.safetensors` (codes, scales, zero points) and `integer_model.json` (the
    rest)."""
    arrays = {
        **{f"codes/{n}": x for n, x in model.codes.items()},
        **{f"scale/{n}": x for n, x in model.scale.items()},
        **{f"zero_point/{n}": x for n, x in model.zero_point.items()},
    }
    arrays = {n: np.asarray(x, order="C") for n, x in arrays.items()}  # keeps 0-d arrays 0-d
    (folder / "integer_model.safetensors").write_bytes(safetensors.numpy.save(arrays))
    meta = {
        "format": FORMAT,
        "config": model.config.to_json(),
        "bits": [list(r) for r in model.plan.rules],
        "prefix": list(model.prefix),
    }
    (folder / "integer_model.json").write_text(json.dumps(meta, indent=1) + "\n")


def load(folder: Path) -> IntegerModel:
    """Reads what `save` wrote.

    Raises:
      UserError: a missing, truncated or foreign file.
    """
    path, tensors = folder / "integer_model.json", folder / "integer_model.safetensors"
    for file in (path, tensors):
        if not file.is_file():
            raise UserError(
                f"{file}: missing; expected an output folder of `qnpu quantize`; run it again"
            )
    try:
        meta = json.loads(path.read_text())
        arrays = safetensors.numpy.load_file(tensors)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error}); run `qnpu quantize` again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        got = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise UserError(f"{path}: format {got}, expected {FORMAT}; run `qnpu quantize` again")

    def group(kind: str) -> dict[str, np.ndarray]:
        return {n.split("/", 1)[1]: x for n, x in arrays.items() if n.startswith(kind + "/")}

    try:
        plan = BitPlan(tuple((str(p), int(b)) for p, b in meta["bits"]))
        config, prefix = ModelConfig.from_json(meta["config"]), tuple(meta["prefix"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error!r}); run `qnpu quantize` again") from None
    model = IntegerModel(config, plan, prefix, group("codes"), group("scale"), group("zero_point"))
    for graph in model.decoder(1, 1).graphs:
        for spec in graph.tensors:
            kinds = ("codes",) * (spec.kind == "param") + ("scale", "zero_point")
            for name in (f"{kind}/{graph.prefix}{spec.name}" for kind in kinds):
                if spec.quant is not None and name not in arrays:
                    raise UserError(
                        f"{tensors}: has no {name}, which {path.name} speaks of; the two are not of"
                        " one run; run `qnpu quantize` again"
                    )
    return model
