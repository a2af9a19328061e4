"""Prompts that a model begins its own text with: chats, plain text by domain, free text."""

from __future__ import annotations

from itertools import cycle
from typing import NamedTuple

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_jax.models import FIXED_DATE, Tokenizer
from qnpu_jax.text.dialogues import Messages, chats
from qnpu_jax.text.openers import plain

CHAT, FREE = "chat", "free"
"""The domain of single questions, and that of free text."""
MOST_TOKENS = 0.75
"""Of a character, at most, in a script that a model knows. Of the prompts in other scripts than
ASCII SmolLM2-135M needs .7 to 2.3 (Korean, Japanese, Hindi: above 1), Qwen2.5-Coder-0.5B .4 to 1
(Hindi, Greek, Bengali: above .8), Gemma 3 270M .4 to .73."""


class Prompt(NamedTuple):
    """The beginning of a document.

    Attributes:
      domain: kind of text: FREE, or one of `dialogues.chats` or `openers.plain`.
      ids: token ids, with BOS where the model's texts begin with it.
      messages: of a chat, up to the answer that is asked for; none of the others.
    """

    domain: str
    ids: list[int]
    messages: Messages = ()


def prompts_of(tokenizer: Tokenizer, count: int, seed: int) -> list[Prompt]:
    """Makes prompts, the kinds in turn.

    A third are chats of several kinds, on FIXED_DATE where the template prints the date; a third
    plain text of several domains. The rest are free: BOS, or a random token where texts do not
    begin with BOS by the model's own rule. Kinds of chats that the template refuses, or prints only
    in part, are left out, and prompts in scripts that the tokenizer spells out byte by byte:
    the model has seen little of them, and would write nonsense. Without any chat, plain text takes
    the chats' place.

    Args:
      seed: of the random tokens.
    """
    opening = np.random.default_rng(seed).integers(tokenizer.vocab_size, size=count)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    prompts = [Prompt(FREE, [int(i)] if bos is None else [bos]) for i in opening]
    first = [] if bos is None else [bos]
    known = ((domain, text) for domain, text in plain() if _knows(tokenizer, text))
    opened = [Prompt(domain, first + tokenizer.encode(text)) for domain, text in known]
    texts = cycle([p for p in opened if p.ids] or prompts)
    answered = cycle(found) if (found := _chats(tokenizer)) else texts
    for i in range(count):
        if i % 3:
            prompts[i] = next(answered if i % 3 == 1 else texts)
    return prompts


def _chats(tokenizer: Tokenizer) -> list[Prompt]:
    """Chats of the kinds that the model's template takes, in turn."""
    if tokenizer.chat_template is None:
        return []
    kinds = [chat for chat in chats() if all(_knows(tokenizer, text) for _, text in chat[1])]
    first = dict(reversed(kinds))
    taken = {domain for domain, messages in first.items() if _takes(tokenizer, messages)}
    asked = [(domain, x, _rendered(tokenizer, x)) for domain, x in kinds if domain in taken]
    return [Prompt(domain, ids, messages) for domain, messages, ids in asked if ids]


def _knows(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text is ASCII, or takes few tokens: MOST_TOKENS a character."""
    return text.isascii() or len(tokenizer.encode(text)) <= MOST_TOKENS * len(text)


def _takes(tokenizer: Tokenizer, messages: Messages) -> bool:
    """Whether a template takes a chat and its answer, and prints each of the messages."""
    ids = _rendered(tokenizer, messages)
    answered = _rendered(tokenizer, (*messages, ("assistant", "Yes.")), answer_next=False)
    if not ids or answered is None:
        return False
    parts = (messages[:i] + messages[i + 1 :] for i in range(len(messages)))
    return all(_rendered(tokenizer, part) != ids for part in parts if part)


def _rendered(
    tokenizer: Tokenizer, messages: Messages, answer_next: bool = True
) -> list[int] | None:
    """Token ids of a chat; None where the template refuses it."""
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.chat(chat, now=FIXED_DATE, answer_next=answer_next)
    except UserError:  # a template for other roles, or for contents that are no text
        return None
