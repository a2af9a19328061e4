"""Checkpoints: config, params and tokenizer of a folder, a GGUF file, a hub name or the demo."""

from qnpu_jax.models.checkpoint import Checkpoint, load, load_params
from qnpu_jax.models.tokenizer import Tokenizer

__all__ = ["Checkpoint", "Tokenizer", "load", "load_params"]
