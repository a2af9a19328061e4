"""The frozen quantized decoder: integer codes, scales and zero points by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.graph import (
    Decoder,
    Graph,
    QParams,
    Scales,
    decoder,
    layer_inputs,
    quantize,
)


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
