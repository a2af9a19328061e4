"""The decoder as a Flax module, for those who compose it with Flax code. All arithmetic is
`forward.forward`.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph import Decoder, Params, Scales, decoder


class QuantDecoder(nn.Module):
    """Token ids (T,) to logits (T, V); fake-quantized where the collection `scales` has an entry.

    Example:
      module = QuantDecoder(config, RECIPES["w8a8"].bits, prefix=2)
      logits = module.apply(variables(params, scales), ids)

    Attributes:
      config: shape of the model.
      plan: bits of every tensor.
      prefix: length of the constant prefix, whose K/V are parameters.
    """

    config: ModelConfig
    plan: BitPlan
    prefix: int = 0

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        dec = decoder(self.config, self.plan, ids.shape[-1], self.prefix)
        params = {
            name: self.param(name, nn.initializers.normal(0.02), shape)
            for name, shape in parameter_shapes(dec).items()
        }
        return forward(dec, params, ids, dict(self.variables.get("scales", {})))


def parameter_shapes(dec: Decoder) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by global name, with the layer axis in front for `layers.*`."""
    return {
        graph.prefix + spec.name: (*((graph.layers,) if graph is dec.layer else ()), *spec.shape)
        for graph in dec.graphs
        for spec in graph.named("param")
    }


def variables(params: Params, scales: Scales | None = None) -> dict[str, Any]:
    """Our parameters and (resolved) scales as the variables of `QuantDecoder`."""
    return {"params": dict(params), "scales": dict(scales or {})}
