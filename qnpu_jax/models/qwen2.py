"""Qwen2 and 2.5: Llama with biases of q, k and v; upper layers may have a window.

Reference: transformers/models/qwen2/; llama.cpp conversion/qwen.py (q and k are not permuted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qnpu_jax.config import LayerKind
from qnpu_jax.models.family import Family, layer_types, require_window
from qnpu_jax.models.fields import Fields

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
READS = frozenset({"sliding_window", "use_sliding_window", "layer_types"})


def layers(config: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    """Gives layers from `max_window_layers` on a window, if `use_sliding_window` says so."""
    used = config.flag("use_sliding_window") and "sliding_window" in config
    window = config.count("sliding_window") if used else None
    first = config.get("max_window_layers")
    if not isinstance(first, int) or first < 0:
        raise config.bad("max_window_layers", "an integer, 0 or more")
    windowed = [used and i >= first for i in range(count)]
    types = layer_types(config, count, windowed)
    require_window(config, types, window)
    return [replace(kind, window=window) if t == "sliding_attention" else kind for t in types]


QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    defaults=DEFAULTS,
    reads=READS,
    facts={"biases": ("attn.q", "attn.k", "attn.v")},
    hf_layers=layers,
)
