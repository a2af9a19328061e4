"""Proof of a file with a KV cache: every tensor of both signatures, run by LiteRT, equals the
simulator's while chunks and single steps fill the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int8, Integer

from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.integer import IntegerModel
from qnpu_jax.proof.comparison import Comparison, compare_tensors, op_names
from qnpu_jax.runtime import LiteRTBackend, Session, Shape
from qnpu_jax.tflite import cached_decoder


@runtime_checkable
class CachedSimulator(Protocol):
    """Simulator of the signatures of `cached.build_cached`.

    Attributes:
      shape: sizes of the model.
    """

    shape: Shape

    def tensors(
        self,
        ids: Integer[np.ndarray, " t"],
        filled: int,
        k: Int8[np.ndarray, "l n c k"],
        v: Int8[np.ndarray, "l n k c"],
    ) -> Mapping[str, np.ndarray]:
        """Runs the signature of T tokens and returns codes of every tensor, by global name.

        Arguments are those of `session.Backend.step`.
        """
        ...


@dataclass(frozen=True)
class CachedProof:
    """A file with a KV cache compared with the simulator.

    Attributes:
      comparison: of every tensor of every step, added up.
      steps: tokens that each step was fed, in order.
    """

    comparison: Comparison
    steps: tuple[int, ...]


def steps(prefill: int, length: int) -> Iterator[int]:
    """Yields the tokens of each step: a chunk, two single tokens, and so on; the rest one by one.

    Example:
      >>> list(steps(4, 12))
      [4, 1, 1, 4, 1, 1]
    """
    left = length
    while left:
        for count in (prefill, 1, 1):
            if count <= left:
                yield count
                left -= count


def prove_cached(
    path: Path,
    model: IntegerModel,
    simulator: CachedSimulator,
    ids: Integer[np.ndarray, " t"],
    kernels: KernelSet = "ref",
    logits: Positions = "last",
) -> CachedProof:
    """Feeds text to a file and to the simulator, and compares every tensor of every step.

    Args:
      path: file that `cached.build_cached` wrote of the model.
      simulator: of the same lengths, kernels and logits as the file.
      ids: token ids of the text, no more than the context has positions.
      kernels: kernels of LiteRT.
      logits: positions that the file's prefill gives logits of.

    Raises:
      UserError: the file is missing, damaged, or of another model.
    """
    backend = LiteRTBackend(path, kernels, keep_tensors=True)
    session, shape = Session(backend), simulator.shape
    taken = tuple(steps(shape.prefill, len(ids)))
    found = []
    for count in taken:
        at, slots = session.filled, shape.context - count
        now = np.asarray(ids[at : at + count], np.int32)
        past = (session.k[:, :, :slots], session.v[..., :slots])
        expected = simulator.tensors(now, at, *past)
        session.step(now, count)
        ops = op_names(cached_decoder(model, count, shape.context, logits))
        found.append(compare_tensors(backend.tensors(count), expected, ops))
    return CachedProof(Comparison.of_all(found), taken)
