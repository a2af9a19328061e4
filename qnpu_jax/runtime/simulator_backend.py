"""Backend of a session that runs the simulator instead of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.integer import IntegerModel
from qnpu_jax.runtime.session import Shape, Step
from qnpu_jax.tflite import cached_decoder
from qnpu_sim import ProfileName, compile_model, run

ROUNDING: dict[KernelSet, ProfileName] = {
    "ref": "litert_ref",
    "opt": "litert_opt",
    "xnn": "litert_xnn",
    "tf": "litert_ref",
}
"""Rounding profile of the simulator that gives the bits of each of LiteRT's kernel sets."""


class SimulatedBackend:
    """Backend of a session by the simulator, in the bits of LiteRT's kernels.

    Args:
      prefill, context, logits: as `cached.build_cached`.
      kernels: kernel set whose bits the simulator gives.

    Raises:
      UserError: as `cached.build_cached`.
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
        profile = ROUNDING[kernels]
        self._programs = {t: compile_model(model, d, profile) for t, d in decoders.items()}
        cfg = model.config
        self.shape = Shape(prefill, context, cfg.num_layers, cfg.num_kv_heads, cfg.head_dim)
        self.logit_scale = float(model.tensors["head.logits"].scale)

    def tensors(
        self, ids: np.ndarray, filled: int, k: np.ndarray, v: np.ndarray, every: bool = True
    ) -> Mapping[str, np.ndarray]:
        """Runs a signature and returns codes of its tensors by global name.

        Args:
          ids, filled, k, v: as `session.Backend.step`.
          every: keep every tensor; otherwise logits and new keys and values only.
        """
        program = self._programs[len(ids)]
        inputs: dict[str, Any] = dict(self._model.inputs(program.decoder, filled))
        for letter, cache in (("k", k), ("v", v)):
            inputs |= {f"layers.{i}.attn.cache_{letter}": x for i, x in enumerate(cache)}
        names = ("attn.k_rows", "attn.v_rows")
        kept = run(program, ids, lambda n: every or n.endswith(names), inputs)
        return {name: np.asarray(codes) for name, codes in kept.items()}

    def step(self, ids: np.ndarray, filled: int, k: np.ndarray, v: np.ndarray) -> Step:
        """As `Backend.step`."""
        found = self.tensors(ids, filled, k, v, every=False)
        rows = [
            np.stack([found[f"layers.{i}.attn.{letter}_rows"] for i in range(self.shape.layers)])
            for letter in "kv"
        ]
        return Step(found["head.logits"], *rows)
