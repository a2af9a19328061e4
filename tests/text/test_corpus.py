"""Documents cut out of rows: by hand, and of a model that writes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from characters import BOS, EOS, TEMPLATE, characters
from model_files import GOLDEN

from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text import files
from qnpu_jax.text.corpus import LEAST_DISTINCT, Written, corpus, distinct, split
from qnpu_jax.text.prompts import CHAT, FREE, Prompt, prompts_of
from qnpu_jax.text.self_written import Drawing, Writer, sample
from qnpu_jax.transform.fold import fold_norms

ASKED = (("user", "Why?"),)
PROMPTS = [Prompt(FREE, [5]), Prompt("code", [9, 6, 7]), Prompt(CHAT, [9, 8], ASKED)]
STOP = (0,)


@pytest.fixture(scope="module")
def tiny() -> Writer:
    config, params = load_params(GOLDEN / "mha_tied")
    params = {k: jnp.asarray(x) for k, x in fold_norms(config, params).items()}
    return Writer(config, RECIPES["w8a8"].bits, params)


def test_documents_by_hand():
    rows = np.asarray([[5, 1, 2, 0, 6, 7, 3, 0], [6, 7, 0, 8, 4, 4, 4, 4]], np.int32)
    found = list(split(rows, PROMPTS, STOP, bos=9))
    assert found == [
        Written(PROMPTS[0], (5, 1, 2), (1, 2)),
        Written(PROMPTS[1], (6, 7, 3), (3,)),  # its BOS stands in no row
        # Row 1 began with prompt 1, which had no answer; then prompt 2, until the row is full.
        Written(PROMPTS[2], (8, 4, 4, 4, 4), (4, 4, 4, 4)),
    ]


def test_a_stop_token_in_a_prompt_ends_nothing():
    prompt = [Prompt(CHAT, [3, 0, 4], ASKED)]
    rows = np.asarray([[3, 0, 4, 8, 0, 3]], np.int32)
    assert [w.answer for w in split(rows, prompt, STOP, bos=None)] == [(8,)]


def test_documents_of_a_model_are_its_rows_cut_apart(tiny: Writer):
    """Each begins with its prompt, holds no end, and they follow each other without a gap."""
    tokenizer = characters(True, TEMPLATE)
    prompts = [p for p in prompts_of(tokenizer, 40, 0) if len(p.ids) < 40]
    rows = sample(tiny, [p.ids for p in prompts], 128, Drawing(0, stop=[EOS], bos=BOS))
    count = 0
    for b, row in enumerate(rows.tolist()):
        at = 0
        for written in split(rows[b : b + 1], prompts[b:] + prompts[:b], [EOS], BOS):
            shown = [i for i in written.prompt.ids if i != BOS]
            assert written.ids == (*shown, *written.answer) and EOS not in written.answer
            at = row.index(written.ids[0], at)  # a document without an answer may stand between
            assert list(written.ids) == row[at : at + len(written.ids)]
            at += len(written.ids) + 1
            count += 1
        longest = max(len(p.ids) for p in prompts)
        assert len(row[at:]) <= longest  # a prompt that filled the row, if anything
    assert count > 12  # some documents ended within their rows


def test_loops_and_repeats_are_left_out():
    tokenizer = characters(True, None)
    told = tuple(tokenizer.encode("the quick brown fox jumps over it"))
    loop = tuple(tokenizer.encode("ab" * 20))
    assert distinct(loop) < LEAST_DISTINCT < distinct(told)
    padding = (*told, tokenizer.vocab_size)  # a token that only a padded table has
    some = [told, told, loop, tuple(tokenizer.encode("   ")), padding]
    found = corpus([Written(PROMPTS[0], ids, ids) for ids in some], tokenizer)
    assert [line["text"] for line in found.lines] == [tokenizer.decode(told)]
    share = found.shares[FREE]
    assert (share.documents, share.tokens, share.loops, share.repeats) == (1, len(told), 1, 3)


def test_a_file_is_read_as_it_was_written(tmp_path):
    """Chats come back through the model's template, plain text as text."""
    template = TEMPLATE + "{{ messages[1].content if messages|length > 1 }}"
    tokenizer = characters(False, template)
    told, answer = tokenizer.encode("once upon"), tokenizer.encode("because")
    chat = Prompt(CHAT, tokenizer.encode("U:Why?A:"), ASKED)
    written = [
        Written(Prompt(FREE, told[:1]), tuple(told), tuple(told[1:])),
        Written(chat, (*chat.ids, *answer), tuple(answer)),
    ]
    lines = corpus(written, tokenizer).lines
    assert lines[1]["messages"][1] == {"role": "assistant", "content": "because"}
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = files.tokenize(files.read_text(path), tokenizer, 96, "own.jsonl")
    assert ids == [*told, *chat.ids, *answer]


def test_whole_chats_are_written():
    """System prompt and earlier turns come back through the template, as they went in."""
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    tokenizer = characters(False, template)
    asked = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))
    begun = tokenizer.encode("s:Be brief.;u:Hi;a:Yes?;u:Why?;")
    answer = tokenizer.encode("because")
    written = Written(Prompt("turns", begun, asked), (*begun, *answer), tuple(answer))
    (line,) = corpus([written], tokenizer).lines
    turns = [(m["role"], m["content"]) for m in line["messages"]]
    assert turns == [*asked, ("assistant", "because")] and line["domain"] == "turns"
    assert tokenizer.chat(line["messages"], answer_next=False)[: len(begun)] == begun
