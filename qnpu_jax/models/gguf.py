"""GGUF files (llama.cpp) of architecture `llama`: configuration and dequantized float32 tensors.

Conversion to GGUF permutes the rows of q and k and renames tensors; both are undone here.

Reference: llama.cpp convert_hf_to_gguf.py, `LlamaModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from qnpu_jax.config import LayerKind, ModelConfig, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.models.file_tensors import (
    BLOCK,
    FloatArray,
    FloatParams,
    StoredTensor,
    check_room,
    fill_params,
)
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.llama import ATTENTION, HEAD, MLP
from qnpu_jax.models.rope_factors import llama3_from_factors

ROPE_FREQS = "rope_freqs.weight"
"""Tensor of divisors of the RoPE frequencies, in place of llama3 scaling's own parameters."""


def load_gguf(file: GgufFile) -> tuple[ModelConfig, FloatParams]:
    """Loads configuration and float32 parameters of an opened GGUF file.

    Raises:
      UserError: see `read_config`, `fill_params`; a tensor type that `gguf` cannot dequantize.
    """
    where, cfg = file.path.name, read_config(file)
    stored = {
        name: StoredTensor(where, tensor.shape, _reader(file, name, cfg))
        for name, tensor in file.tensors.items()
        if name != ROPE_FREQS
    }
    return cfg, fill_params(cfg, stored, "gguf", where)


