"""Makes the golden models: tiny random Llamas in Hugging Face format with logits by transformers.

What is correct for loaders and graph is what the reference implementation computes, so it makes
these files once and they are committed. torch is no dependency of the project; make an
environment of its own:

    python -m venv torchvenv && torchvenv/bin/pip install torch==2.13.0 transformers numpy
    torchvenv/bin/python tests/golden/make_golden.py

For each model: <name>/config.json, <name>/model.safetensors (float32), and <name>.npz with
`tokens` int32 [T] and `logits` float32 [T, V] (eager attention, float32, no cache).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


def make(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(**{**COMMON, **MODELS[name]}, attn_implementation="eager")
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            # The default 0.02 leaves attention uniform, gammas 1, biases 0: a swap would not show.
            noise = torch.randn_like(p)
            p.copy_(1.0 + 0.3 * noise if "norm" in key else noise * (0.5 if "bias" in key else 0.2))
        tokens = torch.randint(0, config.vocab_size, (1, TOKENS))
        logits = model(tokens, use_cache=False).logits[0]
    shutil.rmtree(HERE / name, ignore_errors=True)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    np.savez(HERE / f"{name}.npz", tokens=tokens[0].numpy().astype(np.int32), logits=logits.numpy())
    print(f"{name}: {model.num_parameters()} parameters, logits std {logits.std():.3f}")


if __name__ == "__main__":
    for seed, name in enumerate(MODELS):
        make(name, seed)
