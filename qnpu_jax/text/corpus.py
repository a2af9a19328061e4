"""Documents of the text that a model writes itself, to look at, to edit and to learn from.

`self_written.sample` gives rows of tokens in which documents follow each other. Here they are cut
apart again; what repeats another, or itself, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from qnpu_jax.models import Tokenizer
from qnpu_jax.text.prompts import Prompt

GRAM = 4
"""Tokens of the pieces whose repetition is counted."""
LEAST_DISTINCT = 0.5
"""Least part of a document's pieces that are different ones: less is a loop. Means of the domains
lie at .76 to 1.00 where SmolLM2-135M writes 4,096 tokens."""


class Written(NamedTuple):
    """A document as it was written.

    Attributes:
      prompt: what it began with.
      ids: its tokens, without BOS and the one that ended it.
      answer: those that the model drew.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    answer: tuple[int, ...]


def split(
    rows: Int32[np.ndarray, "b t"],
    prompts: Sequence[Prompt],
    stop: Collection[int],
    bos: int | None,
) -> Iterator[Written]:
    """Yields the documents of rows that `sample` wrote.

    Document j of row b began with prompt b + j, cyclically, and ends with the first token of `stop`
    behind its prompt, or where the row is full. What holds no drawn token is left out.

    Args:
      bos: as in `self_written.Drawing`: it stands before a document, and in no row.
    """
    ends = set(stop)
    for b, row in enumerate(rows.tolist()):
        start = document = 0
        while start < len(row):
            prompt = prompts[(b + document) % len(prompts)]
            drawn = start + len(prompt.ids) - (prompt.ids[0] == bos)
            found = (i for i in range(drawn, len(row)) if row[i] in ends)
            end = next(found, len(row))
            if end > drawn:
                yield Written(prompt, tuple(row[start:end]), tuple(row[drawn:end]))
            start, document = end + 1, document + 1


def distinct(ids: Sequence[int]) -> float:
    """Tells which part of the pieces of GRAM tokens are different ones; 1 for a shorter text.

    >>> distinct([1, 2] * 4), distinct([1, 2, 3, 4, 5])
    (0.4, 1.0)
    """
    pieces = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return len(set(pieces)) / len(pieces) if pieces else 1.0


@dataclass(frozen=True)
class Share:
    """What one domain has of a corpus.

    Attributes:
      documents, tokens: those that are kept.
      distinct: mean of `distinct` over them.
      loops, repeats: documents that are left out: they repeat themselves, or another one, or hold
        nothing that can be read.
    """

    documents: int
    tokens: int
    distinct: float
    loops: int
    repeats: int


@dataclass(frozen=True)
class Corpus:
    """Documents as the lines of a JSON-lines file, and what each domain has of them.

    Attributes:
      lines: {"domain": .., "text": ..}, or {"domain": .., "messages": [..]} of a chat: all of its
        messages, from a system prompt to the answer.
      shares: by domain.
      documents: those that are kept, as they were written, in the order of `lines`.
    """

    lines: list[dict[str, Any]]
    shares: dict[str, Share]
    documents: list[Written]


def corpus(written: Iterable[Written], tokenizer: Tokenizer) -> Corpus:
    """Keeps the documents that are worth learning from: no loops, none twice, none without text."""
    lines: list[dict[str, Any]] = []
    documents: list[Written] = []
    seen: set[tuple[int, ...]] = set()
    kept: dict[str, list[Written]] = {}
    loops: Counter[str] = Counter()
    repeats: Counter[str] = Counter()
    for document in written:
        domain, line = document.prompt.domain, _line(document, tokenizer)
        of_domain = kept.setdefault(domain, [])
        if distinct(document.answer) < LEAST_DISTINCT:
            loops[domain] += 1
        elif document.ids in seen or line is None:
            repeats[domain] += 1
        else:
            seen.add(document.ids)
            lines.append(line)
            documents.append(document)
            of_domain.append(document)
    shares = {
        domain: Share(
            documents=len(some),
            tokens=sum(len(document.ids) for document in some),
            distinct=fmean(distinct(d.answer) for d in some) if some else 0.0,
            loops=loops[domain],
            repeats=repeats[domain],
        )
        for domain, some in kept.items()
    }
    return Corpus(lines, shares, documents)


def _line(document: Written, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The document as a line of JSON; None where it cannot be read: no text, or a token that only
    the model's padded table has."""
    domain, _, messages = document.prompt
    if max(document.ids) >= tokenizer.vocab_size:
        return None
    if not messages:
        text = tokenizer.decode(document.ids, skip_special=True)
        return {"domain": domain, "text": text} if text.strip() else None
    answer = tokenizer.decode(document.answer, skip_special=True)
    if not answer.strip():
        return None
    turns = (*messages, ("assistant", answer))
    return {"domain": domain, "messages": [{"role": r, "content": c} for r, c in turns]}
