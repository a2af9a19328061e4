"""Zero-shot accuracy by log-likelihood, of a model read in float, fake-quantized or simulated.

The score of a continuation c_1..c_n after a context is log p(c) = sum_i log p(c_i | context,
c_<i). `acc` compares log p(c); `acc_norm` compares log p(c) / characters of c, as acc_norm of
lm-evaluation-harness does: unlike a mean over tokens it does not depend on the tokenizer. It is
the headline where there are choices; where all options end in one continuation the two are equal.

**Where a context ends in tokens.** The joined text is tokenized, as the model saw text in
training, and split at the number of tokens of the context alone. Byte-level BPE never merges
across the space, so the split is exact; with other tokenizers at least the last token is scored.

**Padding.** Inputs are padded with token 0 on the right, which causal attention does not see: in
float a masked key has weight exp(-2048) = 0. Not so in LiteRT's int16 SOFTMAX, whose table of exp
ends at e^-10: every masked key keeps 2 / 32768. The simulator, like a device, therefore depends a
little on the static length, and with 16-bit probabilities on what fills it.

Reference: lm-evaluation-harness, lm_eval/api/model.py `TemplateLM._encode_pair` (the split) and
lm_eval/api/task.py `ConfigurableTask.process_results` (acc, acc_norm, perplexity).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qnpu_jax.errors import UserError
from qnpu_jax.measure.perplexity import Logits
from qnpu_jax.measure.task_files import LAST_WORD, Task
from qnpu_jax.models import Tokenizer
from qnpu_jax.progress import Track, untracked
from qnpu_jax.text import files

LENGTHS = (24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
"""Static lengths that inputs are padded to, ascending.

