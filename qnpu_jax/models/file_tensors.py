"""Tensors in checkpoint files, and how they become the parameters of a model.

Names and shapes of all tensors are checked first. Then each tensor is read block by block straight
into the final stacked arrays, so loading needs little more memory than the parameters. Mapping the
files into memory would need twice as much: mapped pages count as the process's.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.models.family import Family
from qnpu_jax.models.llama import ExpectedTensor, expected_tensors

FloatArray = Float32[np.ndarray, "..."]
FloatParams = dict[str, FloatArray]
"""Parameters of a checkpoint by name: real values, in host memory."""

LARGEST = 2.0**63
"""Largest weight that is taken: its square, which norms sum up, is finite in float32. A flipped
exponent bit makes a usual weight 2^128 times larger."""
BLOCK = 1 << 20
"""Elements converted at a time (4 MiB of float32)."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
      file: name of the file, for messages.
      shape: shape in the file, outermost axis first.
      read: function that fills a C-contiguous float32 array of that shape.
    """

    file: str
    shape: tuple[int, ...]
    read: Callable[[FloatArray], None]


def fill_params(
    cfg: ModelConfig,
    stored: Mapping[str, StoredTensor],
    naming: Literal["hf", "gguf"],
    where: str,
    family: Family,
) -> FloatParams:
    """Reads every tensor of a model into float32 arrays, those of the layers stacked on axis 0.

    Args:
      stored: tensors that the files hold, by their names there.
      naming: convention of these names.
      where: the model's name, for messages.

    Returns:
      Arrays by the names of `llama.expected_tensors`.

    Raises:
      UserError: a tensor is missing, superfluous, of another shape, or holds NaN, Inf or a value
        whose square is none of float32.
    """
    expected = expected_tensors(cfg, family.fused)
    _check_names(cfg, expected, stored, naming, where, family.architecture)
    params: FloatParams = {}
    for name, tensors in itertools.groupby(expected, lambda t: getattr(t, naming)):
        parts = list(tensors)
        for tensor in parts:
            layers = (cfg.num_layers,) if tensor.per_layer else ()
            params[tensor.param] = np.empty((*layers, *tensor.shape), np.float32)
        for i in range(cfg.num_layers if parts[0].per_layer else 1):
            out = [params[t.param][i] if t.per_layer else params[t.param] for t in parts]
            _fill(stored[name.format(i=i)], name.format(i=i), out)
        if naming == "hf" and family.gamma_offset and parts[0].param.endswith(".gamma"):
            params[parts[0].param] += np.float32(family.gamma_offset)
    return params


def _fill(stored: StoredTensor, name: str, out: Sequence[FloatArray]) -> None:
    """Reads a stored tensor into its parameters, whose rows it holds one below the other."""
    if len(out) == 1:
        stored.read(out[0])
        _check_finite(stored.file, name, out[0])
        return
    whole = np.empty(stored.shape, np.float32)
    stored.read(whole)
    _check_finite(stored.file, name, whole)
    row = 0
    for part in out:
        part[...] = whole[row : row + len(part)]
        row += len(part)


def _check_names(
    cfg: ModelConfig,
    expected: Sequence[ExpectedTensor],
    stored: Mapping[str, StoredTensor],
    naming: Literal["hf", "gguf"],
    where: str,
    architecture: str,
) -> None:
    # A damaged count of layers may be 2^32: names of one more layer than there are tensors are
    # enough to find one that is missing.
    layers = range(min(cfg.num_layers, len(stored) + 1))
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in expected:
        name = getattr(tensor, naming)
        names = [name.format(i=i) for i in layers] if tensor.per_layer else [name]
        shapes.update(dict.fromkeys(names, tensor.stored_shape))
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(
                f"{where}: tensor {name} is missing; expected shape {list(shape)}; the download is"
                " incomplete or the configuration is of another model: get both again"
            )
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].file}: tensor {name}: expected shape {list(shape)} from the"
                f" configuration, got {list(stored[name].shape)};"
                " take weights and configuration of the same model"
            )
    if extra := [name for name in stored if name not in shapes]:
        first = stored[extra[0]]
        raise UserError(
            f"{first.file}: tensor {extra[0]} (shape {list(first.shape)}) is unexpected,"
            f" {len(extra)} such in all; expected those of {architecture} with {cfg.num_layers}"
            " layers; use a configuration that fits, or another model"
        )


def _check_finite(file: str, name: str, x: FloatArray) -> None:
    # min and max are NaN where any value is and, unlike isfinite(x), need no second array.
    least, most = float(x.min()), float(x.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        count = int(np.count_nonzero(~np.isfinite(x)))
        raise UserError(
            f"{file}: tensor {name} holds {count} NaN or Inf of {x.size} values;"
            " expected finite weights; get the checkpoint again or repair it"
        )
    if max(-least, most) > LARGEST:
        raise UserError(
            f"{file}: tensor {name} holds {max(least, most, key=abs):.3g}, whose square is Inf in"
            f" float32; expected values up to {LARGEST:.3g}; get the checkpoint again or repair it"
        )


def check_room(file: str, tensor: str, start: int, size: int, available: int) -> None:
    """Raises UserError unless bytes [start, start + size) lie within `available` bytes."""
    if start < 0 or size < 0 or start + size > available:
        raise UserError(
            f"{file}: truncated: {tensor} ends at byte {start + size}, the file at {available};"
            " download it again"
        )


def sha256(paths: Sequence[Path]) -> str:
    """Hashes the files of a model, in hexadecimal.

    One file gives what `sha256sum FILE` prints. Several give `sha256sum FILES | sha256sum`, called
    in their folder with the names in sorted order.
    """
    digests = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(listing.encode()).hexdigest()
