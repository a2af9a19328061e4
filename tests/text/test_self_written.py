"""Decoding over the cache is the full forward, token for token; rows are full, seeded and fair."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pairwise
import pytest
from characters import BOS, EOS, TEMPLATE, characters
from model_files import GOLDEN, NAMES

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text import self_written
from qnpu_jax.text.dialogues import QUESTIONS
from qnpu_jax.text.openers import plain
from qnpu_jax.text.prompts import _knows
from qnpu_jax.text.self_written import (
    BATCH,
    Drawing,
    Writer,
    calibration_windows,
    sample,
)
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.prefix import add_prefix

PLAN = RECIPES["w8a8"].bits
TOGETHER = BATCH["cpu"]


GREEDY = Drawing(0, temperature=0.0)


def folded(config: ModelConfig, params: dict[str, np.ndarray]) -> Writer:
    return Writer(config, PLAN, {k: jnp.asarray(x) for k, x in fold_norms(config, params).items()})


@pytest.fixture(scope="module", params=pairwise.often(NAMES, NAMES[1:2]))
def model(request) -> Writer:
    return folded(*load_params(GOLDEN / request.param))


@pytest.fixture(scope="module")
def tiny() -> Writer:
    return folded(*load_params(GOLDEN / "mha_tied"))


full_forward = partial(jax.jit, static_argnums=0)(forward)
next_logits = partial(jax.jit, static_argnums=0)(self_written._next_logits)


def continuation(
    model: Writer, prompt: list[int], new: int, stop: Collection[int] = (), pad: int = 128
) -> list[int]:
    """The likeliest continuation without a cache, its stop token included."""
    dec = decoder(model.config, model.plan, pad)
    ids = np.zeros(pad, np.int32)
    ids[: len(prompt)] = prompt
    out: list[int] = []
    while len(out) < new and not (out and out[-1] in stop):
        at = len(prompt) + len(out)
        token = int(full_forward(dec, model.params, jnp.asarray(ids))[at - 1].argmax())
        out.append(token)
        if at < pad:
            ids[at] = token
    return out


# Cached decoding is the full forward.


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_step_gives_the_logits_of_the_reference_implementation(name):
    model = folded(*load_params(GOLDEN / name))
    golden = np.load(GOLDEN / f"{name}.npz")
    tokens, expected = golden["tokens"], golden["logits"]
    dec = decoder(model.config, model.plan, 1, cache=len(tokens))
    tables = self_written._tables(dec)
    at = self_written._start(dec, jax.random.key(0), 0, 2, 1)
    # A row at another position must not matter, nor what an earlier document left in the cache.
    at = replace(at, k=at.k + 7.0, v=at.v - 7.0)
    for position, token in enumerate(tokens):
        here = jnp.asarray([position, position // 2], jnp.int32)
        both = jnp.asarray([token, tokens[position // 2]], jnp.int32)
        at = replace(at, position=here, token=both)
        logits, at = next_logits(dec, model.params, tables, at)
        # Float32 sums in another order: 8.5e-6 was seen, on logits of up to 6.7.
        np.testing.assert_allclose(logits[0], expected[position], atol=3e-5, rtol=0)
        np.testing.assert_allclose(logits[1], expected[position // 2], atol=3e-5, rtol=0)


def greedy(model: Writer, prompt: list[int], new: int, stop: Collection[int] = ()) -> list[int]:
    """The likeliest continuation by `sample`, its stop token included."""
    drawing = Drawing(0, temperature=0.0, stop=stop)
    row = sample(model, [prompt], len(prompt) + new, drawing)[0].tolist()
    assert row[: len(prompt)] == prompt
    ends = (i for i, token in enumerate(row) if i >= len(prompt) and token in stop)
    return row[len(prompt) : next(ends, len(row)) + 1]


@pytest.mark.slow
def test_the_likeliest_tokens_are_the_argmax_of_the_full_forward(model: Writer):
    prompt = [1, 17, 5, 80, 3]
    assert greedy(model, prompt, 60) == continuation(model, prompt, 60)
    assert greedy(model, prompt, 123) == continuation(model, prompt, 123)  # the last position


@pytest.mark.slow
@pytest.mark.parametrize("name", list(kinds.CONFIGS))
def test_layers_of_several_kinds_write_what_the_full_forward_says(name):
    """Past the window, and with a prefix that stays in it."""
    config, prompt = kinds.CONFIGS[name], [1, 17, 5, 80, 3]
    model = folded(config, kinds.checkpoint(config))
    params = add_prefix(config, PLAN, model.params, (9, 33))
    model = replace(model, params={n: jnp.asarray(x) for n, x in params.items()})
    dec = decoder(config, PLAN, 20, 2)
    row = np.asarray([*prompt, *greedy(model, prompt, 15)], np.int32)
    expected = full_forward(dec, model.params, jnp.asarray(row)).argmax(axis=1)
    np.testing.assert_array_equal(row[len(prompt) :], expected[len(prompt) - 1 : -1])


@pytest.mark.slow
def test_a_stop_token_ends_a_document(tiny: Writer):
    prompt = [1, 17, 5]
    whole = continuation(tiny, prompt, 20)
    first = whole.index(whole[9])
    assert greedy(tiny, prompt, 20, [whole[9]]) == whole[: first + 1]
    assert greedy(tiny, [7], 1) == continuation(tiny, [7], 1)


@pytest.mark.slow
def test_prefix_in_the_parameters_precedes_every_document(tiny: Writer):
    prefix, prompt = (9, 33, 2), [4, 60]
    expected = continuation(tiny, [*prefix, *prompt], 30)
    params = add_prefix(tiny.config, tiny.plan, tiny.params, prefix)
    assert greedy(replace(tiny, params=params), prompt, 30) == expected


# Rows.


def documents(
    model: Writer,
    prompts: list[list[int]],
    first: int,
    length: int,
    stop: Collection[int],
    bos: int | None,
) -> list[int]:
    """A row as its definition says, by the full forward."""
    row: list[int] = []
    while len(row) < length:
        prompt = prompts[first % len(prompts)]
        text = prompt + continuation(model, prompt, length, stop)
        row += text[1:] if prompt[0] == bos else text
        first += 1
    return row[:length]


@pytest.mark.slow
@pytest.mark.parametrize("bos", [None, 1])
def test_rows_are_whole_documents_one_after_another(tiny: Writer, bos):
    # Prompts hold stop tokens, which end nothing there; one is BOS alone, one exceeds the row.
    prompts = [[1], [1, 50, 8], [8, 50], [8], [3] * 70]
    # Every eighth token stops, so that documents end soon but not all at once.
    stop = range(0, 96, 8)
    rows = sample(tiny, prompts, 60, Drawing(0, temperature=0.0, stop=stop, bos=bos))
    expected = [documents(tiny, prompts, i, 60, stop, bos) for i in range(5)]
    assert rows.tolist() == expected
    assert rows.dtype == np.int32
    # The case is no empty one: rows begin several documents.
    assert sum(np.isin(rows[0], list(stop))) >= 2


@pytest.mark.slow
def test_a_row_of_all_positions(tiny: Writer):
    rows = sample(tiny, [[1], [2]], 128, replace(GREEDY, bos=1))
    assert rows[0].tolist() == continuation(tiny, [1], 128)
    assert rows[1].tolist() == [2, *continuation(tiny, [2], 127)]
    assert sample(tiny, [[5]], 1, Drawing(0)).tolist() == [[5]]


@pytest.mark.slow
def test_more_rows_than_a_batch(tiny: Writer):
    prompts = [[i, i + 1] for i in range(TOGETHER + 1)]
    rows = sample(tiny, prompts, 12, GREEDY)
    assert rows.shape == (TOGETHER + 1, 12)
    for i in (0, 16, 17, TOGETHER):
        assert rows[i].tolist() == prompts[i] + continuation(tiny, prompts[i], 10)


@pytest.mark.slow
def test_no_more_rows_than_the_cache_may_take(tiny: Writer, monkeypatch):
    """A cache of 11 slots for 3 rows: the fourth row is another group's."""
    cfg, prompts = tiny.config, [[i] for i in range(4)]
    slot = 2 * 4 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim  # keys and values, float32
    monkeypatch.setattr(self_written, "CACHE_BYTES", 3 * 11 * slot)
    steps = []
    rows = sample(tiny, prompts, 12, GREEDY, lambda wrapped, n: steps.append(n) or wrapped)
    assert steps == [2 * 12]
    assert rows[3].tolist() == [3, *continuation(tiny, [3], 11)]


