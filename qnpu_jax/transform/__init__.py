"""Transforms of parameters that keep the function: folding, rotations, channel scales, prefix."""

from qnpu_jax.transform.channel_scales import (
    Diagonal,
    channel_peaks,
    identity_diagonal,
    limit_peaks,
    scale_channels,
    scale_parameter,
    smoothquant,
)
from qnpu_jax.transform.channel_splitting import channel_copies, split_channels
from qnpu_jax.transform.double_norms import with_double_norms
from qnpu_jax.transform.fold import check_folded, fold_norms
from qnpu_jax.transform.key_centring import centre_keys, key_centres
from qnpu_jax.transform.prefix import add_prefix, prefix_length, without_prefix
from qnpu_jax.transform.prefix_search import PrefixReport, Starts, find_prefix
from qnpu_jax.transform.rotate import (
    Rotation,
    random_rotation,
    rotate,
    rotate_parameter,
    rotations_of,
)

__all__ = [
    "Diagonal",
    "PrefixReport",
    "Rotation",
    "Starts",
    "add_prefix",
    "centre_keys",
    "channel_copies",
    "channel_peaks",
    "check_folded",
    "find_prefix",
    "fold_norms",
    "identity_diagonal",
    "key_centres",
    "limit_peaks",
    "prefix_length",
    "random_rotation",
    "rotate",
    "rotate_parameter",
    "rotations_of",
    "scale_channels",
    "scale_parameter",
    "smoothquant",
    "split_channels",
    "with_double_norms",
    "without_prefix",
]
