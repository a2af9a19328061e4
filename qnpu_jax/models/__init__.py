"""Checkpoints in: Hugging Face folders and GGUF files, with their tokenizers."""

from qnpu_jax.models.chat import FIXED_DATE, python_methods
from qnpu_jax.models.checkpoint import EMBEDDED, Checkpoint, load, load_params
from qnpu_jax.models.file_tensors import sha256
from qnpu_jax.models.tokenizer import TOKENIZER, Tokenizer

__all__ = [
    "EMBEDDED",
    "FIXED_DATE",
    "TOKENIZER",
    "Checkpoint",
    "Tokenizer",
    "load",
    "load_params",
    "python_methods",
    "sha256",
]
