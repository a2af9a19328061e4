"""Excerpts: the windows of token ids that a run uses, each with the text that it was cut from.

A run takes up to six excerpts. Calibration and learning take theirs from the start of the given
text; without one, the model writes the text for both. The end of that text is learned by nobody: it
decides, with the documentation below, which step of learning is kept. The others come from Python's
own documentation: perplexity is measured on its beginning, and its end judges prefixes and steps of
learning. Beginning and end must not overlap, or the model would be chosen by what is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params
from qnpu_jax.models import Checkpoint, Tokenizer
from qnpu_jax.recipes import Effort, Recipe
from qnpu_jax.text import files, self_written
from qnpu_jax.text.windows import Windows, cut

DOCUMENTATION = "pydoc_data.topics"
OTHER_LENGTH, OTHER_COUNT = 128, 8
"""Tokens of a window, and windows, of the text that judges prefixes beside the calibration text."""
END = 8
"""The end of a text that is learned from is an eighth of it at most."""


@dataclass(frozen=True)
class Excerpt:
    """Windows of token ids, and the text that they were cut from.

    Attributes:
      source: name of the text, for reports.
      sha256: hash of the whole text, not only of the windows.
      windows: token ids (N, T).
      pool: more windows of the text, these first, as `Windows.pool`; None where these serve.
    """

    source: str
    sha256: str
    windows: Int[np.ndarray, "n t"]
    pool: Int[np.ndarray, "m t"] | None = None

    def to_json(self) -> dict[str, Any]:
        pool = {} if self.pool is None else {"pool": self.pool.size}
        return {"source": self.source, "sha256": self.sha256, "tokens": self.windows.size, **pool}

    def digest(self) -> str:
        """SHA-256 of the windows, and the pool's, and their shapes."""
        made = hashlib.sha256()
        for windows in (self.windows,) if self.pool is None else (self.windows, self.pool):
            made.update(f"{windows.dtype} {windows.shape}\n".encode())
            made.update(np.ascontiguousarray(windows).tobytes())
        return made.hexdigest()


class Judges(NamedTuple):
    """Excerpts of the end of Python's documentation.

    Attributes:
      held_out: its KL decides which step of learning is kept; None where nothing is learned.
      other: prefixes are judged on it, beside the calibration text, which is of another domain.
    """

    held_out: Excerpt | None
    other: Excerpt


