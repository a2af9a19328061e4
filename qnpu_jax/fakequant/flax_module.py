"""The decoder as a Flax module (`flax.nnx`), to compose with Flax code.

All arithmetic is `forward.forward`: the module only holds what that reads, as variables that Flax's
transformations know.
"""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Float, Int

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph import Decoder, Params, QParams, Scales, decoder

PREFIX = "layers.attn.prefix_k"
"""Keys of the constant prefix, (L, N, P, K): their P is the length of the prefix."""


class Scale(nnx.Variable[QParams]):
    """Scale and zero point of one tensor, as `QParams`."""


class QuantDecoder(nnx.Module):
    """A decoder LLM: token ids (T,) to logits (T, V), y = forward(params, ids, scales).

    A tensor with a scale is fake-quantized (`fake_quant`), with straight-through gradients; without
    one it stays in float. `nnx.state(module, nnx.Param)` are the parameters, `nnx.state(module,
    Scale)` the scales; `nnx.to_pure_dict` makes plain dicts of either, by global name, and
    `nnx.replace_by_pure_dict` with `nnx.update` puts them back.

    Example: one step of gradient descent on the scales alone.
      module = QuantDecoder(config, RECIPES["w8a8"].bits, params, scales)
      of_scales = nnx.DiffState(0, Scale)
      gradients = nnx.jit(nnx.grad(loss, argnums=of_scales))(module, ids)
      moved = jax.tree.map(lambda x, g: x - 1e-3 * g, nnx.state(module, Scale), gradients)
      nnx.update(module, moved)

    Args:
      config: shape of the model.
      plan: bits of every tensor.
      params: prepared parameters (norms folded) by global name, those of `layers.*` with the layer
        axis in front; a constant prefix if its keys and values are among them.
      scales: resolved QParams by global name (`graph.resolve`, `integer.activation_scales`).

    Raises:
      UserError: a parameter is missing, unknown, or of another shape.
    """

    def __init__(
        self, config: ModelConfig, plan: BitPlan, params: Params, scales: Scales | None = None
    ) -> None:
        self._config, self._plan = config, plan
        self._prefix = params[PREFIX].shape[2] if PREFIX in params else 0
        _check(params, parameter_shapes(self._decoder(1)))
        self.params = nnx.Dict({name: nnx.Param(x) for name, x in params.items()})
        self.scales = nnx.Dict({name: Scale(q) for name, q in (scales or {}).items()})

    def __call__(self, ids: Int[jax.Array, " t"]) -> Float[jax.Array, "t v"]:
        """Logits of every position.

        Args:
          ids: token ids, without the constant prefix.
        """
        params = {name: x.get_value() for name, x in self.params.items()}
        scales = {name: q.get_value() for name, q in self.scales.items()}
        return forward(self._decoder(len(ids)), params, ids, scales)

    def _decoder(self, tokens: int) -> Decoder:
        return decoder(self._config, self._plan, tokens, self._prefix)


def parameter_shapes(dec: Decoder) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by global name, with the layer axis in front for `layers.*`."""
    return {
        graph.prefix + spec.name: ((graph.layers,) if graph.layered else ()) + spec.shape
        for graph in dec.graphs
        for spec in graph.named("param")
    }


def _check(params: Params, expected: dict[str, tuple[int, ...]]) -> None:
    shapes = {name: tuple(x.shape) for name, x in params.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        wanted, got = expected.get(name), shapes.get(name)
        if wanted != got:
            raise UserError(
                f"{name}: expected {_told(wanted)}, got {_told(got)}; give the parameters that"
                " `pipeline.prepare` makes of a checkpoint"
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "no such parameter" if shape is None else f"shape {[*shape]}"
