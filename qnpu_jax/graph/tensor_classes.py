"""Classes of activations: the class decides how a range is chosen and when a scale learns.

Rotations R1 and R2 make the tensors of their basis nearly Gaussian; the others keep heavy tails
(Quant.npu, arXiv 2605.20295, section on initialization).
"""

from __future__ import annotations

from qnpu_jax.graph.graph import TensorSpec

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
    """Names the class of an activation.

    Args:
      name: stacked global name, `layers.attn.v`.
      bits: of the tensor in one layer.

    Returns:
      `wide` for 16 bits, `probs` for attention probabilities, `cache` for keys and values,
      `logits`, else `rotated` (near Gaussian) or `unrotated` (heavy tails).

    >>> tensor_class("layers.mlp.act", 8), tensor_class("layers.mlp.act", 16)
    ('unrotated', 'wide')
    """
    if bits > 8:
        return "wide"
    if name.endswith(".probs"):
        return "probs"
    if name in ("layers.attn.k_cache", "layers.attn.v_cache"):
        return "cache"
    if name == "head.logits":
        return "logits"
    return "rotated" if is_rotated(name) else "unrotated"


def is_constant(spec: TensorSpec) -> bool:
    """Tells whether a parameter is an operand of ADD or MUL, as wide as the activations beside it:
    no weight, bias or prefix."""
    kinds = ("weight", "bias", "prefix_k", "prefix_v")
    return spec.kind == "param" and spec.name.rpartition(".")[2] not in kinds


def is_rotated(name: str) -> bool:
    """Tells whether a free activation lies in a rotated basis.

    Those are the inputs of every linear but `down`, and the outputs of `v`, `o` and `down`.
    """
    return name in _ROTATED
