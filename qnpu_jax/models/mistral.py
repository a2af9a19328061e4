"""Mistral: Llama with a window over all layers, in its first versions.

GGUF files call it llama and leave the window out, as llama.cpp has none for it.

Reference: transformers/models/mistral/; llama.cpp conversion/llama.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qnpu_jax.config import LayerKind
from qnpu_jax.models.family import Family
from qnpu_jax.models.fields import Fields


def layers(config: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    window = config.count("sliding_window") if "sliding_window" in config else None
    return [replace(kind, window=window)] * count


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    gguf="llama",
    # sliding_window: null in the file means none; no such key at all means 4096.
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    reads=frozenset({"sliding_window"}),
    permuted=True,
    hf_layers=layers,
)
