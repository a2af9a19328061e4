"""Ranges and weight rounding from data."""

from qnpu_jax.calibrate.gptq import GptqSettings, gptq
from qnpu_jax.calibrate.ranges import calibrate_activations, weight_scales
from qnpu_jax.calibrate.statistics import collect_statistics

__all__ = [
    "GptqSettings",
    "calibrate_activations",
    "collect_statistics",
    "gptq",
    "weight_scales",
]