Each costs one compilation. On the six tasks of benchmarks/README.md padding to these adds 15% of
tokens, where multiples of 32 alone add 40%."""

BATCH_TOKENS = 1024
"""Tokens per call of the model, padding included: fastest on two CPU cores. A GPU wants more."""


@dataclass(frozen=True)
class Scoring:
    """Settings of `score`.

    Attributes:
      bos: token to put before every context. None for a reading with a constant prefix, which
        stands before every input already.
      lengths: static lengths of inputs, ascending, below the model's positions. A longer text loses
        the beginning of its context, but not `bos`.
      batch_tokens: tokens per call, padding included; every call of a length has the same shape.
    """

    bos: int | None = None
    lengths: Sequence[int] = LENGTHS
    batch_tokens: int = BATCH_TOKENS


@dataclass(frozen=True)
class TaskResult:
    """Score of a reading in a task; accuracies are fractions, 0 to 1.

    Attributes:
      name: the task.
      acc: accuracy by log p(c), or exact matches of the last word.
      acc_norm: accuracy by log p(c) per character; None without options.
      perplexity: exp(mean -log p(c)) of the last word; None with options.
      correct: whether each item counts as right in `headline`. Two readings of the same items are
        best compared item by item.
    """

    name: str
    acc: float
    acc_norm: float | None
    perplexity: float | None
    correct: tuple[bool, ...]

    @property
    def items(self) -> int:
        return len(self.correct)

    @property
    def headline(self) -> float:
        """Accuracy to report: `acc_norm`, or `acc` where there are no options."""
        return self.acc if self.acc_norm is None else self.acc_norm

    @property
    def stderr(self) -> float:
        """Standard error of `headline` as an estimate over items, sqrt(p (1 - p) / (n - 1))."""
        return float(np.sqrt(self.headline * (1 - self.headline) / max(self.items - 1, 1)))


class ScoredTokens(NamedTuple):
    """Tokens of a context and its continuation; those from `start` on are scored.

    1 <= start < len(ids): the first token of an input cannot be scored.
    """

    ids: tuple[int, ...]
    start: int


class Likelihood(NamedTuple):
    """log p of a continuation in nats, and whether greedy decoding writes all of it."""

    log_p: float
    greedy: bool


def score(
    logits: Logits,
    tasks: Iterable[Task],
    tokenizer: Tokenizer,
    vocab_size: int,
    scoring: Scoring = Scoring(),
    track: Track = untracked,
) -> list[TaskResult]:
    """Scores a reading in each task.

    Args:
      logits: a causal model, for ids (B, T) with T any of `scoring.lengths`.
      vocab_size: the model's.
      track: shows progress: (batches, their number, name of the task).

    Returns:
      One result for each task.

    Raises:
      UserError: tokens outside the model's vocabulary, a continuation longer than the last length.
    """
    results = []
    for task in tasks:
        encoded = [
            tuple(encode(p, tokenizer, vocab_size, task.source, scoring) for p in item.pairs)
            for item in task.items
        ]
        texts = [text for row in encoded for text in row]
        found = log_likelihoods(logits, texts, scoring, track, task.name)
        results.append(_result(task, [[found[text] for text in row] for row in encoded]))
    return results


def encode(
    pair: tuple[str, str], tokenizer: Tokenizer, vocab_size: int, source: str, scoring: Scoring
) -> ScoredTokens:
    """Encodes a context and its continuation, split as the docstring of this module says.

    The last token is only predicted, so an input of T tokens scores a text of T + 1.

    Args:
      source: the file, for messages.

    Raises:
      UserError: see `score`.
    """
    context, continuation = pair
    ids = files.tokenize([context + continuation], tokenizer, vocab_size, source)
    start = min(len(tokenizer.encode(context)), len(ids) - 1)
    if start < 1:
        raise UserError(
            f"{source}: {context[:40]!r} before {continuation[:40]!r} has no token; expected at"
            " least one each; take the model's own tokenizer"
        )
    head = [] if scoring.bos is None else [scoring.bos]
    longest = scoring.lengths[-1]
    cut = max(0, len(head) + len(ids) - (longest + 1))
    if cut >= start:
        raise UserError(
            f"{source}: {continuation[:40]!r}... has {len(ids) - start} tokens; expected at most"
            f" {longest - len(head)}, with one of context; give a greater length"
        )
    return ScoredTokens((*head, *ids[cut:]), len(head) + start - cut)


def log_likelihoods(
    logits: Logits,
    texts: Iterable[ScoredTokens],
    scoring: Scoring = Scoring(),
    track: Track = untracked,
    what: str = "",
) -> dict[ScoredTokens, Likelihood]:
    """Computes log p and greedy match of every distinct text.

    Args:
      logits, track: as in `score`; `what` names the iteration.
    """
    todo = batches(texts, scoring)
    found: dict[ScoredTokens, Likelihood] = {}
    for length, group in track(todo, len(todo), what):
        rows = max(1, scoring.batch_tokens // length)
        ids, targets, scored = pad(group, rows, length)
        log_p, greedy = _score_rows(jnp.asarray(logits(ids)), targets, scored)
        # The rows that only fill the batch have no text.
        found |= zip(group, map(Likelihood, log_p.tolist(), greedy.tolist()), strict=False)
    return found


def batches(
    texts: Iterable[ScoredTokens], scoring: Scoring
) -> list[tuple[int, list[ScoredTokens]]]:
    """Groups distinct texts into calls of the model, longest first.

    The padded length of a text depends on its own tokens alone, never on what else is scored: see
    this module on padding.

    Returns:
      The padded length of each call, and its texts.
    """
    fit: dict[int, list[ScoredTokens]] = {}
    for text in sorted(dict.fromkeys(texts), key=lambda t: len(t.ids), reverse=True):
        length = next(n for n in scoring.lengths if n >= len(text.ids) - 1)
        fit.setdefault(length, []).append(text)
    rows = {length: max(1, scoring.batch_tokens // length) for length in fit}
    return [(n, g[i : i + rows[n]]) for n, g in fit.items() for i in range(0, len(g), rows[n])]


def pad(
    group: Sequence[ScoredTokens], rows: int, length: int
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Pads texts with zeros on the right.

    Returns:
      Inputs, the token that follows each, and whether it is scored.
    """
    ids, targets = np.zeros((2, rows, length), np.int32)
    scored = np.zeros((rows, length), bool)
    for row, text in enumerate(group):
        n = len(text.ids) - 1
        ids[row, :n], targets[row, :n] = text.ids[:-1], text.ids[1:]
        scored[row, text.start - 1 : n] = True
    return ids, targets, scored


@jax.jit
def _score_rows(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], scored: Bool[Array, "b t"]
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """Sums log p over the scored positions, and tells whether argmax finds every scored token.

    Of equal largest logits argmax takes the first, as a greedy decoder does.
    """
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_p = picked - jax.nn.logsumexp(logits, axis=-1)
    greedy = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(jnp.where(scored, log_p, 0.0), axis=-1), jnp.all(greedy | ~scored, axis=-1)


def _result(task: Task, found: Sequence[Sequence[Likelihood]]) -> TaskResult:
    """Computes accuracies from the likelihoods of every item's options."""
    if task.keys == LAST_WORD:
        words = [options[0] for options in found]
        correct = tuple(word.greedy for word in words)
        perplexity = float(np.exp(-np.mean([word.log_p for word in words])))
        return TaskResult(task.name, float(np.mean(correct)), None, perplexity, correct)
    plain, normalized = [], []
    for item, options in zip(task.items, found, strict=True):
        log_p = np.array([option.log_p for option in options])
        characters = np.array([len(c.strip()) for _, c in item.pairs])
        plain.append(bool(np.argmax(log_p) == item.gold))
        normalized.append(bool(np.argmax(log_p / characters) == item.gold))
    means = float(np.mean(plain)), float(np.mean(normalized))
    return TaskResult(task.name, *means, None, tuple(normalized))
