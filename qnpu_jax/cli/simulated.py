"""The simulator in the forms that the package asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qnpu_jax.freeze import IntegerModel
from qnpu_jax.litert import KernelSet
from qnpu_jax.npu.session import Shape, Step
from qnpu_jax.tflite import Positions, cached_decoder
from sim import run as simulator
from sim.numerics import ProfileName
from sim.observe import observed_accumulators, observed_ranges

PROFILES: dict[KernelSet, ProfileName] = {
    "ref": "litert_ref",
    "opt": "litert_opt",
    "xnn": "litert_xnn",
}


class Simulated:
    """`proof.Simulator` by `sim`, in the bits of LiteRT's kernels."""

    def __init__(
        self,
        model: IntegerModel,
        tokens: int,
        logits: Positions = "all",
        kernels: KernelSet = "ref",
    ) -> None:
        self._model = model
        dec = model.decoder(tokens, logits=logits)
        self._program = simulator.compile_model(model, dec, PROFILES[kernels])

    def logits(self, ids: np.ndarray) -> Any:
        return simulator.run(self._program, ids)["head.logits"]

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        kept = simulator.run(self._program, ids, keep=lambda _: True)
        return {name: np.asarray(codes) for name, codes in kept.items()}

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        return observed_accumulators(self._model, self._program.decoder, tensors)


def observed(model: IntegerModel, ids: np.ndarray) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """`widths.Observe` by `sim`."""
    program = simulator.compile_model(model, model.decoder(ids.shape[1]), "litert_ref")
    return observed_ranges(model, program, ids)


class SimulatedBackend:
    """`npu.session.Backend` by `sim`, in the bits of LiteRT's kernels.

    Args:
      prefill, context, logits: as `tflite.write_cached`.
    """

    def __init__(
        self,
        model: IntegerModel,
        prefill: int,
        context: int,
        logits: Positions = "last",
        kernels: KernelSet = "ref",
    ) -> None:
        self._model = model
        decoders = {t: cached_decoder(model, t, context, logits) for t in (prefill, 1)}
        profile = PROFILES[kernels]
        self._programs = {
            t: simulator.compile_model(model, d, profile) for t, d in decoders.items()
        }
        cfg = model.config
        self.shape = Shape(prefill, context, cfg.num_layers, cfg.num_kv_heads, cfg.head_dim)
        self.logit_scale = float(model.scale["head.logits"])

    def tensors(
        self, ids: np.ndarray, filled: int, k: np.ndarray, v: np.ndarray, every: bool = True
    ) -> Mapping[str, np.ndarray]:
        """Codes of every tensor of a signature by global name; without `every`, of its outputs."""
        program = self._programs[len(ids)]
        inputs: dict[str, Any] = dict(self._model.inputs(program.decoder, filled))
        for letter, cache in (("k", k), ("v", v)):
            inputs |= {f"layers.{i}.attn.cache_{letter}": x for i, x in enumerate(cache)}
        names = ("attn.k_rows", "attn.v_rows")
        kept = simulator.run(program, ids, lambda n: every or n.endswith(names), inputs)
        return {name: np.asarray(codes) for name, codes in kept.items()}

    def step(self, ids: np.ndarray, filled: int, k: np.ndarray, v: np.ndarray) -> Step:
        """As `Backend.step`."""
        found = self.tensors(ids, filled, k, v, every=False)
        rows = [
            np.stack([found[f"layers.{i}.attn.{letter}_rows"] for i in range(self.shape.layers)])
            for letter in "kv"
        ]
        return Step(found["head.logits"], *rows)
