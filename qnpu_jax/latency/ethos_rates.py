"""Rates of Arm's Ethos-U85, fitted to the estimates that its compiler vela gives for small models.

    decode  = op ops + bytes / bandwidth
    prefill = op ops + bytes / bandwidth + MACs_8 mac_8 + MACs_16 mac_16

vela models the NPU cycle by cycle, and takes a compiled model for every question; a planner has
thousands. These rates are no measurement of an NPU, and nor is vela's estimate. Those of MACs
include the elementwise ops that come with them. Bytes and MACs add up, as vela lets them overlap
within an op alone, and the head of a prefill, which reads one row, waits for its weights.

The models are the first layers of SmolLM2-135M-Instruct with embedding and head
(`benchmarks/ethos_rates.py`); MACs, bytes and ops are those of `roofline`, as the planner counts
them. vela 5.2.0, `Ethos_U85_SYS_DRAM_Mid` (1 GHz, 12 GB/s of DRAM), 2 MiB of SRAM, cache of 512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls


class Report(NamedTuple):
    """An estimate of vela.

    Attributes:
      accelerator: Ethos-U configuration.
      recipe, layers: of the model.
      tokens: 128 of a prefill, 1 of a step of decode.
      ops: nodes of the graphs, times their layers.
      macs: of 8-bit and of 16-bit activations.
      moved: `roofline.least_bytes`.
      seconds: vela's.
    """

    accelerator: str
    recipe: str
    layers: int
    tokens: int
    ops: int
    macs: tuple[int, int]
    moved: float
    seconds: float


REPORTS = (
    Report("ethos-u85-256", "w4a16", 2, 128, 201, (0, 1085571648), 32555520.0, 32.8587e-3),
    Report("ethos-u85-256", "w4a16", 2, 1, 201, (0, 36571968), 32482368.0, 11.4798e-3),
    Report("ethos-u85-256", "w4a8", 2, 128, 199, (1009778688, 75792960), 32555520.0, 26.2156e-3),
    Report("ethos-u85-256", "w4a8", 2, 1, 199, (35979264, 592704), 32482368.0, 10.3948e-3),
    Report("ethos-u85-256", "w4a8i8", 2, 128, 183, (1085571648, 0), 32555520.0, 20.6951e-3),
    Report("ethos-u85-256", "w4a8i8", 2, 1, 183, (36571968, 0), 32482368.0, 10.2918e-3),
    Report("ethos-u85-256", "w8a16", 2, 128, 201, (0, 1085571648), 36094464.0, 32.8599e-3),
    Report("ethos-u85-256", "w8a16", 2, 1, 201, (0, 36571968), 36021312.0, 11.5303e-3),
    Report("ethos-u85-256", "w8a8", 2, 128, 199, (1009778688, 75792960), 36094464.0, 26.2174e-3),
    Report("ethos-u85-256", "w8a8", 2, 1, 199, (35979264, 592704), 36021312.0, 11.4162e-3),
    Report("ethos-u85-256", "w8a8i8", 2, 128, 183, (1085571648, 0), 36094464.0, 20.6969e-3),
    Report("ethos-u85-256", "w8a8i8", 2, 1, 183, (36571968, 0), 36021312.0, 11.3131e-3),
    Report("ethos-u85-256", "w8a8s8", 2, 128, 187, (1085276160, 295488), 36094464.0, 22.128e-3),
    Report("ethos-u85-256", "w8a8s8", 2, 1, 187, (36569088, 2880), 36021312.0, 11.372e-3),
    Report("ethos-u85-256", "w4a16", 6, 128, 577, (0, 3200090688), 40502784.0, 81.5498e-3),
    Report("ethos-u85-256", "w4a16", 6, 1, 577, (0, 53091648), 40429632.0, 18.0487e-3),
    Report("ethos-u85-256", "w4a8", 6, 128, 571, (2972712960, 227377728), 40502784.0, 61.616e-3),
    Report("ethos-u85-256", "w4a8", 6, 1, 571, (51314688, 1776960), 40429632.0, 14.7903e-3),
    Report("ethos-u85-256", "w4a8i8", 6, 128, 523, (3200090688, 0), 40502784.0, 45.1476e-3),
    Report("ethos-u85-256", "w4a8i8", 6, 1, 523, (53091648, 0), 40429632.0, 14.4991e-3),
    Report("ethos-u85-256", "w8a16", 6, 128, 577, (0, 3200090688), 51119616.0, 81.5504e-3),
    Report("ethos-u85-256", "w8a16", 6, 1, 577, (0, 53091648), 51046464.0, 18.2036e-3),
    Report("ethos-u85-256", "w8a8", 6, 128, 571, (2972712960, 227377728), 51119616.0, 61.6192e-3),
    Report("ethos-u85-256", "w8a8", 6, 1, 571, (51314688, 1776960), 51046464.0, 17.853e-3),
    Report("ethos-u85-256", "w8a8i8", 6, 128, 523, (3200090688, 0), 51119616.0, 45.1499e-3),
    Report("ethos-u85-256", "w8a8i8", 6, 1, 523, (53091648, 0), 51046464.0, 17.5618e-3),
    Report("ethos-u85-2048", "w4a16", 2, 128, 201, (0, 1085571648), 32555520.0, 10.1686e-3),
    Report("ethos-u85-2048", "w4a16", 2, 1, 201, (0, 36571968), 32482368.0, 3.46577e-3),
    Report("ethos-u85-2048", "w4a8", 2, 128, 199, (1009778688, 75792960), 32555520.0, 8.93831e-3),
    Report("ethos-u85-2048", "w4a8", 2, 1, 199, (35979264, 592704), 32482368.0, 3.40717e-3),
    Report("ethos-u85-2048", "w4a8i8", 2, 128, 183, (1085571648, 0), 32555520.0, 7.39769e-3),
    Report("ethos-u85-2048", "w4a8i8", 2, 1, 183, (36571968, 0), 32482368.0, 3.34791e-3),
    Report("ethos-u85-2048", "w8a16", 2, 128, 201, (0, 1085571648), 36094464.0, 10.2297e-3),
    Report("ethos-u85-2048", "w8a16", 2, 1, 201, (0, 36571968), 36021312.0, 3.70632e-3),
    Report("ethos-u85-2048", "w8a8", 2, 128, 199, (1009778688, 75792960), 36094464.0, 9.04763e-3),
    Report("ethos-u85-2048", "w8a8", 2, 1, 199, (35979264, 592704), 36021312.0, 3.71328e-3),
    Report("ethos-u85-2048", "w8a8i8", 2, 128, 183, (1085571648, 0), 36094464.0, 7.50234e-3),
    Report("ethos-u85-2048", "w8a8i8", 2, 1, 183, (36571968, 0), 36021312.0, 3.65328e-3),
    Report("ethos-u85-2048", "w8a8s8", 2, 128, 187, (1085276160, 295488), 36094464.0, 8.04299e-3),
    Report("ethos-u85-2048", "w8a8s8", 2, 1, 187, (36569088, 2880), 36021312.0, 3.68952e-3),
    Report("ethos-u85-2048", "w4a16", 6, 128, 577, (0, 3200090688), 40502784.0, 24.77e-3),
    Report("ethos-u85-2048", "w4a16", 6, 1, 577, (0, 53091648), 40429632.0, 5.26379e-3),
    Report("ethos-u85-2048", "w4a8", 6, 128, 571, (2972712960, 227377728), 40502784.0, 21.1222e-3),
    Report("ethos-u85-2048", "w4a8", 6, 1, 571, (51314688, 1776960), 40429632.0, 5.08472e-3),
    Report("ethos-u85-2048", "w4a8i8", 6, 128, 523, (3200090688, 0), 40502784.0, 16.53e-3),
    Report("ethos-u85-2048", "w4a8i8", 6, 1, 523, (53091648, 0), 40429632.0, 4.91888e-3),
    Report("ethos-u85-2048", "w8a16", 6, 128, 577, (0, 3200090688), 51119616.0, 24.96e-3),
    Report("ethos-u85-2048", "w8a16", 6, 1, 577, (0, 53091648), 51046464.0, 5.98443e-3),
    Report("ethos-u85-2048", "w8a8", 6, 128, 571, (2972712960, 227377728), 51119616.0, 21.3911e-3),
    Report("ethos-u85-2048", "w8a8", 6, 1, 571, (51314688, 1776960), 51046464.0, 6.00219e-3),
    Report("ethos-u85-2048", "w8a8i8", 6, 128, 523, (3200090688, 0), 51119616.0, 16.7896e-3),
    Report("ethos-u85-2048", "w8a8i8", 6, 1, 523, (53091648, 0), 51046464.0, 5.83411e-3),
)
"""Reports of `benchmarks/ethos_rates.py`, 2026-11-30."""


@dataclass(frozen=True)
class ArmFit:
    """Rates of an Ethos-U85.

    Attributes:
      op: seconds of an op.
      bandwidth: bytes per second.
      mac: seconds of a MAC, by bits of the activations.
      errors: largest relative error of a step of decode and of a prefill, each report predicted
        from the others.
    """

    op: float
    bandwidth: float
    mac: Mapping[int, float]
    errors: tuple[float, float] = (float("inf"), float("inf"))

    def seconds(self, report: Report) -> float:
        """Estimates the time of what was reported on, by the module's equations."""
        step = self.op * report.ops + report.moved / self.bandwidth
        if report.tokens == 1:
            return step
        return step + sum(n * self.mac[b] for n, b in zip(report.macs, (8, 16), strict=True))


