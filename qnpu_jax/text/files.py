"""Text files read and tokenized, to calibrate with and to measure on.

Every fault of a file is reported when it is read, before any model runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.models import FIXED_DATE, Tokenizer, sha256

JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files with one JSON value per line; every other file is plain text."""

Document = str | list[dict[str, str]]
"""A plain text, or the messages of a chat."""

SEPARATOR = "\n\n"
"""Joins documents: a blank line, as published perplexities of WikiText-2 have it."""


def read_text(path: str | Path) -> list[Document]:
    """Reads the documents of a UTF-8 file.

    A plain text is one document. A file of JSON lines (see `JSON_LINES`) holds one document a line:
    an object with the document in "text" or a chat in "messages", or the document itself as a
    string. Other keys, blank lines and a byte order mark are ignored.

    Raises:
      UserError: no such file, a folder, not readable, not UTF-8, no text in it, or a line that is
        none of these.
    """
    path = Path(path)
    try:
        with _reading(path):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8 (0x{error.object[error.start]:02x}); expected"
            " plain text or JSON lines in UTF-8; convert it, for example with iconv"
        ) from None
    documents: list[Document] = [text]
    documents = _documents(path, text) if path.suffix.lower() in JSON_LINES else documents
    if not any(d if isinstance(d, list) else d.strip() for d in documents):
        raise UserError(f"{path}: no text in it; expected at least one document; give another file")
    return documents


def default_text() -> str:
    """Joins the help topics that every Python ships: half a megabyte of English with some Python.

    The text is the same at every call. Another version of Python has slightly other topics.
    """
    return SEPARATOR.join(topics[name] for name in sorted(topics))


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, vocab_size: int, source: str
) -> list[int]:
    """Encodes documents as one text; no BOS or EOS is added.

    Plain texts that follow each other are joined by `SEPARATOR`. Chats take the model's template,
    their last answer as its turns end.

    Args:
      vocab_size: the model's.
      source: the file or the name of the text, for messages.

    Returns:
      Token ids, 0 to `vocab_size` - 1.

    Raises:
      UserError: the tokenizer gives a token that the model does not have, or no template takes the
        chats.
    """
    ids: list[int] = []
    for kind, some in groupby(documents, key=type):
        if kind is str:
            ids += tokenizer.encode(SEPARATOR.join(map(str, some)))
        else:
            for chat in some:
                ids += _chat_ids(chat, tokenizer, source)
    # Indexing inside jit would silently take the last row of the embedding table.
    if (largest := max(ids, default=0)) >= vocab_size:
        raise UserError(
            f"{source}: token {largest} ({tokenizer.decode([largest])!r}) is outside the model's"
            f" vocabulary of {vocab_size}; expected 0 to {vocab_size - 1}; take model and tokenizer"
            " of the same checkpoint"
        )
    return ids


def _chat_ids(chat: Any, tokenizer: Tokenizer, source: str) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{source}: holds chats, and {tokenizer.source} has no chat template; expected plain"
            ' text, or lines with "text"; give such, or take an instruct model'
        )
    try:
        return tokenizer.chat(chat, bos=False, now=FIXED_DATE, answer_next=False)
    except UserError as error:
        first = chat[0]["content"][:30]
        raise UserError(f"{source}: chat that begins {first!r}: {error}") from None


def digest(path: str | Path) -> str:
    """Hashes an input file: SHA-256 in hexadecimal, as `sha256sum` prints it.

    Raises:
      UserError: no such file, a folder, or not readable.
    """
    path = Path(path)
    with _reading(path):
        return sha256([path])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns an error of the system while `path` is read into a UserError."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; expected a file of text; name a file in it")
        yield
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected plain text, or JSON lines (*.jsonl); check the path"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); expected a readable file; check"
            " path, permissions and disk"
        ) from None


def _documents(path: Path, text: str) -> list[Document]:
    # Not splitlines, which also splits at U+2028: that may stand in a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    return [_document(f"{path}: line {i}", line) for i, line in lines if line.strip()]


def _document(where: str, line: str) -> Document:
    expected = 'expected an object with a string "text" or a list "messages", or a string'
    try:
        value = artifacts.parse_json(line)
    except ValueError as error:
        raise UserError(
            f"{where}: not valid JSON ({error}); {expected}, one per line; correct the line, or"
            " name a plain text *.txt"
        ) from None
    if isinstance(value, dict) and value.get("messages") is not None:
        return [_message(f"{where}: messages", m) for m in _listed(where, value["messages"])]
    document = value.get("text") if isinstance(value, dict) else value
    if not isinstance(document, str):
        got = type(document).__name__
        if isinstance(value, dict):
            got = f'"text" of type {got}' if "text" in value else f"the keys {sorted(value)}"
        raise UserError(f"{where}: {expected}; got {got}; correct or remove the line")
    return _checked(where, document)


def _shown(value: Any) -> str:
    """The beginning of a JSON value."""
    try:
        return artifacts.layout(value)[:60]
    except RecursionError:
        return f"{type(value).__name__} of too many levels"


def _listed(where: str, messages: Any) -> list[Any]:
    if isinstance(messages, list) and messages:
        return messages
    raise UserError(
        f'{where}: "messages" must be a list of at least one message; got'
        f" {_shown(messages)}; correct or remove the line"
    )


def _message(where: str, message: Any) -> dict[str, str]:
    named = ("role", "content")
    if not isinstance(message, dict) or any(not isinstance(message.get(k), str) for k in named):
        raise UserError(
            f'{where}: expected objects with strings "role" and "content"; got'
            f" {_shown(message)}; correct or remove the line"
        )
    return {k: _checked(where, message[k]) for k in named}


def _checked(where: str, text: str) -> str:
    """The text, which JSON may have given half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON
        raise UserError(
            f"{where}: character {error.start} of its text is half a surrogate pair"
            f" ({text[error.start]!a}); expected Unicode text; correct or remove the line"
        ) from None
    return text
