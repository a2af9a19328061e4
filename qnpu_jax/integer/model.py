"""The frozen quantized decoder: integer codes, scales and zero points by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import numpy as np

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.graph import (
    Decoder,
    Graph,
    QParams,
    Scales,
    decoder,
    layer_inputs,
    mask_codes,
    quantize,
    shared_names,
)

BLOCK = 2**23
"""Most elements of a parameter that are float64 at a time."""
HELD = {4: np.int8, 8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
"""Type that holds codes of so many bits."""


@flax.struct.dataclass(kw_only=True)
class QTensor:
    """A quantized tensor whole: real value = (codes - zero_point) scale.

    Arrays of `layers.*` have a leading layer axis; `Graph.at` gives one layer's.

    Attributes:
      scale: float32, real units per code, > 0: () for a tensor, (channels,) for per-channel scales.
      zero_point: int32, the code of real 0: ().
      codes: of a parameter: int8 weights (4-bit codes too) and prefix K/V, int8 or int16 gammas,
        int32 or int64 biases; None for a tensor that the graph computes or is fed.
    """

    scale: Any
    zero_point: Any
    codes: Any = None


@dataclass(frozen=True, eq=False, repr=False)
class IntegerModel:
    """A frozen quantized decoder.

    Attributes:
      plan: bits of every tensor; biases narrowed to what their linears provably need.
      prefix: token ids whose K/V are constants of the graph.
      tensors: every quantized tensor by stacked global name (`embed.*`, `layers.*`, `head.*`).
    """

    config: ModelConfig
    plan: BitPlan
    prefix: tuple[int, ...]
    tensors: dict[str, QTensor]

    def __repr__(self) -> str:
        c = self.config
        size = sum(x.nbytes for x in self.codes.values())
        return (
            f"IntegerModel({c.family}, {c.num_layers} layers of {c.hidden_size}, vocabulary"
            f" {c.vocab_size:,}, prefix {list(self.prefix)}, {len(self.tensors)} tensors,"
            f" {size / 1e6:.1f} MB of codes)"
        )

    @property
    def codes(self) -> dict[str, np.ndarray]:
        """Integer codes of the parameters by stacked global name."""
        return {n: t.codes for n, t in self.tensors.items() if t.codes is not None}

    def decoder(self, tokens: int, cache: int = 0, logits: Any = "all") -> Decoder:
        """Stages the graphs for `tokens` new positions after the prefix and `cache` slots."""
        return decoder(self.config, self.plan, tokens, len(self.prefix), cache, logits)

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        """Codes of a graph's parameters in one layer, by local name.

        Weights and prefix are int8. A bias or a constant is as wide as the plan has it in this
        layer; the stack of all layers is as wide as its widest.
        """
        codes = {}
        for spec in graph.named("param"):
            own = graph.at(self.tensors[graph.prefix + spec.name].codes, layer)
            codes[spec.name] = own.astype(HELD[spec.quant.bits[layer]], copy=False)
        return codes

    def inputs(self, dec: Decoder, filled: int = 0) -> dict[str, np.ndarray]:
        """Codes of the inputs that layers share, by shared name (`graph.shared_names`): int8 or
        int16 by their bits.

        Args:
          filled: slots of the cache that hold keys.
        """
        readers, codes = shared_names(dec), {}
        for name, x in layer_inputs(dec, filled).items():
            reader = readers[name]
            if reader.name == "mask":
                codes[name] = mask_codes(x, reader.bits)
                continue
            spec = reader.graph[reader.name]
            assert spec.fixed is not None
            scale = np.float64(spec.fixed[reader.layer])
            rounded = quantize(x, scale, np.int64(0), spec, reader.layer)
            codes[name] = rounded.astype(HELD[reader.bits])
        return codes


def blocks(x: np.ndarray) -> Iterator[slice]:
    """Cuts the first axis of a parameter into slices of at most BLOCK elements, or of one row.

    >>> list(blocks(np.empty((3, 2**11, 2**11))))
    [slice(0, 2, None), slice(2, 4, None)]
    """
    step = max(1, BLOCK // max(1, x[0].size))
    return (slice(at, at + step) for at in range(0, len(x), step))


def dequantize(model: IntegerModel) -> dict[str, np.ndarray]:
    """Real values (float32) of weights, biases and prefix K/V: code times scale.

    With `activation_scales` they make the fake-quantized model that the integers came from.
    """
    out = {}
    for graph in model.decoder(1).graphs:
        for spec in graph.named("param"):
            tensor = model.tensors[graph.prefix + spec.name]
            scale = tensor.scale.reshape(
                tensor.scale.shape + (1,) * (tensor.codes.ndim - tensor.scale.ndim)
            )
            real = np.empty(tensor.codes.shape, np.float32)
            scales = np.broadcast_to(scale.astype(np.float64), real.shape)
            for block in blocks(real):
                real[block] = tensor.codes[block] * scales[block]
            out[graph.prefix + spec.name] = real
    return out


def activation_scales(model: IntegerModel) -> Scales:
    """QParams of every activation and input by stacked global name, without those of parameters.

    Zero points are float32, as fake-quantization takes them.
    """
    names = [g.prefix + t.name for g in model.decoder(1).graphs for t in g.tensors]
    found = {n: model.tensors[n] for n in names if n in model.tensors}
    return {
        name: QParams(scale=t.scale, zero_point=t.zero_point.astype(np.float32))
        for name, t in found.items()
        if t.codes is None
    }