def fit(reports: Sequence[Report]) -> ArmFit:
    """Fits one accelerator: op and bandwidth to decode, then MACs to prefills.

    Least squares of relative errors, with no rate below 0.
    """
    found = _rates(reports)
    errors = tuple(
        max(
            abs(_rates([r for r in reports if r is not out]).seconds(out) / out.seconds - 1)
            for out in reports
            if (out.tokens == 1) == decode
        )
        for decode in (True, False)
    )
    return ArmFit(found.op, found.bandwidth, found.mac, (errors[0], errors[1]))


def _rates(reports: Sequence[Report]) -> ArmFit:
    steps = [r for r in reports if r.tokens == 1]
    prefills = [r for r in reports if r.tokens > 1]
    op, byte = _least([(r.ops, r.moved) for r in steps], [r.seconds for r in steps], steps)
    left = [r.seconds - op * r.ops - byte * r.moved for r in prefills]
    eight, sixteen = _least([r.macs for r in prefills], left, prefills)
    return ArmFit(op, 1 / byte, {8: eight, 16: sixteen})


def _least(
    columns: Sequence[tuple[int | float, int | float]],
    seconds: Sequence[float],
    of: Sequence[Report],
) -> tuple[float, float]:
    """Solves columns x = seconds, x >= 0, each row divided by the seconds of its report."""
    scale = np.array([r.seconds for r in of])
    size = np.array(columns, float).max(0)  # columns of about 1, for the solver
    x, _ = nnls(np.array(columns) / size / scale[:, None], np.array(seconds) / scale)
    return float(x[0] / size[0]), float(x[1] / size[1])


FITS = {
    name: fit([r for r in REPORTS if r.accelerator == name])
    for name in dict.fromkeys(r.accelerator for r in REPORTS)
}
"""Fits by accelerator."""