def read_config(file: GgufFile) -> ModelConfig:
    """Reads the model's shape from the metadata.

    Biases and tied embeddings are not stated there: the file has them where it has their tensors.

    Raises:
      UserError: another architecture, experts, a missing or impossible value, unsupported RoPE
        scaling.
    """
    _check_architecture(file)
    heads = _count(file, "attention.head_count")
    hidden = _count(file, "embedding_length")
    kv_heads = _count(file, "attention.head_count_kv", heads)
    head_dim = _count(file, "attention.key_length", hidden // heads)
    if heads % kv_heads:
        raise _bad_value(file, "attention.head_count_kv", f"a divisor of {heads}", kv_heads)
    if head_dim < 2 or head_dim % 2:
        raise _bad_value(file, "attention.key_length", "even", head_dim)
    theta = _real(file, "rope.freq_base", 10000.0)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (got := _count(file, key, head_dim)) != head_dim:
            raise _bad_value(file, key, f"the head size {head_dim}", got)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return ModelConfig(
        family="llama",
        vocab_size=_count(file, "vocab_size", len(tokens) if isinstance(tokens, list) else None),
        hidden_size=hidden,
        intermediate_size=_count(file, "feed_forward_length"),
        num_layers=_count(file, "block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=_count(file, "context_length"),
        rms_norm_eps=_real(file, "attention.layer_norm_rms_epsilon", 1e-5),
        kinds=(LayerKind(theta, _rope_scaling(file, head_dim, theta)),),
        tie_embeddings=HEAD[1] not in file.tensors,
        biases=(
            *(ATTENTION if "blk.0.attn_q.bias" in file.tensors else ()),
            *(MLP if "blk.0.ffn_gate.bias" in file.tensors else ()),
        ),
    )


def _check_architecture(file: GgufFile) -> None:
    name, meta = file.path.name, file.metadata
    if (got := meta.get("general.architecture")) != "llama":
        raise UserError(
            f"{name}: architecture {got!r}; expected 'llama'; only the Llama family is supported"
        )
    if parts := meta.get("split.count", 0):
        raise UserError(
            f"{name}: one of {parts} parts; expected a whole model;"
            " join them with llama-gguf-split --merge"
        )
    if experts := meta.get("llama.expert_count", 0):
        raise UserError(
            f"{name}: llama.expert_count is {experts}; expected a dense model;"
            " use one without experts"
        )


def _bad_value(file: GgufFile, key: str, expected: str, got: Any) -> UserError:
    return UserError(
        f"{file.path.name}: llama.{key} must be {expected}; got {got!r};"
        " use another conversion of the model, or its Hugging Face folder"
    )


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    got = file.metadata.get(f"llama.{key}", default)
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        raise _bad_value(file, key, "one positive integer", got)
    return got


def _real(file: GgufFile, key: str, default: float) -> float:
    got = file.metadata.get(f"llama.{key}", default)
    if not isinstance(got, int | float) or not (0 < got <= np.finfo(np.float32).max):
        raise _bad_value(file, key, "a positive number", got)
    # GGUF stores float32: 1e-5 comes back as 9.999999747e-06. The shortest decimal was meant.
    return float(str(np.float32(got)))


def _rope_scaling(file: GgufFile, head_dim: int, theta: float) -> RopeScaling | None:
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if ROPE_FREQS in file.tensors:
        if kind != "none":
            raise _bad_value(file, "rope.scaling.type", f"'none' beside {ROPE_FREQS}", kind)
        read = _reader(file, ROPE_FREQS, None)  # checks the size before it is allocated
        factors = np.empty(file.tensors[ROPE_FREQS].shape, np.float32)
        read(factors)
        context = _count(file, "rope.scaling.original_context_length", 8192)
        return llama3_from_factors(factors, head_dim, theta, context, file.path.name)
    # Files from before 2023-10 have scale_linear alone.
    factor = _real(file, "rope.scaling.factor", _real(file, "rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise _bad_value(file, "rope.scaling.type", "'none' or 'linear'", kind)
    scaled = factor != 1.0 and (kind == "linear" or "llama.rope.scale_linear" in file.metadata)
    return RopeScaling("linear", factor) if scaled else None


def _reader(file: GgufFile, name: str, cfg: ModelConfig | None) -> Callable[[FloatArray], None]:
    """Makes a function that dequantizes one tensor into a float32 array, some rows at a time."""
    tensor, where = file.tensors[name], file.path.name
    try:
        kind = GGMLQuantizationType(tensor.type_code)
        _dequantize_row(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError):
        raise UserError(
            f"{where}: tensor {name} has ggml type {tensor.type_code}, which cannot be dequantized;"
            " use a conversion to F16, Q8_0 or another common type"
        ) from None
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    row = tensor.shape[-1] if tensor.shape else 1
    if row % block_size:
        raise UserError(
            f"{where}: tensor {name}: expected rows of a multiple of {block_size} for {kind.name},"
            f" got {row}; the file is damaged: download it again"
        )
    row_bytes = row // block_size * block_bytes
    check_room(where, name, tensor.offset, math.prod(tensor.shape[:-1]) * row_bytes, file.size)
    heads = _rotary_heads(name, cfg)

    def read(out: FloatArray) -> None:
        rows = out.reshape(-1, row)
        step = max(1, BLOCK // max(1, row))
        with file.path.open("rb") as data:
            data.seek(tensor.offset)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                raw = np.fromfile(data, np.uint8, len(part) * row_bytes)
                part[...] = _dequantize_row(raw.reshape(len(part), row_bytes), kind)
        if heads:
            out[...] = unpermute(out, heads)

    return read


def _dequantize_row(raw: np.ndarray, kind: GGMLQuantizationType) -> FloatArray:
    # A damaged scale may overflow here. `fill_params` reports the Inf by the tensor's name.
    with np.errstate(all="ignore"):
        return dequantize(raw, kind)


def _rotary_heads(name: str, cfg: ModelConfig | None) -> int:
    """Counts the heads whose rows llama.cpp permuted in this tensor; 0 for none."""
    if cfg is None:
        return 0
    heads = {".attn_q.": cfg.num_heads, ".attn_k.": cfg.num_kv_heads}
    return next((count for part, count in heads.items() if part in name), 0)


def unpermute(x: FloatArray, heads: int) -> FloatArray:
    """Undoes llama.cpp's reordering of the rows of q and k, head by head.

    llama.cpp's RoPE rotates neighbours (2i, 2i + 1); Hugging Face's and ours rotates (i, i + K/2).
    So row 2i + h of a head of K rows goes back to row i + h K/2, h = 0 or 1.

    >>> unpermute(np.array([0, 2, 1, 3], np.float32), heads=1).tolist()
    [0.0, 1.0, 2.0, 3.0]

    Args:
      x: weight (heads K, D) or bias (heads K,).

    Reference: llama.cpp convert_hf_to_gguf.py, `LlamaModel.permute`.
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
