"""Ranges and weight rounding from data."""

from qnpu_jax.calibrate.gptq import gptq
from qnpu_jax.calibrate.ranges import initialize, weight_scales
from qnpu_jax.calibrate.statistics import collect

__all__ = ["collect", "gptq", "initialize", "weight_scales"]
