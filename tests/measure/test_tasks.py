"""Zero-shot tasks: scores by hand on chains of known probabilities, and on tiny models."""

import functools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers.models import BPE

from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.forward import token_nll
from qnpu_jax.measure import perplexity, task_files, tasks
from qnpu_jax.measure.task_files import KINDS, LAST_WORD, Item, Task
from qnpu_jax.measure.tasks import ScoredTokens, Scoring
from qnpu_jax.models.tokenizer import Tokenizer
from qnpu_sim.program import compile_model, run

CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n"]
ID = {c: i for i, c in enumerate(CHARACTERS)}
TOKENIZER = Tokenizer.build(
    tokenizers.Tokenizer(BPE(vocab=ID, merges=[])), [None], [None], None, "characters"
)
"""One token per character, 96 of them as in the golden models."""


def chain(**probabilities: float) -> perplexity.Logits:
    """A reading whose next token depends on the last alone: chain(ab=0.5) is p(b | a) = 0.5.

    What a row leaves over is shared by its other tokens; an underscore spells the space.
    """
    p = np.full((96, 96), -1.0)
    for pair, value in probabilities.items():
        first, second = pair.replace("_", " ")
        p[ID[first], ID[second]] = value
    given = np.where(p < 0, 0, p)
    rest = (1 - given.sum(axis=1)) / (p < 0).sum(axis=1)
    log_p = np.log(np.where(p < 0, rest[:, None], p)).astype(np.float32)
    return lambda ids: log_p[ids]


