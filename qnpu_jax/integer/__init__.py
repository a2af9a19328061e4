"""The frozen integer model, and what its weights prove about accumulators."""

from qnpu_jax.integer.accumulators import (
    Bound,
    ChannelBounds,
    channel_bounds,
    check_accumulators,
    needed_bits,
    proved_bounds,
)
from qnpu_jax.integer.freeze import allowed_bits, check_bits, freeze
from qnpu_jax.integer.intermediates import (
    NO_SUM,
    Intermediate,
    check_intermediates,
    proved_intermediates,
)
from qnpu_jax.integer.model import IntegerModel, QTensor, activation_scales, blocks, dequantize
from qnpu_jax.integer.simulator import Simulate, Simulator

__all__ = [
    "NO_SUM",
    "Bound",
    "ChannelBounds",
    "IntegerModel",
    "Intermediate",
    "QTensor",
    "Simulate",
    "Simulator",
    "activation_scales",
    "allowed_bits",
    "blocks",
    "channel_bounds",
    "check_accumulators",
    "check_bits",
    "check_intermediates",
    "dequantize",
    "freeze",
    "needed_bits",
    "proved_bounds",
    "proved_intermediates",
]
