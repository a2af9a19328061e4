"""Files of zero-shot tasks: JSON lines, each an item with one right option.

The keys of a line, not the name of the file, say its kind:

- `query`, `choices`, `gold`: each choice is scored after the query; choice `gold` should be best.
- `context_options`, `continuation`, `gold`: the continuation is scored after each context; context
  `gold` should be best.
- `context`, `continuation`: greedy decoding should write the continuation (a last word).

**Spaces.** Contexts in these files end without a space and continuations begin without one. One
space joins them and belongs to the continuation: " word" is a token of its own in byte-level BPE,
and no text of training ends in a space there. A query that begins with "Question:" is completed
with "\nAnswer:", which the files leave to the reader (llm-foundry's `continuation_delimiter`); the
prompts of ARC and PIQA are then, word for word, those of lm-evaluation-harness.

Reference: llm-foundry, llmfoundry/eval/datasets/in_context_learning_evaluation.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError

ANSWER = "\nAnswer:"
"""Ends a query that begins with "Question:"."""

CHOICES = ("query", "choices", "gold")
CONTEXTS = ("context_options", "continuation", "gold")
LAST_WORD = ("context", "continuation")
KINDS = (CHOICES, CONTEXTS, LAST_WORD)
"""Keys of a line, by its kind."""


@dataclass(frozen=True)
class Item:
    """One line of a task.

    Attributes:
      pairs: context and continuation of every option; the continuation begins with its space.
      gold: index of the right option.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """A file of items of one kind.

    Attributes:
      name: name of the file without its suffix.
      source: the file, for messages.
      keys: kind of the items, one of `KINDS`.
    """

    name: str
    source: str
    keys: tuple[str, ...]
    items: tuple[Item, ...]


def read_folder(folder: str | Path, limit: int | None = None) -> list[Task]:
    """Reads the tasks of a folder's *.jsonl files, sorted by name.

    Args:
      limit: take the first so many items of each; None takes all.

    Raises:
      UserError: no such folder, no such file in it, or as `read`.
    """
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise UserError(
            f"{folder}: no *.jsonl in it; expected a folder of tasks, one JSON object per line;"
            " check the path"
        )
    return [read(path, limit) for path in paths]


def read(path: str | Path, limit: int | None = None) -> Task:
    """Reads a task.

    Args:
      limit: take the first so many items; None takes all. Every line is checked all the same.

    Raises:
      UserError: the file cannot be read, or a line is not of a kind above, or not of the first's.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected JSON lines in UTF-8; check the file"
        ) from None
    # Not splitlines, which also splits at U+2028: that may stand in a JSON string.
    lines = [(f"{path}: line {i}", s) for i, s in enumerate(text.split("\n"), 1) if s.strip()]
    parsed = [(where, *_parse(where, line)) for where, line in lines]
    if not parsed:
        raise UserError(f"{path}: no line in it; expected a task's items; give another file")
    kind = parsed[0][1]
    for where, keys, _ in parsed:
        if keys != kind:
            raise UserError(
                f"{where}: expected the keys of the lines before, {list(kind)}; got {list(keys)};"
                " put items of two kinds into two files"
            )
    return Task(path.stem, str(path), kind, tuple(item for _, _, item in parsed[:limit]))


def _parse(where: str, line: str) -> tuple[tuple[str, ...], Item]:
    """Reads a line: the keys that say its kind, and its item."""
    expected = "expected an object with the keys " + " or ".join(str(list(k)) for k in KINDS)
    try:
        value = artifacts.parse_json(line)
    except ValueError as error:
        raise UserError(
            f"{where}: not valid JSON ({error}); {expected}; correct the line"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: {expected}; got {type(value).__name__}; correct the line")
    match value:
        case {"query": query, "choices": choices, "gold": gold}:
            context = _text(where, "query", query)
            if context.startswith("Question:"):
                context += ANSWER
            options = _texts(where, "choices", choices)
            pairs = [(context, " " + option) for option in options]
            return CHOICES, Item(tuple(pairs), _gold(where, gold, len(pairs)))
        case {"context_options": contexts, "continuation": continuation, "gold": gold}:
            end = " " + _text(where, "continuation", continuation)
            pairs = [(option, end) for option in _texts(where, "context_options", contexts)]
            return CONTEXTS, Item(tuple(pairs), _gold(where, gold, len(pairs)))
        case {"context": context, "continuation": continuation}:
            end = " " + _text(where, "continuation", continuation)
            return LAST_WORD, Item(((_text(where, "context", context), end),), 0)
    raise UserError(f"{where}: {expected}; got {sorted(value)}; correct the line")


def _text(where: str, key: str, value: Any) -> str:
    """Checks a text and strips the white space around it: the space between two is put here."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f'{where}: "{key}": expected a text that is not blank; got {value!r}; correct the line'
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud800" is valid JSON
        raise UserError(
            f'{where}: "{key}": expected Unicode text; got half a surrogate pair in {value!a};'
            " correct the line"
        ) from None
    return value.strip()


def _texts(where: str, key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(
            f'{where}: "{key}": expected a list of two texts or more; got {value!r}; correct the'
            " line"
        )
    return [_text(where, key, text) for text in value]


def _gold(where: str, value: Any, options: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < options:
        raise UserError(
            f'{where}: "gold": expected the index of the right option, 0 to {options - 1}; got'
            f" {value!r}; correct the line"
        )
    return value