@pytest.mark.slow
def test_a_cache_of_bfloat16_is_one(model: Writer, monkeypatch):
    """On a GPU: it holds keys and values rounded to 8 bits of mantissa, and no more is lost."""
    ids = [1, 17, 5, 80, 3, 9, 2, 44]
    dec = decoder(model.config, model.plan, 1, cache=len(ids))
    tables, rounded = self_written._tables(dec), {}
    for kept in (jnp.float32, jnp.bfloat16):
        monkeypatch.setitem(self_written.CACHE, "cpu", kept)
        at = self_written._start(dec, jax.random.key(0), 0, 1, 1)
        logits = jnp.zeros(0)
        for position, token in enumerate(ids):
            step = {"position": position, "token": token}
            at = replace(at, **{n: jnp.asarray([x], jnp.int32) for n, x in step.items()})
            logits, at = next_logits(dec, model.params, tables, at)
        assert at.k.dtype == at.v.dtype == kept
        rounded[kept] = (np.asarray(logits), np.asarray(at.k[0], np.float32))
    (logits, k), (expected, exact) = rounded[jnp.bfloat16], rounded[jnp.float32]
    # Keys of the first layer have seen no cache: they differ by their own rounding, 2^-9.
    np.testing.assert_allclose(k, exact, rtol=2**-8, atol=1e-6)
    # Some layers of such roundings: .3% of the logits' size was seen.
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.01