@dataclass(frozen=True)
class Texts:
    """All excerpts of a run.

    Attributes:
      scored: perplexity is measured on it.
      calibration: sets ranges, and rounds weights with the rest of its pool.
      learning: is learned from; None where nothing is learned.
      end: as in `Material`.
      judges: what prefixes and steps of learning are judged on.
    """

    scored: Excerpt
    calibration: Excerpt
    learning: Excerpt | None
    end: Excerpt | None
    judges: Judges

    def windows(self) -> Windows:
        """The windows that `pipeline.quantize` takes."""
        return windows_of(self.calibration, self.learning, self.end, self.judges)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Entries of report.json and recipe.json, by use."""
        named = {
            "calibration": self.calibration,
            "learning": self.learning,
            "early_stopping": self.judges.held_out,
            "learning_end": self.end,
            "prefix": self.judges.other,
            "held_out": self.scored,
        }
        return {name: excerpt.to_json() for name, excerpt in named.items() if excerpt}

    def digests(self) -> dict[str, str]:
        """SHA-256 of the windows of each excerpt that decides what is learned, by use."""
        assert self.learning is not None and self.judges.held_out is not None
        named = {
            "calibration": self.calibration,
            "learning": self.learning,
            "end": self.end,
            "held_out": self.judges.held_out,
            "other": self.judges.other,
        }
        return {name: excerpt.digest() for name, excerpt in named.items() if excerpt}


class Material(NamedTuple):
    """Excerpts of the text that a model is calibrated with and learns from.

    Attributes:
      calibration: sets ranges, and rounds weights with the rest of its pool.
      learning: None where nothing is learned.
      end: windows of its end that are not learned from, and judge steps of learning beside
        `Judges.held_out`; None where nothing is learned, or the text is too short for some.
    """

    calibration: Excerpt
    learning: Excerpt | None
    end: Excerpt | None


def windows_of(
    calibration: Excerpt, learning: Excerpt | None, end: Excerpt | None, judges: Judges
) -> Windows:
    """Joins the windows of a run; those of a run that does not learn only calibrate."""
    other = judges.other.windows
    made = Windows.of(calibration.windows, other)
    if learning is not None and judges.held_out is not None:
        held_out = {DOCUMENTATION: judges.held_out.windows}
        held_out |= {f"end of {end.source}": end.windows} if end else {}
        made = Windows.learned(calibration.windows, learning.windows, held_out, other)
    return made if calibration.pool is None else replace(made, pool=calibration.pool)


@dataclass(frozen=True)
class Tokens:
    """A whole text as token ids.

    Attributes:
      where: path or name of the text, for messages.
      source: name of the text, for reports.
      sha256: hash of the text.
      ids: token ids, without BOS.
    """

    where: str
    source: str
    sha256: str
    ids: list[int]

    def first(self, length: int, tokens: int) -> Excerpt:
        """Cuts windows from the start of the text.

        Args:
          length: tokens of a window.
          tokens: tokens in all, rounded down to whole windows, but one window at least.

        Raises:
          UserError: the text is too short for one window.
        """
        count = max(1, tokens // length)
        return self._excerpt(cut(self.ids, length, count, self.where))

    def last(self, length: int, count: int) -> Excerpt:
        """Cuts windows that end where the text ends.

        Args:
          length: tokens of a window.
          count: at most this many windows.

        Raises:
          UserError: the text is too short for one window.
        """
        count = max(1, min(count, len(self.ids) // length))
        return self._excerpt(cut(self.ids[-length * count :], length, count, self.where))

    def _excerpt(self, windows: np.ndarray) -> Excerpt:
        return Excerpt(self.source, self.sha256, windows)


def tokenized(
    given: str | Path | Sequence[str] | None, tokenizer: Tokenizer, vocab_size: int
) -> Tokens:
    """Tokenizes a text.

    Args:
      given: path of a file, or documents; None takes Python's documentation.
      vocab_size: the model's.

    Raises:
      UserError: as `files.read_text` and `files.tokenize`.
    """
    if isinstance(given, str | Path):
        where, source = str(given), Path(given).name
        documents, sha256 = files.read_text(given), files.digest(given)
    else:
        where = source = DOCUMENTATION if given is None else "text"
        texts = [files.default_text()] if given is None else list(given)
        documents = [*texts]
        sha256 = hashlib.sha256(files.SEPARATOR.join(texts).encode()).hexdigest()
    return Tokens(where, source, sha256, files.tokenize(documents, tokenizer, vocab_size, where))


def scored_and_judged(
    eval_text: str | Path | None,
    checkpoint: Checkpoint,
    length: int,
    tokens: int,
    effort: Effort | None,
) -> tuple[Excerpt, Judges]:
    """Cuts the excerpt that is scored, and those that judge.

    Args:
      eval_text: file to score on; None takes Python's documentation.
      length: tokens of a scored window.
      tokens: tokens to score in all.
      effort: None where nothing is learned.

    Raises:
      UserError: a text is too short, or the excerpts overlap.
    """
    read = [checkpoint.tokenizer, checkpoint.config.vocab_size]
    scored_text = tokenized(eval_text, *read)
    scored = scored_text.first(length, tokens)
    text = scored_text if eval_text is None else tokenized(None, *read)
    judges = _judges(text, effort)
    sizes = [excerpt.windows.size for excerpt in judges if excerpt is not None]
    free = len(text.ids) - max(sizes)
    if eval_text is None and scored.windows.size > free:
        raise UserError(
            f"eval-tokens: {scored.windows.size:,} tokens of {text.where} reach into its end, by"
            f" which prefix and learning are judged; expected at most {free:,};"
            " lower --eval-tokens, or give --eval-text"
        )
    return scored, judges


def judged(checkpoint: Checkpoint, effort: Effort | None) -> Judges:
    """Cuts the excerpts that judge from Python's documentation.

    Args:
      effort: None where nothing is learned.

    Raises:
      UserError: the documentation is too short for one window.
    """
    return _judges(tokenized(None, checkpoint.tokenizer, checkpoint.config.vocab_size), effort)


def _judges(text: Tokens, effort: Effort | None) -> Judges:
    held_out = text.last(effort.length, effort.held_out) if effort else None
    length = min(OTHER_LENGTH, len(text.ids))
    return Judges(held_out, text.last(length, OTHER_COUNT))


def given(
    source: str | Path | Sequence[str] | Int[np.ndarray, "n t"],
    checkpoint: Checkpoint,
    recipe: Recipe,
    effort: Effort | None,
) -> Material:
    """Cuts calibration and learning text from the start of what the caller gives.

    Args:
      source: path of a file; documents; or windows (N, T) of token ids. Calibration takes windows
        of ids as they are, up to the recipe's number of tokens; learning cuts them anew.
      effort: None where nothing is learned.

    Raises:
      UserError: too short for a window, or not text.
    """
    length = recipe.calibration_length
    if isinstance(source, np.ndarray):
        length, sha256 = source.shape[1], hashlib.sha256(source.tobytes()).hexdigest()
        text = Tokens("windows", "windows", sha256, source.reshape(-1).tolist())
    else:
        text = tokenized(source, checkpoint.tokenizer, checkpoint.config.vocab_size)
    return _material(text, length, recipe, effort)


def end_windows(tokens: int, length: int, effort: Effort) -> int:
    """Returns how many windows of `effort.length` tokens are the end of a text, which is held out:
    an eighth of them at most, and none that would leave no window to calibrate with.

    >>> effort = Effort("a", 1, length=10, held_out=4)
    >>> [end_windows(tokens, 150, effort) for tokens in (1000, 200, 165)]
    [4, 2, 1]

    Args:
      tokens: of the whole text.
      length: tokens of a window of calibration.
    """
    left = max(0, tokens - length) // effort.length
    return min(effort.held_out, tokens // effort.length // END, left)


def _material(text: Tokens, length: int, recipe: Recipe, effort: Effort | None) -> Material:
    """Excerpts to calibrate with, to learn from and to judge by: of the text's end only the last.

    Args:
      length: tokens of a window of calibration.
    """
    count = end_windows(len(text.ids), length, effort) if effort else 0
    learning = end = None
    if effort and count:
        end = text.last(effort.length, count)
        text = replace(text, ids=text.ids[: -end.windows.size])
    if effort:
        learning = text.first(effort.length, effort.tokens)
    calibration = text.first(length, recipe.calibration_tokens)
    if recipe.pool_tokens():
        pool = text.first(length, recipe.pool_tokens()).windows
        if len(pool) > len(calibration.windows):
            calibration = replace(calibration, pool=pool)
    return Material(calibration, learning, end)


def written(
    checkpoint: Checkpoint,
    params: Params,
    recipe: Recipe,
    effort: Effort | None,
    progress: self_written.Progress,
) -> Material:
    """Lets the model write a text, and cuts it into windows to calibrate with and to learn from.

    Args:
      params: folded parameters (`fold_norms`).
      effort: None where nothing is learned.
      progress: as in `self_written.sample`.

    Raises:
      UserError: as `self_written.calibration_windows`.
    """
    length = recipe.calibration_length
    count = max(1, recipe.calibration_tokens // length)
    # GPTQ reads what is there: more is not written for its sake.
    tokens, rows = max(count, recipe.calibration_pool // length) * length, length
    if effort:
        tokens += effort.held_out * effort.length  # nobody but the judge reads the end
        tokens, rows = max(tokens, min(effort.own_tokens, effort.tokens)), effort.length
    writer = self_written.Writer(checkpoint.config, recipe.bits, params)
    windows = self_written.calibration_windows(
        writer, checkpoint.tokenizer, tokens, rows, recipe.seed, progress
    )
    source, sha256 = "written by the model", hashlib.sha256(windows.tobytes()).hexdigest()
    # The text was written in windows to learn from. Calibration cuts it anew, and its windows may
    # begin within a document, as those of a file do.
    text = Tokens(source, source, sha256, windows.reshape(-1).tolist())
    return _material(text, length, recipe, effort)
