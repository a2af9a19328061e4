"""SentencePiece of GGUF files: the library's merges give the ids of SentencePiece's definition."""

import time

import gguf
import pytest
import spm_definition as spm
from model_files import gguf_metadata, write_gguf

from qnpu_jax.errors import UserError
from qnpu_jax.models.gguf_file import open_gguf
from qnpu_jax.models.gguf_sentencepiece import merges_by_score
from qnpu_jax.models.gguf_tokenizer import gguf_tokenizer
from qnpu_jax.models.tokenizer import Tokenizer
from qnpu_jax.text.files import default_text

TEXT = default_text()


def tokenizer(metadata: dict) -> Tokenizer:
    return gguf_tokenizer(gguf_metadata(metadata))


@pytest.fixture(scope="module")
def small() -> dict:
    return spm.metadata(TEXT[:20_000])


@pytest.mark.parametrize("prefix", [True, False])
def test_the_ids_are_those_of_the_definition(small, prefix):
    metadata = small | {"tokenizer.ggml.add_space_prefix": prefix}
    merger, made = spm.Merger(metadata), tokenizer(metadata)
    for text in (*spm.HARD, TEXT[20_000:60_000]):
        assert made.encode(text) == merger.encode(text), text[:40]
    assert len(set(made.encode(TEXT[20_000:60_000]))) > 400  # of a real text, not of bytes


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", spm.HARD)
def test_decode_inverts_encode(small, prefix, text):
    made = tokenizer(small | {"tokenizer.ggml.add_space_prefix": prefix})
    expected = text.replace(spm.SPACE, " ")  # of a real one, SentencePiece makes a space too
    for piece in spm.WHOLE if prefix else ():
        if piece in text:
            pytest.skip("a space is put after pieces that are matched whole")
    assert made.decode(made.encode(text)) == expected


def test_the_definition_itself():
    """Two merges that compete: the one of the higher score wins, from the left."""
    pieces = ["<unk>", "a", "b", "c", "ab", "bc"]
    for scores, expected in (((-2, -1), ["a", "bc"]), ((-1, -2), ["ab", "c"])):
        given = [0.0, 0.0, 0.0, 0.0, *map(float, scores)]
        keys = {"tokens": pieces, "scores": given, "token_type": [2, 1, 1, 1, 1, 1]}
        metadata = {f"tokenizer.ggml.{k}": v for k, v in keys.items()}
        metadata |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.model": "llama"}
        assert spm.Merger(metadata).encode("abc") == [pieces.index(p) for p in expected]
        assert tokenizer(metadata).encode("abc") == [pieces.index(p) for p in expected]


def test_special_pieces(small):
    made = tokenizer(small)
    pieces = small["tokenizer.ggml.tokens"]
    assert (made.bos_id, made.eos_ids, made.adds_bos) == (1, (2,), True)  # llama.cpp's defaults
    assert made.special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert not {0, 1, 2} & {*made.encode("<s> </s> <unk>")}  # text cannot spell control pieces
    assert pieces.index("[INST]") in made.encode("a [INST] b")
    assert made.backend.encode("x").ids[0] == 1  # what `save` writes begins texts with BOS
    assert not tokenizer(small | {"tokenizer.ggml.add_bos_token": False}).adds_bos
    other = tokenizer(small | {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eot_token_id": 1})
    assert (other.bos_id, other.eos_ids) == (2, (2, 1))


def test_saved_and_read_again(small, tmp_path):
    made = tokenizer(small)
    made.save(tmp_path)
    back = Tokenizer.load(tmp_path)
    for text in spm.HARD:
        assert back.encode(text) == made.encode(text)
    assert (back.bos_id, back.eos_ids, back.adds_bos) == (1, (2,), True)
    assert back.special == made.special


def test_a_gguf_file(tmp_path):
    """Read from the file, not from a dictionary."""
    pieces = ["<unk>", "<s>", "</s>", "▁a", "a", "▁", *(f"<0x{b:02X}>" for b in range(90))]

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * 96)
        writer.add_token_types([2, 3, 3, 1, 1, 1, *[6] * 90])

    made = gguf_tokenizer(open_gguf(write_gguf(tmp_path / "m.gguf", "mha_tied", extra)))
    assert made.encode("a aa\n") == [3, 3, 4, 6 + 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing; expected pieces, their scores"),
        ({"token_type": [1]}, "scores and 1 types; expected as many of each"),
        ({"bos_token_id": 10**6}, "special token id 1000000 is outside the vocabulary"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; expected 'gpt2' (byte-level BPE) or 'll"),
    ],
)
def test_broken(small, change, message):
    with pytest.raises(UserError) as error:
        tokenizer(small | {f"tokenizer.ggml.{k}": v for k, v in change.items()})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_vocabulary_of_gemmas_size_takes_seconds():
    words = sorted({TEXT[i : i + n] for n in range(1, 12) for i in range(60_000)})[:262_144]
    assert len(words) > 250_000
    scores = [-float(i) for i in range(len(words))]
    began = time.process_time()
    merges = merges_by_score(words, scores, [1] * len(words))
    assert len(merges) > 400_000
    assert time.process_time() - began < 20
