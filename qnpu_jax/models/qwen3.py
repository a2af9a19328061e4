"""Qwen3: Llama with RMS norms of queries and keys over each head; upper layers may have a window.

Reference: transformers/models/qwen3/; llama.cpp conversion/qwen.py (q and k are not permuted).
"""

from __future__ import annotations

from qnpu_jax.models import qwen2
from qnpu_jax.models.family import Family
from qnpu_jax.models.llama import attention_biases

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    defaults={**qwen2.DEFAULTS, "head_dim": 128},
    reads=qwen2.READS | {"attention_bias"},
    facts={"qk_norm": "head"},
    hf_facts=attention_biases,
    hf_layers=qwen2.layers,
)