@pytest.mark.slow
def test_seeds(tiny: Writer):
    prompts = [[1]] * (TOGETHER + 8)
    first = sample(tiny, prompts, 16, Drawing(3))
    np.testing.assert_array_equal(sample(tiny, prompts, 16, Drawing(3)), first)
    assert (sample(tiny, prompts, 16, Drawing(4)) != first).any()
    assert len(np.unique(first, axis=0)) == len(prompts)  # rows, and batches, differ


@pytest.mark.slow
def test_every_step_draws_anew(tiny: Writer):
    # So hot that all 96 tokens are equally likely: only the noise decides.
    rows = sample(tiny, [[1]] * TOGETHER, 100, Drawing(0, temperature=1e6))[:, 1:]
    repeated = (rows[:, 1:] == rows[:, :-1]).mean()
    assert repeated < 2 / 96
    assert len(np.unique(rows)) == 96


@pytest.mark.slow
def test_progress_counts_steps_and_changes_nothing(tiny: Writer):
    seen = []

    def progress(steps, total):
        for step in steps:
            yield step
            seen.append(step)
        seen.append(total)  # reached: a progress bar closes

    prompts = [[1]] * (TOGETHER + 1)
    rows = sample(tiny, prompts, 5, Drawing(0), progress)
    assert seen == [*range(10), 10]
    np.testing.assert_array_equal(rows, sample(tiny, prompts, 5, Drawing(0)))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_tokens_are_drawn_from_the_softmax(tiny: Writer, temperature):
    ids, count = jnp.asarray([11, 40], jnp.int32), 3200
    logits = full_forward(decoder(tiny.config, tiny.plan, 2), tiny.params, ids)[-1]
    p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    rows = sample(tiny, [[11, 40]] * count, 3, Drawing(0, temperature))
    observed = np.bincount(rows[:, 2], minlength=tiny.config.vocab_size)
    # Pearson's statistic has mean V - 1 and variance 2 (V - 1); 4 deviations.
    likely = p * count > 1
    statistic = np.sum((observed - p * count)[likely] ** 2 / (p * count)[likely])
    cells = int(likely.sum())
    assert cells > 20
    assert abs(statistic - cells) < 4 * np.sqrt(2 * cells)


