"""Simulator behind the interfaces that proofs take it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.integer import IntegerModel
from qnpu_jax.runtime import ROUNDING
from qnpu_sim import compile_model, observed_accumulators, observed_ranges, run


class Simulated:
    """Simulator of one prefill, in the bits of LiteRT's kernels (`integer.simulator.Simulator`).

    Args:
      tokens: length T of the prefill.
      logits: of every position, or of the last only.
      kernels: kernel set whose bits it gives.
    """

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
        """Runs ids (T,) or (N, T) and returns codes of the logits."""
        return run(self._program, ids)["head.logits"]

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        """Runs ids (T,) and returns codes of every tensor, by global name."""
        kept = run(self._program, ids, keep=lambda _: True)
        return {name: np.asarray(codes) for name, codes in kept.items()}

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        """Returns the bits that accumulators used in the run of `tensors`, by global name."""
        return observed_accumulators(self._model, self._program.decoder, tensors)


def observe_accumulators(
    model: IntegerModel, ids: np.ndarray
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Runs sequences (B, T) in the simulator and observes every accumulator (`widths.Observe`).

    Returns:
      Smallest and largest value of each channel, by global name.
    """
    program = compile_model(model, model.decoder(ids.shape[1]), "litert_ref")
    return observed_ranges(model, program, ids)
