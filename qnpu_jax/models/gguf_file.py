"""Headers of GGUF files: metadata, and the place of each tensor.

The `gguf` package has a reader too. It keeps several array objects for each string, which takes 2 s
for a vocabulary of 49k tokens (0.2 s here), and a damaged file ends in an IndexError. Only its
dequantization is used, in `models/gguf.py`.

Reference: ggml/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qnpu_jax.errors import UserError

_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("bool"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Place of a tensor in a GGUF file.

    Attributes:
      shape: numbers of elements, outermost axis first.
      type_code: ggml type of its elements (`gguf.constants.GGMLQuantizationType`).
      offset: bytes from the start of the file.
    """

    shape: tuple[int, ...]
    type_code: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been read.

    Attributes:
      size: bytes of the file.
      metadata: values by key, as Python's numbers, strings and lists.
      tensors: places of the tensors by name.
    """

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file, version 2 or 3, little endian.

    Raises:
      UserError: not a GGUF file, another version, truncated or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(file, path.name, size)
        try:
            return GgufFile(path, size, *_read_header(cursor))
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            raise UserError(
                f"{path.name}: damaged GGUF header ({error}); download it again"
            ) from None


@dataclass
class _Cursor:
    """Reads numbers, strings and values one after another; refuses to read past the end."""

    file: BinaryIO
    name: str
    size: int

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise UserError(
                f"{self.name}: truncated: the GGUF header needs {count} more bytes at byte"
                f" {self.file.tell()}, the file ends at {self.size}; download it again"
            )
        return self.file.read(count)

    def number(self, kind: str) -> int:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in _SCALARS:
                return np.frombuffer(
                    self.take(count * _SCALARS[item].itemsize), _SCALARS[item]
                ).tolist()
            return [self.value(item) for _ in range(count)]
        if code in _SCALARS:
            return np.frombuffer(self.take(_SCALARS[code].itemsize), _SCALARS[code])[0].item()
        raise ValueError(f"value type {code} at byte {self.file.tell()}")


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if cursor.size < 4 or cursor.take(4) != b"GGUF":
        raise UserError(f"{cursor.name}: not a GGUF file; expected it to begin with the bytes GGUF")
    if (version := cursor.number("I")) not in (2, 3):
        raise UserError(
            f"{cursor.name}: GGUF version {version}; expected 2 or 3, little endian;"
            " convert the model with a current llama.cpp"
        )
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    tensors = {}
    for _ in range(tensor_count):
        name = cursor.string()
        # ggml lists the innermost axis first.
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
        tensors[name] = GgufTensor(shape, cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment {alignment!r}")
    start = -(-cursor.file.tell() // alignment) * alignment
    return metadata, {
        name: GgufTensor(t.shape, t.type_code, start + t.offset) for name, t in tensors.items()
    }
