"""Gemma 3 (text): norms around both blocks, norms of queries and keys, local and global layers.

Local layers have a window and a RoPE base of their own. Files of Hugging Face hold gamma - 1.
transformers rounds sqrt(D) to the type of the weights it runs in; here it stays exact.

Reference: transformers/models/gemma3/; llama.cpp conversion/gemma.py (q and k are not permuted),
src/models/gemma3.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qnpu_jax.config import LayerKind
from qnpu_jax.models.family import Facts, Family, layer_types
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.llama import attention_biases
from qnpu_jax.models.rope_scaling import layer_kind, nested

LOCAL, GLOBAL = "sliding_attention", "full_attention"
LOCAL_THETA, GLOBAL_THETA = 1e4, 1e6
PERIOD = 6
"""Every sixth layer is global."""
LAYERS_27B = 62
"""Layers of the one size whose query scale is not head_dim^-1/2."""


def global_rope(config: Fields) -> Fields:
    """Finds the RoPE parameters of global layers; those of `rope_scaling` are added to them."""
    scaling = nested(config, config.get("rope_scaling", {}))
    return replace(scaling, data={**_rope_of(config, GLOBAL).data, **scaling.data})


def _rope_of(config: Fields, layer_type: str) -> Fields:
    parameters = nested(config, config.get("rope_parameters", {}))
    if parameters.data.keys() - {LOCAL, GLOBAL}:
        raise config.bad("rope_parameters", f"an object of {GLOBAL} and {LOCAL}")
    return nested(config, parameters.get(layer_type, {}))


def facts(config: Fields) -> Facts:
    return {
        **attention_biases(config),
        "embed_scale": config.count("hidden_size") ** 0.5,
        "query_scale": config.real("query_pre_attn_scalar") ** -0.5,
    }


def layers(config: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    """Reads which layers are local, and their RoPE."""
    rope = _rope_of(config, LOCAL)
    theta = rope.real("rope_theta", config.real("rope_local_base_freq"))
    local = layer_kind(config, replace(rope, data={**rope.data, "rope_theta": theta}), None)
    local = replace(local, window=config.count("sliding_window"))
    period = config.count("sliding_window_pattern")
    types = layer_types(config, count, [bool((i + 1) % period) for i in range(count)])
    return [local if t == LOCAL else kind for t in types]


def gguf_facts(metadata: Fields) -> Facts:
    """Gives the scales: GGUF files leave them out, llama.cpp knows them by the number of layers."""
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    size = metadata.count("attention.key_length", hidden // heads)
    scalar = hidden // heads if metadata.count("block_count") == LAYERS_27B else size
    return {"embed_scale": hidden**0.5, "query_scale": scalar**-0.5}


def gguf_layers(metadata: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    """Reads the window and which layers have it: a period, or one flag for each layer."""
    window, pattern = "attention.sliding_window", "attention.sliding_window_pattern"
    if not metadata.get(window):
        return [kind] * count
    theta = metadata.real("rope.freq_base_swa", LOCAL_THETA)
    local = LayerKind(theta, window=metadata.count(window))
    flags = metadata.get(pattern, PERIOD)
    if not isinstance(flags, list):
        period = metadata.count(pattern, PERIOD)
        flags = [bool((i + 1) % period) for i in range(count)]
    if len(flags) != count:
        raise metadata.bad(pattern, f"a period, or {count} flags")
    return [local if flag else kind for flag in flags]


GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    gguf="gemma3",
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": PERIOD,
        "rope_theta": GLOBAL_THETA,
        "rope_local_base_freq": LOCAL_THETA,
    },
    reads=frozenset(
        {
            "attention_bias",
            "query_pre_attn_scalar",
            "sliding_window",
            "sliding_window_pattern",
            "layer_types",
            "rope_local_base_freq",
        }
    ),
    facts={"norms": "both", "qk_norm": "head", "activation": "gelu_tanh"},
    gamma_offset=1.0,
    rope=global_rope,
    hf_facts=facts,
    hf_layers=layers,
    gguf_reads=frozenset(
        {
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "rope.freq_base_swa",
        }
    ),
    gguf_facts=gguf_facts,
    gguf_layers=gguf_layers,
)
