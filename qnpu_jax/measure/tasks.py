"""Zero-shot tasks by log-likelihood, for any reading of a model: float, fake-quantized, simulated.

A task is a file of JSON lines; the keys of a line, not the name of the file, say its kind.

- `query`, `choices`, `gold`: each choice is scored after the query; choice `gold` should be best.
- `context_options`, `continuation`, `gold`: the continuation after each context, likewise.
- `context`, `continuation`: the continuation (a last word); greedy decoding should write it.

The score of a continuation c_1..c_n after a context is log p(c) = sum_i log p(c_i | context,
c_<i). `acc` compares log p(c); `acc_norm` compares log p(c) / characters of c, as acc_norm of
lm-evaluation-harness does: unlike a mean over tokens it does not depend on the tokenizer. It is
the headline where there are choices; where all options end in one continuation the two are equal.

**Where the space stands.** Contexts of these files end without a space and continuations begin
without one, so they are joined by one, which belongs to the continuation (" word" is a token of
its own in byte-level BPE, "context " would end in a space that no text of training has there). A
query that begins with "Question:" is completed with "\nAnswer:", which the files leave to the
reader: llm-foundry's `continuation_delimiter`, and word for word the prompts of ARC and PIQA in
lm-evaluation-harness.

**Where a context ends in tokens.** The joined text is tokenized, as the model saw text in
training, and split at the number of tokens of the context alone. Byte-level BPE never merges
across the space, so the split is exact; with other tokenizers at least the last token is scored.

**Padding.** Inputs are padded with token 0 on the right, which causal attention does not see: in
float a masked key has weight exp(-2048) = 0. Not so in LiteRT's int16 SOFTMAX, whose table of exp
ends at e^-10: every masked key keeps 2 / 32768. The simulator, like a device, therefore depends a
little on the static length, and with 16-bit probabilities on what fills it.

Reference: lm-evaluation-harness, lm_eval/api/model.py `TemplateLM._encode_pair` (the split) and
lm_eval/api/task.py `ConfigurableTask.process_results` (acc, acc_norm, perplexity); llm-foundry,
llmfoundry/eval/datasets/in_context_learning_evaluation.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qnpu_jax.errors import UserError
from qnpu_jax.measure.perplexity import Logits
from qnpu_jax.models import Tokenizer
from qnpu_jax.progress import Track, untracked
from qnpu_jax.text import files

LENGTHS = (24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
"""Static lengths that inputs are padded to, ascending. On the six tasks of the README they add 15%
of tokens, multiples of 32 alone 40%; each costs one compilation."""

BATCH_TOKENS = 1024
"""Tokens per call of the model, padding included: what two CPU cores like. A GPU wants more."""

ANSWER = "\nAnswer:"
"""Completes a query that begins with "Question:"."""

CHOICES = ("query", "choices", "gold")
CONTEXTS = ("context_options", "continuation", "gold")
LAST_WORD = ("context", "continuation")
KINDS = (CHOICES, CONTEXTS, LAST_WORD)


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
      name: the file's, without its suffix.
      source: the file, for messages.
      keys: its kind, one of `KINDS`.
    """

    name: str
    source: str
    keys: tuple[str, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Result:
    """A reading's score in a task; accuracies are fractions, 0 to 1.

    Attributes:
      acc: by log p(c), or exact matches of the last word.
      acc_norm: by log p(c) per character; None without options.
      perplexity: exp(mean -log p(c)) of the last word; None with options.
      correct: per item, what `headline` averages: two readings of the same items are compared best
        item by item.
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
        """`acc_norm`, without options `acc`."""
        return self.acc if self.acc_norm is None else self.acc_norm

    @property
    def stderr(self) -> float:
        """Standard error of `headline` as an estimate over items, sqrt(p (1 - p) / (n - 1))."""
        return float(np.sqrt(self.headline * (1 - self.headline) / max(self.items - 1, 1)))


class Request(NamedTuple):
    """Tokens of context and continuation; those from `start` on are scored. 1 <= start < T."""

    ids: tuple[int, ...]
    start: int


class Likelihood(NamedTuple):
    """log p of a continuation in nats, and whether greedy decoding writes all of it."""

    log_p: float
    greedy: bool


def read_folder(folder: str | Path, limit: int | None = None) -> list[Task]:
    """The tasks of a folder's *.jsonl files, by name; of each the first `limit` items.

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
    """A task's first `limit` items; every line is checked.

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
    # Not splitlines: U+2028 and its like may stand in a JSON string.
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
    """Kind and item of a line."""
    expected = "expected an object with the keys " + " or ".join(str(list(k)) for k in KINDS)
    try:
        value = json.loads(line)
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
    """A text without the white space around it: the space between two is ours to put."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f'{where}: "{key}": expected a text that is not blank; got {value!r}; correct the line'
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
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


def score(
    logits: Logits,
    tasks: Iterable[Task],
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    bos: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    batch_tokens: int = BATCH_TOKENS,
    track: Track = untracked,
) -> list[Result]:
    """Scores a reading in each task.

    Args:
      logits: a causal model, for ids (B, T) with T any of `lengths`.
      vocab_size: the model's.
      bos: a token to put before every context. None for a reading with a constant prefix, which
        stands before every input already.
      lengths: static lengths, ascending, below the model's positions. Of a longer text the end of
        the context is kept (and `bos`).
      batch_tokens: tokens per call, padding included; every call of a length has the same shape.
      track: shows progress: (batches, their number, task).

    Raises:
      UserError: tokens outside the model's vocabulary, a continuation longer than the last length.
    """
    results = []
    for task in tasks:
        encoded = [
            tuple(encode(p, tokenizer, vocab_size, task.source, bos, lengths[-1]) for p in i.pairs)
            for i in task.items
        ]
        requests = [r for row in encoded for r in row]
        found = log_likelihoods(logits, requests, lengths, batch_tokens, track, task.name)
        results.append(_result(task, [[found[r] for r in row] for row in encoded]))
    return results


def encode(
    pair: tuple[str, str],
    tokenizer: Tokenizer,
    vocab_size: int,
    source: str,
    bos: int | None,
    longest: int,
) -> Request:
    """Tokens of a context and its continuation, split as the module says.

    The last token is only predicted, so an input of `longest` tokens makes a request of one more.

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
    head = [] if bos is None else [bos]
    cut = max(0, len(head) + len(ids) - (longest + 1))
    if cut >= start:
        raise UserError(
            f"{source}: {continuation[:40]!r}... has {len(ids) - start} tokens; expected at most"
            f" {longest - len(head)}, with one of context; give a greater length"
        )
    return Request((*head, *ids[cut:]), len(head) + start - cut)


def log_likelihoods(
    logits: Logits,
    requests: Iterable[Request],
    lengths: Sequence[int] = LENGTHS,
    batch_tokens: int = BATCH_TOKENS,
    track: Track = untracked,
    what: str = "",
) -> dict[Request, Likelihood]:
    """log p and greedy match of every distinct request; arguments as in `score`."""
    todo = batches(requests, lengths, batch_tokens)
    found: dict[Request, Likelihood] = {}
    for length, group in track(todo, len(todo), what):
        rows = max(1, batch_tokens // length)
        ids, targets, scored = pad(group, rows, length)
        log_p, greedy = _score_rows(jnp.asarray(logits(ids)), targets, scored)
        # The rows that only fill the batch have no request.
        found |= zip(group, map(Likelihood, log_p.tolist(), greedy.tolist()), strict=False)
    return found


def batches(
    requests: Iterable[Request], lengths: Sequence[int], batch_tokens: int
) -> list[tuple[int, list[Request]]]:
    """Distinct requests, longest first, in groups for one call each; with each group its length.

    The length of a request depends on its own tokens alone, never on what else is scored: see the
    module on padding.
    """
    fit: dict[int, list[Request]] = {}
    for request in sorted(dict.fromkeys(requests), key=lambda r: len(r.ids), reverse=True):
        fit.setdefault(next(n for n in lengths if n >= len(request.ids) - 1), []).append(request)
    rows = {length: max(1, batch_tokens // length) for length in fit}
    return [(n, g[i : i + rows[n]]) for n, g in fit.items() for i in range(0, len(g), rows[n])]


def pad(
    group: Sequence[Request], rows: int, length: int
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Inputs, the tokens that follow them, and which of those are scored; the rest is zero."""
    ids, targets = np.zeros((2, rows, length), np.int32)
    scored = np.zeros((rows, length), bool)
    for row, request in enumerate(group):
        n = len(request.ids) - 1
        ids[row, :n], targets[row, :n] = request.ids[:-1], request.ids[1:]
        scored[row, request.start - 1 : n] = True
    return ids, targets, scored


@jax.jit
def _score_rows(
    logits: Float[Array, "b t v"], targets: Int[Array, "b t"], scored: Bool[Array, "b t"]
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """Sum of log p over the scored positions, and whether argmax (the first, of equal ones) finds
    each."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_p = picked - jax.nn.logsumexp(logits, axis=-1)
    greedy = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(jnp.where(scored, log_p, 0.0), axis=-1), jnp.all(greedy | ~scored, axis=-1)


def _result(task: Task, found: Sequence[Sequence[Likelihood]]) -> Result:
    """Accuracies from the likelihoods of every item's options."""
    if task.keys == LAST_WORD:
        words = [options[0] for options in found]
        correct = tuple(word.greedy for word in words)
        perplexity = float(np.exp(-np.mean([word.log_p for word in words])))
        return Result(task.name, float(np.mean(correct)), None, perplexity, correct)
    plain, normalized = [], []
    for item, options in zip(task.items, found, strict=True):
        log_p = np.array([option.log_p for option in options])
        characters = np.array([len(c.strip()) for _, c in item.pairs])
        plain.append(bool(np.argmax(log_p) == item.gold))
        normalized.append(bool(np.argmax(log_p / characters) == item.gold))
    means = float(np.mean(plain)), float(np.mean(normalized))
    return Result(task.name, *means, None, tuple(normalized))
