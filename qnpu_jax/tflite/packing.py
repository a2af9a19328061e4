"""Type, quantization and contents of a tensor of a .tflite, checked and packed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_jax.tflite.op_versions import DType, Quantization

_NUMPY = {
    "int4": np.dtype(np.int8),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True, eq=False)
class TensorType:
    """Type and quantization of a tensor: real = scale (code - zero_point).

    Attributes:
      dtype: `int4` stands for codes in an int8 array, which the file holds two to a byte.
      scale: float32, a scalar or one per channel of `axis`; None for a tensor without quantization.
      zero_point: code of the real value 0; one for all channels or one per channel.
      axis: channel axis of a per-channel scale.
    """

    dtype: DType
    scale: np.floating | np.ndarray | None = None
    zero_point: int | np.ndarray = 0
    axis: int = 0


def checked_quantization(
    name: str, shape: tuple[int, ...], tensor_type: TensorType
) -> Quantization | None:
    """Returns the quantization as the file has it, None for a tensor without.

    Raises:
      UserError: as `SubgraphWriter.add_tensor`.
    """
    scale, zero_point, axis = tensor_type.scale, tensor_type.zero_point, tensor_type.axis
    if scale is None:
        return None
    scales = np.atleast_1d(np.asarray(scale))
    if scales.dtype != np.float32 or scales.ndim != 1:
        raise UserError(
            f"{name}: scale must be a float32 scalar or vector, because the file keeps its bits;"
            f" got {scales.dtype} of shape {np.shape(scale)}; round it once with np.float32"
        )
    zero_points = np.broadcast_to(np.asarray(zero_point, np.int64), scales.shape)
    if scales.size > 1 and (not 0 <= axis < len(shape) or scales.size != shape[axis]):
        raise UserError(
            f"{name}: expected one scale, or one per channel of axis {axis} of shape {shape};"
            f" got {scales.size}"
        )
    return Quantization(scales, np.ascontiguousarray(zero_points), axis)


def packed(name: str, shape: tuple[int, ...], dtype: DType, data: np.ndarray) -> np.ndarray:
    """Returns contents as the file has them: checked, and int4 codes two to a byte.

    Raises:
      UserError: as `SubgraphWriter.add_tensor`.
    """
    if data.shape != shape or data.dtype != _NUMPY[dtype]:
        raise UserError(
            f"{name}: a {dtype} tensor expects data of shape {shape} and dtype {_NUMPY[dtype]};"
            f" got {data.shape} {data.dtype}"
        )
    return pack_int4(data, name) if dtype == "int4" else data


def pack_int4(codes: np.ndarray, name: str = "codes") -> np.ndarray:
    """Packs int4 codes: element 2i in the low nibble of byte i, element 2i + 1 in the high one.

    Args:
      codes: int8 array of any shape, read in C order, in [-8, 7].
      name: of the tensor, for the error.

    Returns:
      uint8 vector of ceil(size / 2) bytes; after an odd last element the high nibble is 0.

    Raises:
      UserError: a code lies outside [-8, 7].

    Example:
      >>> pack_int4(np.array([1, 2, -1], np.int8)).tolist()  # 0x21, 0x0f
      [33, 15]

    Reference: LiteRT tflite/kernels/internal/portable_tensor_utils.cc, `UnpackDenseInt4IntoInt8`.
    """
    flat = codes.reshape(-1)
    if flat.size and (flat.min() < -8 or flat.max() > 7):
        raise UserError(f"{name}: int4 codes must lie in [-8, 7]; got [{flat.min()}, {flat.max()}]")
    nibbles = flat.view(np.uint8) & np.uint8(15)
    packed = nibbles[::2].copy()
    packed[: flat.size // 2] |= nibbles[1::2] << np.uint8(4)
    return packed