def write(folder, lines, name="task.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def score(logits, task):
    (result,) = tasks.score(logits, [task], TOKENIZER, 96)
    return result


# Each kind, by hand.


def test_choices_and_both_normalisations(tmp_path):
    """p(" b") = 1/2 1/8 = 1/16 beats p(" cd") = 1/2 1/4 1/4 = 1/32; per character of the choice
    log 1/32 / 2 beats log 1/16 / 1."""
    logits = chain(x_=1 / 2, _b=1 / 8, _c=1 / 4, cd=1 / 4)
    lines = [{"query": "x", "choices": ["b", "cd"], "gold": gold} for gold in (0, 1, 1, 1)]
    found = score(logits, task_files.read(write(tmp_path, lines)))
    assert (found.name, found.items) == ("task", 4)
    assert found.acc == 1 / 4
    assert found.acc_norm == found.headline == 3 / 4
    assert found.correct == (False, True, True, True)
    assert found.stderr == pytest.approx(math.sqrt(3 / 4 * 1 / 4 / 3))
    assert found.perplexity is None


def test_context_options(tmp_path):
    """p(" z" | ..a) = 1/2 1/9 and p(" z" | ..b) = 1/4 1/9: the first context is more likely."""
    logits = chain(a_=1 / 2, b_=1 / 4, _z=1 / 9)
    lines = [{"context_options": ["qa", "qb"], "continuation": "z", "gold": g} for g in (0, 1, 0)]
    found = score(logits, task_files.read(write(tmp_path, lines)))
    assert found.acc == found.acc_norm == pytest.approx(2 / 3)


def test_last_word_is_an_exact_match_of_greedy_decoding(tmp_path):
    """ " ab" is the greedy path; in " ac" the last character is not, though likely."""
    logits = chain(x_=1 / 2, _a=1 / 2, ab=1 / 2, ac=1 / 4)
    lines = [{"context": "x", "continuation": word} for word in ("ab", "ac")]
    found = score(logits, task_files.read(write(tmp_path, lines)))
    assert found.acc == found.headline == 1 / 2
    assert found.acc_norm is None
    assert found.correct == (True, False)
    # exp of the mean of log 8 and log 16; 1e-6: float32
    assert found.perplexity == pytest.approx(math.sqrt(8 * 16), rel=1e-6)


def test_a_tie_of_the_largest_logits_goes_to_the_first_token():
    """As in a greedy decoder; integer logits tie often."""
    logits = chain(x_=1 / 2, _a=1 / 4, _b=1 / 4)
    items = [Item((("x", " " + word),), 0) for word in "ab"]
    assert score(logits, Task("t", "t", LAST_WORD, tuple(items))).correct == (True, False)


# Reading.


def test_where_spaces_and_answers_stand(tmp_path):
    choices = {"choices": ["b ", " c"], "gold": 0}
    lines = [{"query": query, **choices} for query in ("Question: x?\n", "Intro: x", "x ")]
    contexts = [item.pairs[0][0] for item in task_files.read(write(tmp_path, lines)).items]
    assert contexts == ["Question: x?\nAnswer:", "Intro: x", "x"]
    for item in task_files.read(write(tmp_path, lines)).items:
        assert [continuation for _, continuation in item.pairs] == [" b", " c"]


def test_keys_say_the_kind_and_others_are_ignored(tmp_path):
    lines = [
        {"query": "x", "choices": ["a", "b"], "gold": 1, "category": "c"},
        {"context_options": ["x", "y"], "continuation": "a", "gold": 1, "id": 3},
        {"context": "x", "continuation": "a", "id": 3},
    ]
    for i, line in enumerate(lines):
        write(tmp_path, [line] * 3, f"{2 - i}.jsonl")
    (tmp_path / "notes.txt").write_text("no task")
    found = task_files.read_folder(tmp_path, limit=2)
    assert [task.name for task in found] == ["0", "1", "2"]
    assert [task.keys for task in found] == [*reversed(KINDS)]
    assert all(len(task.items) == 2 for task in found)
    assert found[1].items[0].gold == found[2].items[0].gold == 1


def test_byte_order_mark_blank_lines_and_line_separators(tmp_path):
    path = tmp_path / "task.jsonl"
    line = json.dumps({"context": "a\u2028b", "continuation": "c"}, ensure_ascii=False)
    path.write_text(f"\ufeff{line}\n\n{line}\n", encoding="utf-8")
    assert [item.pairs for item in task_files.read(path).items] == [(("a\u2028b", " c"),)] * 2


GOOD = '{"query": "x", "choices": ["a", "b"], "gold": 0}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "got list"),
        ("{}", "got []"),
        ('{"query": "x", "gold": 0}', "got ['gold', 'query']"),
        ('{"query": "x", "choices": "ab", "gold": 0}', '"choices": expected a list'),
        ('{"query": "x", "choices": ["a"], "gold": 0}', '"choices": expected a list of two'),
        ('{"query": "x", "choices": ["a", " "], "gold": 0}', '"choices": expected a text'),
        ('{"query": "x", "choices": ["a", 1], "gold": 0}', "got 1"),
        ('{"query": " ", "choices": ["a", "b"], "gold": 0}', '"query": expected a text'),
        ('{"query": "x", "choices": ["a", "b"], "gold": 2}', "0 to 1; got 2"),
        ('{"query": "x", "choices": ["a", "b"], "gold": -1}', "got -1"),
        ('{"query": "x", "choices": ["a", "b"], "gold": "0"}', "got '0'"),
        ('{"query": "x", "choices": ["a", "b"], "gold": true}', "got True"),
        ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "half a surrogate pair"),
        ('{"context_options": ["a", "b"], "continuation": 3, "gold": 0}', '"continuation"'),
        ('{"context": null, "continuation": "a"}', '"context": expected a text'),
        ('{"context": "x", "continuation": "a"}', "expected the keys of the lines before"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        task_files.read(path, limit=1)  # lines beyond the limit are checked too
    assert str(caught.value).startswith(f"{path}: line 3: ")
    assert message in str(caught.value)
    assert "expected" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.jsonl in it"):
        task_files.read_folder(tmp_path)
    with pytest.raises(UserError, match=r"no\.jsonl: cannot be read"):
        task_files.read(tmp_path / "no.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read"):
        task_files.read_folder(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"a\.jsonl: no line in it"):
        task_files.read_folder(tmp_path)


# Tokens.


def encode(context, continuation, bos=None, longest=99, tokenizer=TOKENIZER):
    return tasks.encode(
        (context, continuation), tokenizer, 96, "task.jsonl", Scoring(bos, (longest,))
    )


def ids(text):
    return tuple(ID[c] for c in text)


def test_the_joined_text_is_split_where_the_context_ends():
    assert encode("ab", " cd") == ScoredTokens(ids("ab cd"), 2)
    assert encode("ab", " cd", bos=7) == ScoredTokens((7, *ids("ab cd")), 3)


def test_a_token_across_the_border_still_leaves_one_to_score():
    """Merges a + b: of "a" and "b" joined one token is left, which follows "x"."""
    pieces = BPE(vocab={"a": 0, "b": 1, "x": 2, "ab": 3}, merges=[("a", "b")])
    merging = Tokenizer.build(tokenizers.Tokenizer(pieces), [None], [None], None, "merging")
    assert encode("xa", "b", tokenizer=merging) == ScoredTokens((2, 3), 1)
    with pytest.raises(UserError, match="has no token"):
        encode("a", "b", tokenizer=merging)


def test_of_a_long_text_the_end_of_the_context_is_kept():
    """An input of 5 tokens scores a text of 6: the last is only predicted."""
    assert encode("abcdef", " gh", longest=5) == ScoredTokens(ids("def gh"), 3)
    assert encode("abcdef", " gh", bos=7, longest=5) == ScoredTokens((7, *ids("ef gh")), 3)
    assert encode("abcdef", " gh", longest=3) == ScoredTokens(ids("f gh"), 1)
    with pytest.raises(UserError, match="has 3 tokens; expected at most 2"):
        encode("abcdef", " gh", longest=2)


def test_tokens_outside_the_vocabulary():
    task = Task("t", "t.jsonl", LAST_WORD, (Item((("a", " ~"),), 0),))
    with pytest.raises(UserError, match=r"t\.jsonl: token 94"):
        tasks.score(chain(), [task], TOKENIZER, 90)


# Batches.


def random_texts(count, longest, seed=0):
    """Texts of 2 tokens to one more than `longest`, some of them twice."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 96, n) for n in rng.integers(2, longest + 2, count)]
    found = [ScoredTokens(tuple(map(int, row)), int(rng.integers(1, len(row)))) for row in rows]
    return found + found[:3]


def test_batches_hold_every_text_once_at_few_lengths():
    texts = random_texts(50, 32)
    found = tasks.batches(texts, Scoring(None, (8, 16, 32), 64))
    assert sorted(r for _, group in found for r in group) == sorted(set(texts))
    for length, group in found:
        longest = max(len(r.ids) - 1 for r in group)
        assert length == next(n for n in (8, 16, 32) if n >= longest)
    for length in (8, 16, 32):
        rows = [len(group) for n, group in found if n == length]
        assert rows[:-1] == [64 // length] * (len(rows) - 1)
    one = tasks.batches(texts[:1], Scoring(None, (32,), 8))  # at least one a call
    assert one == [(32, texts[:1])]


def test_padding_is_on_the_right_and_not_scored():
    inputs, targets, scored = tasks.pad([ScoredTokens((5, 6, 7), 1), ScoredTokens((8, 9), 1)], 3, 4)
    assert inputs.tolist() == [[5, 6, 0, 0], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert targets.tolist() == [[6, 7, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0]]
    assert scored.tolist() == [[True, True, False, False], [True, False, False, False], [False] * 4]


def test_progress_counts_batches_of_a_task():
    seen = []

    def track(items, length, what):
        seen.append((length, what))
        return items

    task = Task("t", "t", LAST_WORD, (Item((("ab", " c"),), 0),) * 3)
    tasks.score(chain(), [task, task], TOKENIZER, 96, track=track)
    assert seen == [(1, "t"), (1, "t")]


def alone(logits, text, length):
    """log p and greedy match of one text (T,), followed by zeros up to `length`."""
    given = np.asarray(text.ids, np.int32)
    n = len(given) - 1
    padded = np.zeros(max(n, length), np.int32)
    padded[:n] = given[:-1]
    real = np.asarray(logits(padded))[: n + 1]
    # token_nll scores the token after each position but the last.
    nll = token_nll(jnp.concatenate([real[:n], real[-1:]]), jnp.asarray(given))
    best = np.argmax(real[:n], axis=-1)[text.start - 1 :]
    greedy = bool(np.all(best == given[text.start :]))
    return -float(np.sum(np.asarray(nll)[text.start - 1 :])), greedy


def some_texts(logits):
    """Of few lengths, as each compiles; one is a greedy path, which no random one would be."""
    rng = np.random.default_rng(1)
    rows = [tuple(map(int, rng.integers(0, 96, n))) for n in (6, 6, 9, 9, 9, 14, 14)]
    padded = np.array([*rows[5], 0, 0], np.int32)  # to 16
    best = int(np.argmax(np.asarray(logits(padded))[13]))
    return [ScoredTokens(row, 1 + i % 4) for i, row in enumerate(rows)] + [
        ScoredTokens((*rows[5], best), 14)
    ]


def compare(logits, exact_length, tolerance):
    texts = some_texts(logits)
    found = tasks.log_likelihoods(logits, texts, Scoring(None, (8, 16), 32))
    assert set(found) == set(texts)
    for text, (log_p, greedy) in found.items():
        length = 0 if exact_length else 8 if len(text.ids) <= 9 else 16
        expected, expected_greedy = alone(logits, text, length)
        assert log_p == pytest.approx(expected, abs=tolerance)
        assert greedy == expected_greedy
    assert any(greedy for _, greedy in found.values())


@pytest.mark.slow
@pytest.mark.nightly
def test_batched_and_padded_scores_equal_those_of_single_texts():
    """1e-4: up to 13 float32 terms of size 5, of sums in another order (1.5e-5 measured)."""
    config, params = tiny.prepared("gqa_llama3")
    compare(perplexity.float_logits(config, tiny.PLANS["w8a8"], params), True, 1e-4)


@pytest.mark.nightly
def test_simulated_scores_do_not_depend_on_the_batch():
    """Codes are equal; 1e-4 as above. Of equal length: masked keys keep a weight (`tasks`)."""
    model = tiny.quantized("gqa_llama3", "w8a8")
    program = functools.cache(lambda n: compile_model(model, model.decoder(n), "litert_ref"))
    logits = perplexity.integer_logits(
        model, lambda ids: run(program(ids.shape[-1]), ids)["head.logits"]
    )
    compare(logits, False, 1e-4)
