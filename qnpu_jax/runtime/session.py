"""Conversation with an exported model. The host keeps the KV cache and feeds the signatures
`prefill_<N>` and `decode` of `cached.build_cached`.

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
    """Outputs of a signature for T new tokens, as integer codes.

    Attributes:
      logits: (T, V) or (1, V), int8 or int16.
      k: keys of the new tokens in every layer, (L, N, T, K).
      v: values of the new tokens in every layer, (L, N, K, T).
    """

    logits: Integer[np.ndarray, "r v"]
    k: Int8[np.ndarray, "l n t k"]
    v: Int8[np.ndarray, "l n k t"]


@dataclass(frozen=True)
class Shape:
    """Sizes of an exported model.

    Attributes:
      prefill: tokens of the long signature.
      context: largest number of positions after the prefix.
      layers, heads, width: sizes L, N and K of the cache, whose keys are (L, N, C, K) and values
        (L, N, K, C).
    """

    prefill: int
    context: int
    layers: int
    heads: int
    width: int


@runtime_checkable
class Backend(Protocol):
    """Engine that runs one signature at a time: LiteRT or the simulator."""

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        ...

    @property
    def logit_scale(self) -> float:
        """Real value of one code of the logits. Their zero point changes no probability."""
        ...

    def step(
        self,
        ids: Integer[np.ndarray, " t"],
        filled: int,
        k: Int8[np.ndarray, "l n c k"],
        v: Int8[np.ndarray, "l n k c"],
    ) -> Step:
        """Runs T tokens, T = 1 or `shape.prefill`.

        Args:
          filled: tokens that the cache holds.
          k, v: first context - T slots of the cache, of which the first `filled` are read.
        """
        ...


class Session:
    """KV cache of one conversation, filled token by token.

    Attributes:
      k, v: keys (L, N, C, K) and values (L, N, K, C), int8 codes.
      filled: slots that are filled.

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
        """Number of tokens that still fit."""
        return self._backend.shape.context - self.filled

    def feed(self, ids: Sequence[int]) -> Integer[np.ndarray, " v"]:
        """Feeds tokens, all of which enter the cache, and returns the logits after the last.

        All but the last go through the long signature in chunks, as long as the context has room
        for a chunk. A chunk that is not full is padded with tokens that no other token sees. The
        rest is fed one by one.

        Returns:
          Codes (V,), int8 or int16.

        Raises:
          UserError: no tokens, or more than there is room for; the cache is unchanged then.
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
        """Runs one signature, and puts keys and values of the first `count` tokens in the cache.

        `feed` is for general use; this is for callers who look at single steps.

        Args:
          ids: one token, or as many as the long signature takes.
          count: tokens of `ids` that are no padding.
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
    """Raises UserError for no tokens, or for more than fit a context after the filled slots."""
    if not 0 < tokens <= context - filled:
        raise UserError(
            f"prompt: {tokens} tokens after {filled}; expected 1 to {context - filled} more, in a"
            f" context of {context}; shorten it, or choose a larger --context"
        )
