"""Makes the golden models: tiny random ones in Hugging Face format with logits by transformers.

What is correct for loaders and graph is what the reference implementation computes, so it makes
these files once and they are committed. torch is no dependency of the project; make an
environment of its own:

    python -m venv torchvenv && torchvenv/bin/pip install torch==2.13.0 transformers numpy
    torchvenv/bin/python tests/golden/make_golden.py [NAMES]

For each model: <name>/config.json, <name>/model.safetensors (float32), and <name>.npz with
`tokens` int32 [T] and `logits` float32 [T, V] (eager attention, float32, no cache). A model with
longrope also has `long_tokens`, more than its original context, and `long_logits`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

HERE = Path(__file__).parent
TOKENS = 24

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that fast, slow and in-between frequencies all occur in a head of 24 and show
    # within 24 tokens.
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}

MODELS: dict[str, dict[str, Any]] = {
    "mha_tied": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "gqa_llama3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rope_parameters": LLAMA3,
        "tie_word_embeddings": False,
    },
    "mqa_linear_bias": {
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_parameters": LINEAR,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
}
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Windows are shorter than the 24 tokens, and every kind of layer occurs."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_tiny": (
        "qwen2",
        {
            "head_dim": None,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_tiny": ("qwen3", {"tie_word_embeddings": False}),
    "gemma3_tiny": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            },
        },
    ),
    "smollm3_tiny": ("smollm3", {"num_hidden_layers": 4}),
    "granite_tiny": (
        "granite",
        {
            "head_dim": None,
            "hidden_size": 48,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.13,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3_tiny": (
        "phi3",
        {
            "head_dim": None,
            "hidden_size": 48,
            "sliding_window": 20,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.67,
                "short_factor": [1.0, 1.3, 1.9, 2.4],
                "long_factor": [1.0, 2.1, 5.0, 9.5],
            },
        },
    ),
    "olmo2_tiny": ("olmo2", {"head_dim": None, "hidden_size": 48}),
    "mistral_tiny": ("mistral", {"sliding_window": 5}),
    "yarn_tiny": (
        "llama",
        {
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 4.0,
            },
        },
    ),
}
LONG = {"phi3_tiny": 40}
"""Tokens beyond the original context, of models with longrope."""


def randomize(model: PreTrainedModel) -> None:
    """Gives every parameter values that show: the default 0.02 leaves attention uniform, gammas 1
    and biases 0, so that a swap or something left out would not be seen."""
    one = 0.0 if isinstance(model, Gemma3ForCausalLM) else 1.0  # its gamma is 1 + weight
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(one + 0.3 * noise if "norm" in key else noise * (0.5 if "bias" in key else 0.2))


def make(name: str, seed: int, config: PreTrainedConfig) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(model)
    with torch.no_grad():
        tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
        logits = {"logits": model(tokens, use_cache=False).logits[0].numpy()}
        if name in LONG:
            ids = torch.randint(0, config.vocab_size, (1, LONG[name]))
            logits["long_tokens"] = ids[0].numpy().astype(np.int32)
            logits["long_logits"] = model(ids, use_cache=False).logits[0].numpy()
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    np.savez(HERE / f"{name}.npz", tokens=tokens[0].numpy().astype(np.int32), **logits)
    print(f"{name}: {model.num_parameters()} parameters, logits std {logits['logits'].std():.3f}")


def configurations() -> dict[str, PreTrainedConfig]:
    """Gives the configuration of every golden model; None in a table stands for no such key."""
    llamas = {name: LlamaConfig(**{**COMMON, **changes}) for name, changes in MODELS.items()}
    families = {
        name: AutoConfig.for_model(
            kind, **{k: v for k, v in {**TINY, **changes}.items() if v is not None}
        )
        for name, (kind, changes) in FAMILIES.items()
    }
    return llamas | families


if __name__ == "__main__":
    for seed, (name, config) in enumerate(configurations().items()):
        if not sys.argv[1:] or name in sys.argv[1:]:
            make(name, seed, config)
