"""Safetensors files: their headers, and tensors read into float32 arrays.

Reference: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.models.file_tensors import BLOCK, FloatArray, StoredTensor, check_room

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that can be read, and bytes of an element."""


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file: 8 bytes with its length, JSON; then come the data.

    The library of that name would map the file into memory, which doubles the peak.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        check_room(path.name, "the header", 8, length, size)
        text = file.read(length)
    try:
        header = artifacts.parse_json(text)
        header.pop("__metadata__", None)
        return {name: _entry(path, name, e, 8 + length, size) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path.name}: damaged safetensors header ({error}); download it again"
        ) from None


def _entry(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    """Checks an entry of the header; data begin at byte `data` of a file of `size` bytes."""
    dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
    begin, end = map(int, entry["data_offsets"])
    if dtype not in _BYTES:
        raise UserError(
            f"{path.name}: tensor {name} has type {dtype}; expected one of {sorted(_BYTES)};"
            " use the float checkpoint of the model"
        )
    check_room(path.name, f"tensor {name}", data + begin, end - begin, size)
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise ValueError(f"tensor {name}: {end - begin} bytes for shape {list(shape)} of {dtype}")
    return StoredTensor(path.name, shape, _reader(path, dtype, data + begin))


def _reader(path: Path, dtype: str, offset: int) -> Callable[[FloatArray], None]:
    def read(out: FloatArray) -> None:
        flat = out.reshape(-1)
        with path.open("rb") as file:
            file.seek(offset)
            for start in range(0, flat.size, BLOCK):
                part = flat[start : start + BLOCK]
                match dtype:
                    case "F32":
                        file.readinto(part.data.cast("B"))
                    case "F16":
                        part[...] = np.fromfile(file, "<f2", part.size)
                    case "F64":
                        # What float32 cannot hold becomes Inf, which `fill_params` reports.
                        with np.errstate(over="ignore"):
                            part[...] = np.fromfile(file, "<f8", part.size)
                    case _:  # bfloat16 is the upper half of a float32
                        raw = np.fromfile(file, "<u2", part.size)
                        part.view(np.uint32)[...] = raw.astype(np.uint32) << 16

    return read
