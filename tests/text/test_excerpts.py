"""Which text a run uses for what: no token serves two ends that must not meet."""

import dataclasses
import hashlib

import numpy as np
import pytest
from workspace import VOCAB, request, workspace

from qnpu_jax import pipeline
from qnpu_jax.errors import UserError
from qnpu_jax.models.checkpoint import load
from qnpu_jax.recipes import Effort, Stage
from qnpu_jax.text import excerpts, files
from qnpu_jax.text.windows import Windows

EFFORT = Effort("tiny", steps=4, length=48, tokens=500, held_out=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return workspace(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load(str(folder / "model"))


@pytest.fixture(scope="module")
def recipe(folder):
    return request(folder).recipe


def ids_of(checkpoint, text: str) -> np.ndarray:
    return np.asarray(checkpoint.tokenizer.encode(text))


def test_given(folder, checkpoint, recipe):
    path = folder / "text.txt"
    ids = ids_of(checkpoint, path.read_text())
    calibration, learning, end = excerpts.given(str(path), checkpoint, recipe, EFFORT)
    assert learning is not None
    assert calibration.windows.shape == (4, 32)
    assert learning.windows.shape == (10, 48)
    assert end is not None
    np.testing.assert_array_equal(end.windows.ravel(), ids[-144:])
    assert learning.windows.size + end.windows.size <= len(ids)
    for excerpt in (calibration, learning):
        np.testing.assert_array_equal(excerpt.windows.ravel(), ids[: excerpt.windows.size])
        assert excerpt.source == "text.txt"
    assert excerpts.given(path, checkpoint, recipe, None)[1:] == (None, None)
    (folder / "forty.txt").write_text("abcd " * 10)
    with pytest.raises(
        UserError, match=r"forty\.txt: \d+ tokens are too few; expected at least 48"
    ):
        excerpts.given(folder / "forty.txt", checkpoint, recipe, EFFORT)


def test_documents_are_a_file_with_blank_lines_between(folder, checkpoint, recipe):
    (folder / "two.txt").write_text("abcd " * 100 + "\n\n" + "efgh " * 100)
    documents = excerpts.given(["abcd " * 100, "efgh " * 100], checkpoint, recipe, EFFORT)
    as_file = excerpts.given(folder / "two.txt", checkpoint, recipe, EFFORT)
    for got, expected in zip(documents[:2], as_file[:2], strict=True):
        assert got is not None and expected is not None
        assert (got.source, got.sha256) == ("text", expected.sha256)
        np.testing.assert_array_equal(got.windows, expected.windows)


def test_windows_calibrate_as_they_are_and_are_learned_from_as_one_text(checkpoint, recipe):
    windows = (np.arange(600) % VOCAB).astype(np.int32).reshape(30, 20)
    calibration, learning, end = excerpts.given(windows, checkpoint, recipe, EFFORT)
    assert recipe.calibration_tokens == 128  # six windows of twenty
    np.testing.assert_array_equal(calibration.windows, windows[:6])
    assert learning is not None
    np.testing.assert_array_equal(learning.windows, windows.ravel()[:480].reshape(10, 48))
    assert end is not None, "an eighth of twelve windows"
    np.testing.assert_array_equal(end.windows, windows.ravel()[None, -48:])
    with pytest.raises(UserError, match="windows: 40 tokens are too few; expected at least 48"):
        excerpts.given(windows[:2], checkpoint, recipe, EFFORT)


@pytest.mark.parametrize("tokens", [10, 500, 10**9])
def test_written(checkpoint, recipe, monkeypatch, tokens):
    """Twice the same text, in windows of both lengths, neither of which divides the other; its end
    is not learned from."""
    asked = []
    effort = Effort("tiny", steps=4, length=48, tokens=tokens, own_tokens=2000, held_out=3)

    def write(writer, tokenizer, tokens, length, seed, progress):
        asked.append((tokens, length, seed))
        return np.arange(-(-tokens // length) * length, dtype=np.int32).reshape(-1, length)

    monkeypatch.setattr("qnpu_jax.text.self_written.calibration_windows", write)
    calibration, learning, end = excerpts.written(checkpoint, {}, recipe, effort, lambda s, _: s)
    assert asked == [(max(128 + 3 * 48, min(tokens, 2000)), 48, recipe.seed)]
    np.testing.assert_array_equal(calibration.windows, np.arange(128).reshape(4, 32))
    assert learning is not None
    assert learning.windows.shape == ({10: 1, 500: 10, 10**9: 39}[tokens], 48)
    np.testing.assert_array_equal(learning.windows.ravel(), np.arange(learning.windows.size))
    assert (end is None) == (tokens == 10), "four windows: an eighth is none"
    if end is not None:
        assert end.windows.min() > learning.windows.max()
        assert end.source == "written by the model"
    asked.clear()
    calibration, learning, end = excerpts.written(checkpoint, {}, recipe, None, lambda s, _: s)
    assert asked == [(128, 32, recipe.seed)]
    assert learning is None and end is None


def test_a_pool_to_choose_from(folder, checkpoint, recipe, monkeypatch):
    """It begins as the windows do that it replaces; where it holds no more, nothing is chosen."""
    wide = dataclasses.replace(recipe, calibration_pool=320)
    path, ids = folder / "text.txt", (np.arange(600) % VOCAB).astype(np.int32).reshape(30, 20)

    def write(writer, tokenizer, tokens, length, seed, progress):
        return np.arange(-(-tokens // length) * length, dtype=np.int32).reshape(-1, length)

    monkeypatch.setattr("qnpu_jax.text.self_written.calibration_windows", write)
    for source, length in ((path, 32), (ids, 20), (None, 32)):
        for effort in (None, EFFORT):
            if source is None:
                made = excerpts.written(checkpoint, {}, wide, effort, lambda s, _: s)
            else:
                made = excerpts.given(source, checkpoint, wide, effort)
            calibration, judges = made[0], excerpts.judged(checkpoint, effort)
            windows = excerpts.windows_of(*made, judges)
            assert windows.pool.shape == (320 // length, length)
            assert len(windows.learning) == (0 if effort is None else 10)
            assert calibration.windows.shape == (128 // length, length)
            np.testing.assert_array_equal(windows.pool[: 128 // length], windows.calibration)
            assert calibration.to_json()["pool"] == windows.pool.size
            assert calibration.digest() != dataclasses.replace(calibration, pool=None).digest()
    few, _, _ = excerpts.given(ids[:6], checkpoint, wide, None)
    assert few.pool is None and len(few.windows) == 6


@pytest.mark.parametrize("kind", ["file", "windows", "written"])
def test_nothing_reads_the_end_that_judges(folder, checkpoint, recipe, monkeypatch, kind):
    """Ranges and GPTQ would fit it: asked for more than there is, they take all but the end."""
    greedy = dataclasses.replace(
        recipe, calibration_tokens=10**6, stages=(Stage(gptq=True, gptq_tokens=10**6),)
    )
    ids = np.arange(1200, dtype=np.int32)  # every token once, so that windows show where they lie
    monkeypatch.setattr(
        "qnpu_jax.text.self_written.calibration_windows", lambda *_: ids.reshape(25, 48)
    )
    monkeypatch.setattr(files, "tokenize", lambda *_: ids.tolist())
    if kind == "written":
        made = excerpts.written(checkpoint, {}, greedy, EFFORT, lambda s, _: s)
    else:
        source = folder / "text.txt" if kind == "file" else ids.reshape(60, 20)
        made = excerpts.given(source, checkpoint, greedy, EFFORT)
    assert made.end is not None and made.learning is not None
    assert made.end.windows.ravel().tolist() == list(range(1056, 1200))
    read = [made.calibration.windows, made.learning.windows]
    read += [] if made.calibration.pool is None else [made.calibration.pool]
    assert max(x.max() for x in read) < 1056
    assert made.calibration.windows.max() >= 1020, "all that is left"


@pytest.mark.parametrize("length", [384, 390, 431, 432])
def test_the_end_leaves_a_window_to_calibrate_with(checkpoint, recipe, length):
    """Eight windows to learn from, whose last one is the end where that leaves enough."""
    ids = np.arange(2 * length, dtype=np.int32).reshape(2, length)[:1] % VOCAB
    made = excerpts.given(ids, checkpoint, recipe, EFFORT)
    np.testing.assert_array_equal(made.calibration.windows, ids)
    assert made.end is None and made.learning is not None
    shorter = dataclasses.replace(recipe, calibration_length=length - 48)
    text = excerpts.Tokens("a", "a", "", ids.ravel().tolist())
    made = excerpts._material(text, shorter.calibration_length, shorter, EFFORT)
    assert made.end is not None and made.calibration.windows.shape == (1, length - 48)


def test_a_pool_for_gptq(folder, checkpoint, recipe, monkeypatch):
    """Of a text as much as it has; of the model's own no more is written for it."""
    stage = Stage(gptq=True, gptq_tokens=320)
    wide = dataclasses.replace(recipe, stages=(stage,))
    asked = []

    def write(writer, tokenizer, tokens, length, seed, progress):
        asked.append(tokens)
        return np.arange(-(-tokens // length) * length, dtype=np.int32).reshape(-1, length)

    monkeypatch.setattr("qnpu_jax.text.self_written.calibration_windows", write)
    calibration, _, _ = excerpts.given(folder / "text.txt", checkpoint, wide, None)
    assert calibration.pool is not None and calibration.pool.shape == (10, 32)
    np.testing.assert_array_equal(calibration.pool[:4], calibration.windows)
    for effort, tokens, windows in ((None, 128, None), (EFFORT, 500, 10)):
        calibration, _, _ = excerpts.written(checkpoint, {}, wide, effort, lambda s, _: s)
        assert asked.pop() == tokens
        assert (None if calibration.pool is None else len(calibration.pool)) == windows
        assert calibration.windows.shape == (4, 32)


@pytest.mark.slow
def test_written_by_a_model(checkpoint, recipe):
    params = pipeline.prepare(checkpoint.config, checkpoint.params, recipe)
    found = excerpts.written(checkpoint, params, recipe, EFFORT, lambda s, _: s)
    calibration, learning = found.calibration, found.learning
    assert learning is not None
    assert learning.windows.shape == (10, 48)
    assert (learning.windows < VOCAB).all()
    np.testing.assert_array_equal(learning.windows.ravel()[:128], calibration.windows.ravel())
    assert learning.source == "written by the model"


@pytest.mark.slow
def test_scored_and_judged(checkpoint):
    ids = ids_of(checkpoint, files.default_text())
    scored, (held_out, other) = excerpts.scored_and_judged(None, checkpoint, 16, 40, EFFORT)
    assert held_out is not None
    np.testing.assert_array_equal(other.windows, ids[-1024:].reshape(8, 128))
    np.testing.assert_array_equal(scored.windows, ids[:32].reshape(2, 16))
    np.testing.assert_array_equal(held_out.windows, ids[-144:].reshape(3, 48))
    assert excerpts.scored_and_judged(None, checkpoint, 16, 40, None)[1].held_out is None
    fits = len(ids) - 1024
    scored, _ = excerpts.scored_and_judged(None, checkpoint, 2, fits, EFFORT)
    assert scored.windows.size == fits // 2 * 2
    with pytest.raises(UserError, match=r"pydoc_data\.topics reach into its end") as error:
        excerpts.scored_and_judged(None, checkpoint, 2, fits + 2, EFFORT)
    assert f"expected at most {fits:,}; lower --eval-tokens, or give --eval-text" in str(
        error.value
    )


def test_judged_by_another_text_than_what_is_scored(folder, checkpoint):
    path = folder / "text.txt"
    scored, (held_out, other) = excerpts.scored_and_judged(path, checkpoint, 16, 10**6, EFFORT)
    assert scored.source == "text.txt"
    assert held_out is not None
    assert held_out.source == other.source == "pydoc_data.topics"
    assert held_out.windows.shape == (3, 48)


def excerpt(*shape: int) -> excerpts.Excerpt:
    windows = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    return excerpts.Excerpt("a", hashlib.sha256(b"a").hexdigest(), windows)


def test_all_texts_of_a_run():
    judges = excerpts.Judges(None, excerpt(5, 2))
    some = excerpts.Texts(excerpt(1, 4), excerpt(2, 6), None, None, judges)
    assert some.to_json().keys() == {"calibration", "held_out", "prefix"}
    assert (some.windows().learning.shape, some.windows().other.shape) == ((0, 6), (5, 2))
    judges = excerpts.Judges(excerpt(2, 4), excerpt(5, 2))
    every = excerpts.Texts(excerpt(1, 4), excerpt(2, 6), excerpt(3, 4), excerpt(1, 4), judges)
    assert every.to_json()["early_stopping"] == {
        "source": "a", "sha256": hashlib.sha256(b"a").hexdigest(), "tokens": 8
    }  # fmt: skip
    found: Windows = every.windows()
    assert [
        x.shape for x in (found.calibration, found.learning, found.held_out, found.other)
    ] == [
        (2, 6), (3, 4), (3, 4), (5, 2)
    ]  # fmt: skip
    assert found.domains == {"pydoc_data.topics": 2, "end of a": 1}
    assert every.digests().keys() == {"calibration", "learning", "end", "held_out", "other"}
    assert len(set(every.digests().values())) == 5


def test_the_same_tokens_in_other_windows_are_another_text():
    assert excerpt(3, 4).digest() == excerpt(3, 4).digest() != excerpt(4, 3).digest()
