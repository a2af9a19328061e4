"""GGUF files (llama.cpp): configuration and dequantized float32 tensors.

Conversion to GGUF renames tensors, and for some families permutes the rows of q and k; both are
undone here.

Reference: llama.cpp conversion/ (convert_hf_to_gguf.py), src/llama-model.cpp.
"""

from __future__ import annotations

from qnpu_jax.config import ModelConfig
from qnpu_jax.models.file_tensors import FloatParams, StoredTensor, fill_params
from qnpu_jax.models.gguf_config import read_config, read_family
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.gguf_rope import ROPE_TENSORS
from qnpu_jax.models.gguf_tensors import tensor_reader


def load_gguf(file: GgufFile, context: int | None = None) -> tuple[ModelConfig, FloatParams]:
    """Loads configuration and float32 parameters of an opened GGUF file.

    Args:
      context: tokens that the model must hold, see `rope_scaling.positions`.

    Raises:
      UserError: see `read_config`, `fill_params`; a tensor type that `gguf` cannot dequantize.
    """
    where, family = file.path.name, read_family(file)
    cfg = read_config(file, context)
    heads = {".attn_q.": cfg.num_heads, ".attn_k.": cfg.num_kv_heads} if family.permuted else {}
    stored = {
        name: StoredTensor(
            where,
            tensor.shape,
            tensor_reader(file, name, next((n for p, n in heads.items() if p in name), 0)),
        )
        for name, tensor in file.tensors.items()
        if name not in ROPE_TENSORS
    }
    return cfg, fill_params(cfg, stored, "gguf", where, family)
