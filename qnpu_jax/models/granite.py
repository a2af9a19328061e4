"""Granite 3: Llama with factors of embeddings, scores, what blocks add, and logits.

Reference: transformers/models/granite/; llama.cpp conversion/granite.py (q and k are permuted),
src/models/granite.cpp.
"""

from __future__ import annotations

from qnpu_jax.models.family import Facts, Family
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.llama import biases


def facts(config: Fields) -> Facts:
    return {
        **biases(config),
        "embed_scale": config.real("embedding_multiplier", 1.0),
        "query_scale": config.real("attention_multiplier", 1.0),
        "residual_scale": config.real("residual_multiplier", 1.0),
        "logits_scale": 1.0 / config.real("logits_scaling", 1.0),
    }


def gguf_facts(metadata: Fields) -> Facts:
    """Reads the factors; llama.cpp takes an absent factor, or one of 0, as none."""

    def factor(key: str, default: float | None) -> float | None:
        return metadata.real(key) if metadata.get(key) else default

    return {
        "embed_scale": factor("embedding_scale", 1.0),
        "query_scale": factor("attention.scale", None),
        "residual_scale": factor("residual_scale", 1.0),
        "logits_scale": 1.0 / metadata.real("logit_scale"),
    }


GRANITE = Family(
    name="granite",
    model_type="granite",
    architecture="GraniteForCausalLM",
    gguf="granite",
    defaults={"max_position_embeddings": 2048},
    reads=frozenset(
        {
            "attention_bias",
            "mlp_bias",
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
        }
    ),
    permuted=True,
    hf_facts=facts,
    gguf_reads=frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
    gguf_facts=gguf_facts,
)
