"""OLMo-2: RMS norms after the blocks and none before; norms of queries and keys over all heads.

Reference: transformers/models/olmo2/; llama.cpp conversion/olmo.py (q and k are not permuted).
"""

from __future__ import annotations

from qnpu_jax.models.family import Family
from qnpu_jax.models.llama import attention_biases

OLMO2 = Family(
    name="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    gguf="olmo2",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    reads=frozenset({"attention_bias"}),
    facts={"norms": "after", "qk_norm": "all"},
    hf_facts=attention_biases,
)