# Calibration windows.


@pytest.mark.slow
def test_windows_begin_as_free_text_as_chats_and_as_plain_text_in_turn(tiny: Writer):
    tokenizer = characters(True, TEMPLATE)
    windows = calibration_windows(tiny, tokenizer, 2500, 100, 0)
    assert windows.shape == (25, 100)
    texts = [tokenizer.decode(row.tolist()) for row in windows]
    begun = [text for _, text in plain() if _knows(tokenizer, text)]
    known = [tokenizer.decode(tokenizer.encode(text)) for text in begun]  # of this vocabulary
    for i, text in enumerate(texts):
        chat, opener = f"U:{QUESTIONS[i // 3]}A:", known[i // 3]
        assert text.startswith(chat[:100]) == (i % 3 == 1)  # without BOS
        assert i % 3 != 2 or text.startswith(opener[:100])
    again = calibration_windows(tiny, tokenizer, 2500, 100, 0)
    np.testing.assert_array_equal(windows, again)
    # Free text continues BOS, as a prompt of BOS alone does.
    rows = sample(tiny, [[BOS]], 100, Drawing(0, stop=[EOS], bos=BOS))
    free = characters(True, None)
    np.testing.assert_array_equal(calibration_windows(tiny, free, 100, 100, 0), rows)


@pytest.mark.slow
def test_without_a_chat_template_plain_text_takes_the_chats_place(tiny: Writer):
    tokenizer = characters(False, None)
    windows = calibration_windows(tiny, tokenizer, 9 * 60, 60, 0)
    known = [tokenizer.decode(tokenizer.encode(text))[:60] for _, text in plain()[:6]]
    begun = [i for i in range(9) if i % 3]
    assert [
        tokenizer.decode(windows[i].tolist())[: len(k)] for i, k in zip(begun, known, strict=True)
    ] == known


@pytest.mark.slow
@pytest.mark.nightly
def test_windows_hold_at_least_the_tokens_asked_for(tiny: Writer):
    tokenizer = characters(True, None)
    for tokens, length, count in ((64, 32, 2), (65, 32, 3), (1, 32, 1)):
        assert calibration_windows(tiny, tokenizer, tokens, length, 0).shape == (count, length)


@pytest.mark.slow
def test_without_bos_text_begins_with_random_tokens(tiny: Writer):
    windows = calibration_windows(tiny, characters(False, None), 640, 20, 0)
    assert len(set(windows[:, 0].tolist())) > 16
    assert (calibration_windows(tiny, characters(False, None), 640, 20, 1) != windows).any()


@pytest.mark.slow
def test_texts_of_a_model_with_bos_begin_by_its_own_rule(tiny: Writer):
    """Qwen's BOS is the token that ends texts: none of its texts begins with it."""
    made = replace(characters(True, None), adds_bos=False)
    windows = calibration_windows(tiny, made, 640, 20, 0)
    without = calibration_windows(tiny, characters(False, None), 640, 20, 0)
    first, others = windows[:, 0], without[:, 0]
    assert (first == others).mean() > 0.9  # but where the random token is BOS
    assert len({*first.tolist()}) > 16


# Errors.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [
        ([[1], []], 8, "prompt 1: no tokens; expected at least one"),
        ([[1, 96]], 8, "prompt 0: token 96 is outside the vocabulary; expected 0 to 95"),
        ([[1], [-1]], 8, "prompt 1: token -1 is outside"),
        ([[1]], 129, "expected at most the model's 128"),
    ],
)
def test_errors(tiny: Writer, prompts, length, message):
    with pytest.raises(UserError, match=message):
        sample(tiny, prompts, length, Drawing(0))
