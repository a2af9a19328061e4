"""Transforms of parameters that keep the function: folding, rotations, channel scales, prefix."""

from qnpu_jax.transform.channel_scales import (
    Diagonal,
    channel_peaks,
    identity_diagonal,
    scale_channels,
    scale_parameter,
    smoothquant,
)
from qnpu_jax.transform.fold import check_folded, fold_norms
from qnpu_jax.transform.prefix import PrefixReport, add_prefix, find_prefix
from qnpu_jax.transform.rotate import Rotation, random_rotation, rotate, rotate_parameter

__all__ = [
    "Diagonal",
    "PrefixReport",
    "Rotation",
    "add_prefix",
    "channel_peaks",
    "check_folded",
    "find_prefix",
    "fold_norms",
    "identity_diagonal",
    "random_rotation",
    "rotate",
    "rotate_parameter",
    "scale_channels",
    "scale_parameter",
    "smoothquant",
]
