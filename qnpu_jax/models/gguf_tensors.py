"""Tensors of GGUF files: dequantized to float32, the rows of q and k in Hugging Face's order.

Reference: llama.cpp conversion/llama.py, `LlamaModel.permute`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from qnpu_jax.errors import UserError
from qnpu_jax.models.file_tensors import BLOCK, FloatArray, check_room
from qnpu_jax.models.gguf_file import GgufFile


def read_tensor(file: GgufFile, name: str) -> FloatArray:
    """Reads a small tensor.

    Raises:
      UserError: see `tensor_reader`.
    """
    read = tensor_reader(file, name)  # checks the size before it is allocated
    out = np.empty(file.tensors[name].shape, np.float32)
    read(out)
    return out


def tensor_reader(file: GgufFile, name: str, heads: int = 0) -> Callable[[FloatArray], None]:
    """Makes a function that dequantizes one tensor into a float32 array, some rows at a time.

    Args:
      heads: heads whose rows conversion permuted, 0 for none.

    Raises:
      UserError: a type that `gguf` cannot dequantize, or a tensor beyond the file's end.
    """
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


def unpermute(x: FloatArray, heads: int) -> FloatArray:
    """Undoes llama.cpp's reordering of the rows of q and k, head by head.

    llama.cpp's RoPE rotates neighbours (2i, 2i + 1); Hugging Face's and ours rotates (i, i + K/2).
    So row 2i + h of a head of K rows goes back to row i + h K/2, h = 0 or 1.

    >>> unpermute(np.array([0, 2, 1, 3], np.float32), heads=1).tolist()
    [0.0, 1.0, 2.0, 3.0]

    Args:
      x: weight (heads K, D) or bias (heads K,).

    Reference: llama.cpp conversion/llama.py, `LlamaModel.permute`.
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
