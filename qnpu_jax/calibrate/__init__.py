"""Ranges and weight rounding from data."""

from qnpu_jax.calibrate.coverage import Coverage, Peaks, Served, cover, coverage_of, window_peaks
from qnpu_jax.calibrate.gptq import GptqSettings, gptq
from qnpu_jax.calibrate.ranges import calibrate_activations, weight_scales
from qnpu_jax.calibrate.statistics import collect_statistics

__all__ = [
    "Coverage",
    "GptqSettings",
    "Peaks",
    "Served",
    "calibrate_activations",
    "collect_statistics",
    "cover",
    "coverage_of",
    "gptq",
    "weight_scales",
    "window_peaks",
]
