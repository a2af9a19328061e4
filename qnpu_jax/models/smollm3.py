"""SmolLM3: Llama with layers without positions, every fourth by default.

Reference: transformers/models/smollm3/; llama.cpp src/models/smollm3.cpp (every fourth layer, and
no key for another number), conversion/llama.py (q and k are permuted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qnpu_jax.config import LayerKind
from qnpu_jax.models.family import Family, layer_types, require_window
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.llama import biases

INTERVAL = 4


def without_positions(kind: LayerKind) -> LayerKind:
    return replace(kind, rope_theta=None, rope_scaling=None)


def layers(config: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    """Reads which layers rotate (1 in `no_rope_layers`), and which have a window."""
    interval = config.count("no_rope_layer_interval")
    rotates = config.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)])
    if not isinstance(rotates, list) or [r in (0, 1) for r in rotates] != [True] * count:
        raise config.bad("no_rope_layers", f"{count} times 0 or 1")
    used = config.flag("use_sliding_window") and "sliding_window" in config
    window = config.count("sliding_window") if used else None
    types = layer_types(config, count, [used and not r for r in rotates])
    require_window(config, types, window)
    kinds = [kind if r else without_positions(kind) for r in rotates]
    return [
        replace(k, window=window) if t == "sliding_attention" else k
        for k, t in zip(kinds, types, strict=True)
    ]


def gguf_layers(_: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    return [kind if (i + 1) % INTERVAL else without_positions(kind) for i in range(count)]


SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    gguf="smollm3",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "no_rope_layer_interval": INTERVAL,
    },
    reads=frozenset(
        {
            "attention_bias",
            "mlp_bias",
            "no_rope_layers",
            "no_rope_layer_interval",
            "sliding_window",
            "use_sliding_window",
            "layer_types",
        }
    ),
    permuted=True,
    hf_facts=biases,
    hf_layers=layers,
    gguf_layers=gguf_layers,
)
