"""Prompts begin with BOS by the model's own rule, texts end where turns end, pieces join up."""

import numpy as np
import pytest
import spm_definition as spm
import tokenizers
from model_files import gguf_metadata

from qnpu_jax.errors import UserError
from qnpu_jax.models import Tokenizer
from qnpu_jax.models.gguf_tokenizer import gguf_tokenizer
from qnpu_jax.runtime import Sampling, Session, generate_ids, prompt_ids, text_pieces
from qnpu_jax.text.files import default_text

BOS, A, B = 0, 1, 2
PRINTS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
SILENT = PRINTS.removeprefix("{{ bos_token }}")
SPELLS = "<s>" + SILENT
CHAT = [{"role": "user", "content": "ab"}]


def letters(adds_bos: bool, template: str | None = None, bos: bool = True) -> Tokenizer:
    """Tokens <s>, a, b and the ends x and y."""
    vocab = {"<s>": BOS, "a": A, "b": B, "x": 3, "y": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.add_special_tokens(["<s>"])
    backend.decoder = tokenizers.decoders.Fuse()
    ids = [BOS if bos else None]
    return Tokenizer.build(backend, ids, [3, 4], template, "letters", adds_bos=adds_bos)


@pytest.mark.parametrize(
    ("adds", "template", "with_bos", "without"),
    [
        (True, None, [BOS, A, B], [A, B]),
        (False, None, [A, B], [A, B]),
        (True, PRINTS, [BOS, A, B], [A, B]),
        (False, PRINTS, [BOS, A, B], [A, B]),
        (True, SILENT, [BOS, A, B], [A, B]),
        (False, SILENT, [A, B], [A, B]),
        (True, SPELLS, [BOS, A, B], [A, B]),
        # A model that does not begin texts with BOS may begin turns with it, as SmolLM2 does.
        (False, SPELLS, [BOS, A, B], [BOS, A, B]),
    ],
)
def test_prompts_begin_with_bos_once(adds, template, with_bos, without):
    tokenizer = letters(adds, template)
    prompt = "ab" if template is None else CHAT
    assert prompt_ids(tokenizer, prompt, bos=True) == with_bos
    assert prompt_ids(tokenizer, prompt, bos=False) == without


def test_a_model_without_bos():
    assert not letters(True, bos=False).adds_bos
    assert prompt_ids(letters(True, bos=False), "ab", bos=True) == [A, B]


def test_text_cannot_spell_bos():
    assert BOS not in prompt_ids(letters(False), "<s>ab", bos=True)
    assert prompt_ids(letters(True), "<s>ab", bos=True).count(BOS) == 1


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_that_is_no_utf_8(chat):
    text = "x" * 90 + "\udce9"
    prompt = [{"role": "user", "content": text}] if chat else text
    with pytest.raises(UserError, match=r"^text '.*\\udce9': holds half of a surrogate pair"):
        prompt_ids(letters(True, PRINTS), prompt, bos=True)


class Scripted(Session):
    """A session that answers with given tokens, one after the other."""

    logit_scale, room = 1.0, 99  # type: ignore[assignment]

    def __init__(self, answer):
        self.answer = iter(answer)

    def feed(self, ids):
        return np.eye(5, dtype=np.int8)[next(self.answer)]


@pytest.mark.parametrize("end", [3, 4])
def test_every_end_ends_a_text(end):
    tokenizer = letters(True)
    answer = Scripted([A, B, end, A])
    made = generate_ids(answer, [BOS], Sampling(), 9, tokenizer.eos_ids)
    assert [*made] == [A, B]


def test_a_text_goes_on_with_its_space():
    """SentencePiece leaves out the space before a text, but not one in its middle."""
    text = " ".join(default_text()[:3_000].split())
    tokenizer = gguf_tokenizer(gguf_metadata(spm.metadata(text, size=200)))
    ids, cut = tokenizer.encode(text), 100
    before, after = ids[:cut], ids[cut:]
    begun = tokenizer.decode(before)
    assert begun + "".join(text_pieces(iter(after), tokenizer, before)) == text
    spaces = [i for i in range(len(ids)) if tokenizer.decode([0, ids[i]]).startswith("<unk> ")]
    at = next(i for i in spaces if i > 50)
    whole = "".join(text_pieces(iter(ids[at:]), tokenizer, ids[:at]))
    assert whole.startswith(" ")
    assert "".join(text_pieces(iter(ids[at:]), tokenizer)) == whole.removeprefix(" ")
    assert [*text_pieces(iter([]), tokenizer, ids)] == []
