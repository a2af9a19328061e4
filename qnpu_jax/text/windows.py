"""Windows of token ids: calibrated with, learned from, and judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Text:
    """Windows of token ids, without BOS: to calibrate with, to learn from, and to judge by (another
    domain). The last two are only read where something is learned."""

    calibration: Int[np.ndarray, "n t"]
    learning: Int[np.ndarray, "m u"]
    held_out: Int[np.ndarray, "k u"]

    @staticmethod
    def of(calibration: Int[np.ndarray, "n t"]) -> Text:
        """For calibration only."""
        return Text(calibration, calibration[:0], calibration[:0])
