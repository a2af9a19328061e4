"""The texts of a run, in windows of token ids: calibrated with, learned from, judged by, scored on.

A file gives calibration and learning text from its start; without one, the model writes both at
once. Python's documentation gives the rest: its head is scored, its tail decides which step of
learning is kept, so the two never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params
from qnpu_jax.models import Checkpoint, Tokenizer
from qnpu_jax.recipes import Effort, Recipe
from qnpu_jax.text import files, self_written
from qnpu_jax.text.windows import Windows, cut

DOCUMENTATION = "pydoc_data.topics"
OWN_TOKENS = 65_536
"""The model writes at most so many tokens to learn from: on a CPU that is minutes of work."""


@dataclass(frozen=True)
class Excerpt:
    """Windows (N, T) of token ids, and where they are from: a name and a hash of the source."""

    source: str
    sha256: str
    windows: Int[np.ndarray, "n t"]

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.sha256, "tokens": self.windows.size}

    def digest(self) -> str:
        """SHA-256 of the windows and their shape."""
        header = f"{self.windows.dtype} {self.windows.shape}\n".encode()
        return hashlib.sha256(header + np.ascontiguousarray(self.windows).tobytes()).hexdigest()


@dataclass(frozen=True)
class Texts:
    """All text of a run.

    Attributes:
      scored: what perplexity is measured on.
      calibration: what ranges are set by.
      learning: what is learned from, None where nothing is learned.
      held_out: whose KL decides which step of learning is kept.
    """

    scored: Excerpt
    calibration: Excerpt
    learning: Excerpt | None = None
    held_out: Excerpt | None = None

    def windows(self) -> Windows:
        return windows_of(self.calibration, self.learning, self.held_out)

    def to_json(self) -> dict[str, dict[str, Any]]:
        named = {
            "calibration": self.calibration,
            "learning": self.learning,
            "early_stopping": self.held_out,
            "held_out": self.scored,
        }
        return {name: excerpt.to_json() for name, excerpt in named.items() if excerpt}

    def digests(self) -> dict[str, str]:
        """SHA-256 of the windows of everything that decides what is learned."""
        assert self.learning is not None and self.held_out is not None
        return {
            "calibration": self.calibration.digest(),
            "learning": self.learning.digest(),
            "held_out": self.held_out.digest(),
        }


def windows_of(calibration: Excerpt, learning: Excerpt | None, held_out: Excerpt | None) -> Windows:
    """The windows of a run that learns, or calibrates only where there is nothing to learn from."""
    if learning is None or held_out is None:
        return Windows.of(calibration.windows)
    return Windows(calibration.windows, learning.windows, held_out.windows)


@dataclass(frozen=True)
class Tokens:
    """A whole text as token ids.

    Attributes:
      where: its path or name, for messages.
    """

    where: str
    source: str
    sha256: str
    ids: list[int]

    def first(self, length: int, tokens: int) -> Excerpt:
        """Windows from the start, one at least.

        Raises:
          UserError: the text is too short for one.
        """
        count = max(1, tokens // length)
        return self._excerpt(cut(self.ids, length, count, self.where))

    def last(self, length: int, count: int) -> Excerpt:
        """Windows that end where the text ends.

        Raises:
          UserError: the text is too short for one.
        """
        count = max(1, min(count, len(self.ids) // length))
        return self._excerpt(cut(self.ids[-length * count :], length, count, self.where))

    def _excerpt(self, windows: np.ndarray) -> Excerpt:
        return Excerpt(self.source, self.sha256, windows)


def tokenized(
    given: str | Path | Sequence[str] | None, tokenizer: Tokenizer, vocab_size: int
) -> Tokens:
    """A file or documents, by default Python's documentation.

    Raises:
      UserError: as `files.read_text` and `files.tokenize`.
    """
    if isinstance(given, str | Path):
        where, source = str(given), Path(given).name
        texts, sha256 = files.read_text(given), files.digest(given)
    else:
        where = source = DOCUMENTATION if given is None else "text"
        texts = [files.default_text()] if given is None else list(given)
        sha256 = hashlib.sha256(files.SEPARATOR.join(texts).encode()).hexdigest()
    return Tokens(where, source, sha256, files.tokenize(texts, tokenizer, vocab_size, where))


def scored_and_judged(
    eval_text: str | Path | None,
    checkpoint: Checkpoint,
    length: int,
    tokens: int,
    effort: Effort | None,
) -> tuple[Excerpt, Excerpt | None]:
    """What perplexity is measured on, and what decides which step of learning is kept.

    Args:
      length, tokens: of a scored window, and of all.
      effort: None where nothing is learned.

    Raises:
      UserError: a text is too short, or the two overlap.
    """
    read = [checkpoint.tokenizer, checkpoint.config.vocab_size]
    scored_text = tokenized(eval_text, *read)
    scored = scored_text.first(length, tokens)
    if effort is None:
        return scored, None
    text = scored_text if eval_text is None else tokenized(None, *read)
    held_out = text.last(effort.length, effort.held_out)
    free = len(text.ids) - held_out.windows.size
    if eval_text is None and scored.windows.size > free:
        raise UserError(
            f"eval-tokens: {scored.windows.size:,} tokens of {text.where} reach into its end, by"
            f" which learning is judged; expected at most {free:,}; lower --eval-tokens, or give"
            " --eval-text"
        )
    return scored, held_out


def judged(checkpoint: Checkpoint, effort: Effort) -> Excerpt:
    """What decides which step of learning is kept: the end of Python's documentation."""
    text = tokenized(None, checkpoint.tokenizer, checkpoint.config.vocab_size)
    return text.last(effort.length, effort.held_out)


