"""`qnpu text`: a model writes a text of its own into a file that `--calibration` takes.

It may also show which windows of that text coverage would choose to calibrate with, and why.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from qnpu_jax import artifacts, pipeline
from qnpu_jax.calibrate import Coverage, Peaks, cover, coverage_of, window_peaks
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params, decoder
from qnpu_jax.models import Checkpoint
from qnpu_jax.models import checkpoint as models_checkpoint
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text import (
    Windows,
    corpus,
    excerpts,
    files,
    prompts,
    self_written,
    starts_of,
    windows,
)
from qnpu_jax.transform import fold_norms, random_rotation, rotate

RECIPE = RECIPES["w8a8"]
"""Its float model is the one whose activations are covered."""
CHOSEN = "chosen"
"""Key of a line of the file: when the first window was chosen in which its document stands, from
1."""


@dataclass(frozen=True)
class OwnText:
    """What to write.

    Attributes:
      model: as `qnpu_jax.load` takes it.
      out: the file, with a suffix of `files.JSON_LINES`.
      tokens: to write, at least; loops and repeats among them are left out of the file.
      length: tokens of a row, in which one document follows another: the longest document.
      seed: decides every draw.
      overwrite: replace a file that is there.
      choose: windows to choose by coverage; 0 for none.
    """

    model: str
    out: Path
    tokens: int = 65_536
    length: int = 512
    seed: int = 0
    overwrite: bool = False
    choose: int = 0


@dataclass(frozen=True)
class Choice:
    """Windows of a text that coverage chose.

    Attributes:
      length: tokens of a window.
      pool: windows to choose from.
      coverage: those that were chosen, and why.
      domains: of each of them, its tokens by domain.
      first: F of the pool's first k windows, k from 1 on, to compare with `coverage.curve`.
    """

    length: int
    pool: int
    coverage: Coverage
    domains: list[Counter[str]]
    first: list[float]


class Written(NamedTuple):
    """What was written into the file, and what was chosen of it, if anything was asked for."""

    corpus: corpus.Corpus
    choice: Choice | None


def write(asked: OwnText, watch: Observer) -> Written:
    """Writes the file, whole or not at all.

    Raises:
      UserError: a suffix that is not read as JSON lines, a file that is there already or cannot be
        written, rows longer than the model's positions, no text, or too little to choose from.
    """
    if asked.out.suffix.lower() not in files.JSON_LINES:
        raise UserError(
            f"{asked.out}: expected a name that ends in one of {', '.join(files.JSON_LINES)}, as"
            " each line is a document in JSON; name another file"
        )
    if asked.choose > asked.tokens // _window(asked):
        raise UserError(
            f"choose: {asked.choose} windows of {_window(asked)} tokens; expected at most the"
            f" {asked.tokens // _window(asked)} that {asked.tokens} tokens have; choose fewer, or"
            " raise --tokens"
        )
    with artifacts.new_file(asked.out, replace=asked.overwrite) as path:
        with watch.stage("load"):
            checkpoint = models_checkpoint.load(asked.model)
        config = checkpoint.config
        if asked.length > config.max_positions:
            raise UserError(
                f"length: {asked.length} tokens; expected at most the model's"
                f" {config.max_positions} positions; choose a shorter --length"
            )
        if asked.choose:
            pipeline.check_model(config, RECIPE, {"length": _window(asked)})
        with watch.stage("fold"):
            folded = fold_norms(config, checkpoint.params, consume=True)
            params = {name: jax.device_put(x) for name, x in folded.items()}
        with watch.stage("write text"):
            found = _corpus(asked, checkpoint, params, watch)
        if not found.lines:
            raise UserError(
                f"{asked.model}: wrote nothing but loops; expected some text; raise --tokens, or"
                " give text of another source to --calibration"
            )
        choice = _choice(asked, checkpoint, params, found, watch) if asked.choose else None
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in found.lines)
        path.write_text("".join(lines), encoding="utf-8")
    return Written(found, choice)


def _corpus(
    asked: OwnText, checkpoint: Checkpoint, params: Params, watch: Observer
) -> corpus.Corpus:
    """Lets the model write, and keeps what is worth learning from."""
    tokenizer = checkpoint.tokenizer
    count = max(1, -(-asked.tokens // asked.length))
    begun = prompts.prompts_of(tokenizer, count, asked.seed)
    writer = self_written.Writer(checkpoint.config, RECIPE.bits, params)
    drawing = self_written.Drawing(asked.seed, stop=tokenizer.eos_ids, bos=tokenizer.bos_id)
    steps = partial(watch.track, what="write text")
    rows = self_written.sample(writer, [p.ids for p in begun], asked.length, drawing, steps)
    written = corpus.split(rows, begun, tokenizer.eos_ids, tokenizer.bos_id)
    return corpus.corpus(written, tokenizer)


def _window(asked: OwnText) -> int:
    return min(RECIPE.calibration_length, asked.length)


def _choice(
    asked: OwnText,
    checkpoint: Checkpoint,
    params: Params,
    found: corpus.Corpus,
    watch: Observer,
) -> Choice:
    """Chooses windows of the documents, one after the other, and marks the documents in them."""
    length, documents = _window(asked), found.documents
    ids = list(chain.from_iterable(document.ids for document in documents))
    pool = windows.cut(ids, length, len(ids), "the text that was written")
    if len(pool) < asked.choose:
        raise UserError(
            f"choose: {asked.choose} windows of {length} tokens; expected at most the"
            f" {len(pool)} of the documents that were kept; choose fewer, or raise --tokens"
        )
    peaks = _peaks(checkpoint, params, pool, watch)
    coverage = cover(peaks, asked.choose)
    ends = list(accumulate(len(document.ids) for document in documents))
    domains = []
    for rank, window in enumerate(coverage.windows, start=1):
        begin, end = window * length, (window + 1) * length
        domains.append(Counter[str]())
        for i in range(bisect_right(ends, begin), len(ends)):
            first = ends[i] - len(documents[i].ids)
            if first >= end:
                break
            found.lines[i].setdefault(CHOSEN, rank)
            domains[-1][documents[i].prompt.domain] += min(ends[i], end) - max(first, begin)
    first = [coverage_of(peaks, range(k)) for k in range(1, asked.choose + 1)]
    return Choice(length, len(pool), coverage, domains, first)


def _peaks(checkpoint: Checkpoint, params: Params, pool: np.ndarray, watch: Observer) -> Peaks:
    """Peaks of the float model that is quantized: rotated, after its prefix."""
    config = checkpoint.config
    with watch.stage("rotate"):
        on_host = {name: np.asarray(x) for name, x in params.items()}
        rotated = rotate(config, on_host, random_rotation(config, RECIPE.seed), consume=True)
        rotated = {name: jax.device_put(x) for name, x in rotated.items()}
    count = max(1, RECIPE.calibration_tokens // pool.shape[1])
    text = Windows.of(pool[:count], excerpts.judged(checkpoint, None).other.windows)
    starts = starts_of(checkpoint.tokenizer)
    begun = pipeline.with_prefix(config, rotated, RECIPE, text, starts, watch)
    dec = decoder(begun.config, RECIPE.bits, pool.shape[1], len(begun.tokens))
    with watch.stage("choose"):
        return window_peaks(dec, begun.params, pool, track=watch.track)
