"""Generated text: token ids drawn from a session one by one, and decoded as they come."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qnpu_jax.models import Tokenizer
from qnpu_jax.runtime.sampling import Sampling, sample
from qnpu_jax.runtime.session import Session

REPLACEMENT = "\ufffd"
"""Character that decoders put in place of an incomplete one."""


@dataclass
class Speed:
    """Time that a generation took.

    Attributes:
      prompt: tokens of the prompt, and seconds until the first token was drawn.
      steps: seconds of each further token.

    Example:
      >>> print(Speed((64, 0.5), [0.05, 0.05]))
      prompt: 64 tokens, 128.0 tokens/s; then 2 tokens, 20.0 tokens/s
    """

    prompt: tuple[int, float] = (0, 0.0)
    steps: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        tokens, seconds = self.prompt
        text = f"prompt: {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s"
        if self.steps:
            text += f"; then {len(self.steps)} tokens, {1 / np.median(self.steps):.1f} tokens/s"
        return text


def prompt_ids(
    tokenizer: Tokenizer, prompt: str | Sequence[Mapping[str, str]], *, bos: bool
) -> list[int]:
    """Encodes a prompt, with BOS at its beginning by the model's own rule (`Tokenizer.adds_bos`).

    Args:
      prompt: a text to go on with, or a chat to answer, as `Tokenizer.chat` takes it. BOS is never
        there twice where the chat template prints it too.
      bos: False for a model with a prefix, which stands for BOS.

    Raises:
      UserError: as `Tokenizer.encode` and `Tokenizer.chat`.
    """
    text = isinstance(prompt, str)
    ids = tokenizer.encode(prompt) if text else tokenizer.chat(prompt, bos=bos)
    if not tokenizer.adds_bos or tokenizer.bos_id is None:
        return ids
    rest = ids[1:] if ids[:1] == [tokenizer.bos_id] else ids
    return [tokenizer.bos_id, *rest] if bos else rest


def generate_ids(
    session: Session,
    ids: Sequence[int],
    sampling: Sampling,
    limit: int,
    stops: Collection[int],
    speed: Speed | None = None,
) -> Iterator[int]:
    """Yields the token ids that follow a prompt.

    Ends before one of `stops`, after `limit` ids, or where the context is full.

    Args:
      ids: the prompt, at least one token.
      sampling: how a token is drawn; its seed decides all draws.
      limit: largest number of ids.
      stops: ids that end the text, and are not yielded.
      speed: object that takes down how long the prompt and each token took.

    Raises:
      UserError: the prompt does not fit the context.
    """
    speed = Speed() if speed is None else speed
    rng = np.random.default_rng(sampling.seed)
    began = time.perf_counter()
    codes = session.feed(ids)
    for count in range(limit):
        token = sample(codes, session.logit_scale, sampling, rng)
        now = time.perf_counter()
        if count:
            speed.steps.append(now - began)
        else:
            speed.prompt = (len(ids), now - began)
        began = now
        if token in stops:
            return
        yield token
        if count + 1 == limit or not session.room:
            return
        codes = session.feed([token])


def text_pieces(
    ids: Iterator[int], tokenizer: Tokenizer, before: Sequence[int] = ()
) -> Iterator[str]:
    """Yields the text of token ids in pieces, as it grows.

    A piece is held back while its last character lacks bytes, which later tokens bring.

    Args:
      before: ids of the text that goes on, which is not yielded. Tokenizers of SentencePiece leave
        out the space that a text begins with; in one that goes on it belongs there.
    """
    seen = list(before)
    shown = tokenizer.decode(seen) if seen else ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith(REPLACEMENT):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(seen)[len(shown) :] if len(seen) > len(before) else ""
    if rest:
        yield rest