def given(
    source: str | Path | Sequence[str] | Int[np.ndarray, "n t"],
    checkpoint: Checkpoint,
    recipe: Recipe,
    effort: Effort | None,
) -> tuple[Excerpt, Excerpt | None]:
    """Calibration and learning text from the start of what the caller gives.

    Args:
      source: a file; documents; or windows of token ids, which are calibrated with as they are,
        up to the recipe's number of tokens, and learned from as one text.
      effort: None where nothing is learned.

    Raises:
      UserError: too short for a window, or not text.
    """
    if isinstance(source, np.ndarray):
        found = Excerpt("windows", hashlib.sha256(source.tobytes()).hexdigest(), source)
        text = Tokens("text", found.source, found.sha256, source.reshape(-1).tolist())
        count = max(1, recipe.calibration_tokens // source.shape[1])
        calibration = replace(found, windows=source[:count])
        return calibration, text.first(effort.length, effort.tokens) if effort else None
    text = tokenized(source, checkpoint.tokenizer, checkpoint.config.vocab_size)
    calibration = text.first(recipe.calibration_length, recipe.calibration_tokens)
    return calibration, text.first(effort.length, effort.tokens) if effort else None


def written(
    checkpoint: Checkpoint,
    params: Params,
    recipe: Recipe,
    effort: Effort | None,
    progress: self_written.Progress,
) -> tuple[Excerpt, Excerpt | None]:
    """Calibration and learning text by the model itself, the same tokens in windows of each length.

    Args:
      params: folded parameters.
      effort: None where nothing is learned.
    """
    length = recipe.calibration_length
    count = max(1, recipe.calibration_tokens // length)
    tokens, rows = count * length, length
    if effort:
        tokens, rows = max(tokens, min(effort.tokens, OWN_TOKENS)), effort.length
    writer = self_written.Writer(checkpoint.config, recipe.bits, params)
    windows = self_written.calibration_windows(
        writer, checkpoint.tokenizer, tokens, rows, recipe.seed, progress
    )
    sha256 = hashlib.sha256(windows.tobytes()).hexdigest()
    # Cut anew: like those of a file, windows may then begin within a document.
    anew = windows.reshape(-1)[: count * length].reshape(count, length)
    calibration = Excerpt("written by the model", sha256, anew)
    if effort is None:
        return calibration, None
    return calibration, replace(calibration, windows=windows[: max(1, effort.tokens // rows)])
