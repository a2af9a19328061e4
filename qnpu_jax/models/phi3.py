"""Phi-3 and Phi-4-mini: Llama with fused linears, RoPE on part of each head, and longrope.

Reference: transformers/models/phi3/; llama.cpp conversion/phi.py (q and k are not permuted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qnpu_jax.config import LayerKind
from qnpu_jax.models.family import Family
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.rope_scaling import rope_parameters


def rope(config: Fields) -> Fields:
    """Finds the RoPE parameters; `su` and `yarn` are old names of longrope in this family."""
    found = rope_parameters(config)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind in ("su", "yarn"):
        kind = "longrope"
    return replace(found, data={**found.data, "rope_type": kind})


def layers(config: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    window = config.count("sliding_window") if "sliding_window" in config else None
    return [replace(kind, window=window)] * count


def gguf_layers(metadata: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    """Reads the window; 0 means none. The model has it, though llama.cpp does not apply it."""
    key = "attention.sliding_window"
    window = metadata.count(key) if metadata.get(key) else None
    return [replace(kind, window=window)] * count


PHI3 = Family(
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    gguf="phi3",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    reads=frozenset({"sliding_window", "partial_rotary_factor"}),
    fused=True,
    rope=rope,
    hf_layers=layers,
    gguf_reads=frozenset({"attention.sliding_window"}),
    gguf_layers=gguf_layers,
)
