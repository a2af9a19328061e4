"""The simulator in the forms that proofs ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.integer import IntegerModel
from qnpu_jax.runtime import ROUNDING
from qnpu_sim import compile_model, observed_accumulators, observed_ranges, run


class Simulated:
    """`simulator.Simulator` by the simulator, in the bits of LiteRT's kernels."""

    def __init__(
        self,
        model: IntegerModel,
        tokens: int,
        logits: Positions = "all",
        kernels: KernelSet = "ref",
    ) -> None:
        self._model = model
        dec = model.decoder(tokens, logits=logits)
        self._program = compile_model(model, dec, ROUNDING[kernels])

    def logits(self, ids: np.ndarray) -> Any:
        return run(self._program, ids)["head.logits"]

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        kept = run(self._program, ids, keep=lambda _: True)
        return {name: np.asarray(codes) for name, codes in kept.items()}

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        return observed_accumulators(self._model, self._program.decoder, tensors)


def observe_accumulators(
    model: IntegerModel, ids: np.ndarray
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """`widths.Observe` by the simulator."""
    program = compile_model(model, model.decoder(ids.shape[1]), "litert_ref")
    return observed_ranges(model, program, ids)
