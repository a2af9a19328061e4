"""Interface of a simulator: runs an integer model at one length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qnpu_jax.graph import Positions
from qnpu_jax.integer.model import IntegerModel


@runtime_checkable
class Simulator(Protocol):
    """An integer model, simulated at one length."""

    def logits(self, ids: np.ndarray) -> Any:
        """Codes of the logits, (T or 1, V) for ids (T,)."""
        ...

    def tensors(self, ids: np.ndarray) -> Mapping[str, np.ndarray]:
        """Codes of every tensor by global name."""
        ...

    def accumulators(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, int]:
        """Largest absolute accumulator of a run that gave these tensors, by global name."""
        ...


Simulate = Callable[[IntegerModel, int, Positions], Simulator]
"""Makes the simulator of a model, for a number of tokens and positions of logits."""
