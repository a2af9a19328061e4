"""Classes of activations, by which ranges are chosen and scales are learned: rotated or not."""

from __future__ import annotations

_ROTATED = {
    "layers.attn.input",
    "layers.attn.v",
    "layers.attn.kv0.mixed",
    "layers.attn.o",
    "layers.mlp.input",
    "layers.mlp.down",
    "head.input",
}


def tensor_class(name: str, bits: int) -> str:
    """`wide` (16 bits), `probs`, `cache`, `rotated` (near Gaussian after R1/R2) or `unrotated`
    (heavy tails)."""
    if bits > 8:
        return "wide"
    if name.endswith(".probs"):
        return "probs"
    if name in ("layers.attn.k_cache", "layers.attn.v_cache"):
        return "cache"
    return "rotated" if is_rotated(name) else "unrotated"


def is_rotated(name: str) -> bool:
    """True for free activations in a rotated basis: inputs of the linears but down's, outputs of
    v, o and down (Quant.npu's rotated tensors)."""
    return name in _ROTATED
