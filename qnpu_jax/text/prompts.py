"""Prompts that a model begins its own text with: chats, plain text by domain, free text."""

from __future__ import annotations

from itertools import cycle
from typing import NamedTuple

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_jax.models import FIXED_DATE, Tokenizer
from qnpu_jax.text.openers import QUESTIONS, plain

CHAT, FREE = "chat", "free"
"""Domains beside those of `openers.plain`."""


class Prompt(NamedTuple):
    """The beginning of a document.

    Attributes:
      domain: kind of text: CHAT, FREE, or one of `openers.plain`.
      ids: token ids, with BOS where the model's texts begin with it.
      question: first message of a chat; None for the others.
    """

    domain: str
    ids: list[int]
    question: str | None = None


def prompts_of(tokenizer: Tokenizer, count: int, seed: int) -> list[Prompt]:
    """Makes prompts, the kinds in turn.

    A third are chats with one of QUESTIONS, on FIXED_DATE where the template prints the date; a
    third plain text of several domains. The rest are free: BOS, or a random token where texts do
    not begin with BOS by the model's own rule. Without a chat template, or with one that refuses
    plain questions, plain text takes the chats' place.

    Args:
      seed: of the random tokens.
    """
    opening = np.random.default_rng(seed).integers(tokenizer.vocab_size, size=count)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    prompts = [Prompt(FREE, [int(i)] if bos is None else [bos]) for i in opening]
    first = [] if bos is None else [bos]
    opened = [Prompt(domain, first + tokenizer.encode(text)) for domain, text in plain()]
    texts = cycle([p for p in opened if p.ids] or prompts)
    chats = cycle(found) if (found := _chats(tokenizer)) else texts
    for i in range(count):
        if i % 3:
            prompts[i] = next(chats if i % 3 == 1 else texts)
    return prompts


def _chats(tokenizer: Tokenizer) -> list[Prompt]:
    """Chats of QUESTIONS; none without a chat template that takes them."""
    if tokenizer.chat_template is None:
        return []
    try:
        asked = [
            Prompt(CHAT, tokenizer.chat([{"role": "user", "content": q}], now=FIXED_DATE), q)
            for q in QUESTIONS
        ]
        whole = [("user", QUESTIONS[0]), ("assistant", "Paris.")]
        answered = [{"role": role, "content": content} for role, content in whole]
        tokenizer.chat(answered, now=FIXED_DATE, answer_next=False)
    except UserError:  # a template for other roles, or for contents that are no text
        return []
    return [chat for chat in asked if chat.ids]  # a template may leave questions out
