"""A conversation with an exported model: the host keeps the KV cache and feeds the signatures
`prefill_<N>` and `decode` of `cached.write_cached`.

Letters: T new tokens, L layers, N KV heads, C context, K head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int8, Integer

from qnpu_jax.errors import UserError


class Step(NamedTuple):
    """What a signature gives for T new tokens: integer codes.

    Attributes:
      logits: (T, V) or (1, V), int8 or int16.
      k, v: of the new tokens, in every layer.
    """

    logits: Integer[np.ndarray, "r v"]
    k: Int8[np.ndarray, "l n t k"]
    v: Int8[np.ndarray, "l n k t"]


@dataclass(frozen=True)
class Shape:
    """Sizes of an exported model.

    Attributes:
      prefill: tokens that the long signature takes.
      context: positions after the prefix, at most.
      layers, heads, width: of the cache, keys (L, N, C, K) and values (L, N, K, C).
    """

    prefill: int
    context: int
    layers: int
    heads: int
    width: int


@runtime_checkable
class Backend(Protocol):
    """Runs one signature."""

    @property
    def shape(self) -> Shape: ...

    @property
    def logit_scale(self) -> float:
        """Real value of one code of the logits; their zero point changes no probability."""
        ...

    def step(
        self,
        ids: Integer[np.ndarray, " t"],
        filled: int,
        k: Int8[np.ndarray, "l n c k"],
        v: Int8[np.ndarray, "l n k c"],
    ) -> Step:
        """T tokens, T = 1 or `shape.prefill`, after `filled` ones.

        Args:
          k, v: the cache's first context - T slots, of which `filled` count.
        """
        ...


class Session:
    """The cache of one conversation, and what fills it.

    Example:
      session = Session(backend)
      logits = session.feed(ids)
      logits = session.feed([int(logits.argmax())])
    """

    def __init__(self, backend: Backend) -> None:
        s = backend.shape
        self._backend = backend
        self.k = np.zeros((s.layers, s.heads, s.context, s.width), np.int8)
        self.v = np.zeros((s.layers, s.heads, s.width, s.context), np.int8)
        self.filled = 0

    @property
    def logit_scale(self) -> float:
        """Real value of one code of the logits."""
        return self._backend.logit_scale

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._backend.shape.context - self.filled

    def feed(self, ids: Sequence[int]) -> Integer[np.ndarray, " v"]:
        """Codes of the logits after the last of some tokens, all of which enter the cache.

        All but the last go through the long signature, in chunks filled up with padding that no
        token sees, as far as the context has room for a chunk; the rest one by one.

        Raises:
          UserError: no tokens, or more than there is room for; nothing has changed then.
        """
        check_room(len(ids), self.filled, self._backend.shape.context)
        before = np.asarray(ids[:-1], np.int32)
        chunk = self._backend.shape.prefill
        while len(before) > 1 and self.room >= chunk:
            self.step(np.resize(before[:chunk], chunk), min(chunk, len(before)))
            before = before[chunk:]
        for token in before:
            self.step(np.asarray([token], np.int32), 1)
        return self.step(np.asarray(ids[-1:], np.int32), 1).logits[-1]

    def step(self, ids: Integer[np.ndarray, " t"], count: int) -> Step:
        """Runs the signature of so many tokens; what is new of the first `count` enters the cache.

        `feed` is the front door; this is for those who look at single steps.
        """
        slots = self._backend.shape.context - len(ids)
        past = [np.ascontiguousarray(x) for x in (self.k[:, :, :slots], self.v[..., :slots])]
        step = self._backend.step(ids, self.filled, *past)
        end = self.filled + count
        self.k[:, :, self.filled : end] = step.k[:, :, :count]
        self.v[..., self.filled : end] = step.v[..., :count]
        self.filled = end
        return step


def check_room(tokens: int, filled: int, context: int) -> None:
    """Raises UserError for no tokens, or more than a context has room for after the filled ones."""
    if not 0 < tokens <= context - filled:
        raise UserError(
            f"prompt: {tokens} tokens after {filled}; expected 1 to {context - filled} more, in a"
            f" context of {context}; shorten it, or choose a larger --context"
        )
