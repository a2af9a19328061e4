"""A tiny Hugging Face folder with a real tokenizer: the command line's whole job in seconds."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from model_files import write_model

from qnpu_jax.config import ModelConfig
from qnpu_jax.corpus import default_text
from qnpu_jax.models.huggingface import read_config
from qnpu_jax.models.llama import expected_tensors

VOCAB = 320
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def write_tiny_model(folder: Path, vocab_size: int = VOCAB) -> Path:
    """Random weights, and byte-level BPE trained on Python's documentation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_model(folder, CONFIG, random_tensors(read_config(folder)))
    _write_tokenizer(folder, vocab_size)
    return folder


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights by their Hugging Face names: norms near 1, matrices of standard deviation 0.2."""
    rng = np.random.default_rng(0)
    out = {}
    for tensor in expected_tensors(config):
        for i in range(config.num_layers if tensor.per_layer else 1):
            x = rng.normal(0, 0.2, tensor.shape).astype(np.float32)
            out[tensor.hf.format(i=i)] = x + 1 if "norm" in tensor.hf else x
    return out


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([default_text()[:20_000]], trainer)
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
