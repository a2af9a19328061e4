"""Byte-level BPE of GGUF files: how text is cut, whether it begins with BOS, what ends a turn."""

import pytest
from model_files import gguf_metadata
from tokenizers import decoders, pre_tokenizers

from qnpu_jax.models.checkpoint import resolve
from qnpu_jax.models.gguf_file import open_gguf
from qnpu_jax.models.gguf_pre_tokenizers import PRE_TOKENIZERS
from qnpu_jax.models.gguf_tokenizer import gguf_tokenizer
from qnpu_jax.models.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<think>"]
TEXT = "I'll NOT'VE 12345!!\n\n   x_y HTMLPage don'T <a>$5\t你好a"
SPLITS = {
    "default": "I|'|ll| NOT|'|VE| |123|45|!!|⏎⏎  | x|_|y| HTMLPage| don|'|T| |<|a|>$|5|→|你好a",
    "gpt-2": "I|'ll| NOT|'|VE| 12345|!!|⏎⏎  | x|_|y| HTMLPage| don|'|T| <|a|>$|5|→|你好a",
    "smollm": "I|'ll| NOT|'|VE| |1|2|3|4|5|!!|⏎⏎  | x|_|y| HTMLPage| don|'|T| <|a|>$|5|→|你好a",
    "llama-bpe": "I|'ll| NOT|'VE| |123|45|!!⏎⏎|  | x|_y| HTMLPage| don|'T| <|a|>$|5|→你好a",
    "dbrx": "I|'ll| NOT|'VE| |123|45|!!⏎⏎|  | x|_y| HTMLPage| don|'T| <|a|>$|5|→你好a",
    "qwen2": "I|'ll| NOT|'VE| |1|2|3|4|5|!!⏎⏎|  | x|_y| HTMLPage| don|'T| <|a|>$|5|→你好a",
    "tekken": "I|'ll| NOT|'VE| |1|2|3|4|5|!!⏎⏎|  | x|_y| HTMLPage| don|'T| <|a|>$|5|→你好a",
    "gpt-4o": "I'll| NOT'VE| |123|45|!!⏎⏎|  | x|_y| HTMLPage| don'T| <|a|>$|5|→你好a",
    "falcon": "I|'|ll| NOT|'|VE| |123|45|!!|⏎⏎  | x|_|y| HTMLPage| don|'|T| |<|a|>$|5|→|你好a",
    "deepseek-llm": (
        "I|'|ll| NOT|'|VE| |12345|!!|⏎|⏎|  | x|_|y| HTMLPage| don|'|T| <|a|>$|5|→|你好|a"
    ),
    "deepseek-coder": (
        "I|'|ll| NOT|'|VE| |1|2|3|4|5|!!|⏎|⏎|  | x|_|y| HTMLPage| don|'|T| <|a|>$|5|→|你好|a"
    ),
    "deepseek-v3": ("I|'ll| NOT|'VE| |123|45|!!⏎⏎|  | x|_y| HTMLPage| don|'T| <|a|>$|5|→|你好|a"),
    "seed-coder": ("I|'ll| NOT|'VE| |1|2|3|4|5|!!|⏎⏎|  | x|_y| HTMLPage| don|'T| <|a|>$|5|→你好a"),
    "bloom": "I'll| NOT'VE| 12345|!!⏎⏎  | x_y| HTMLPage| don'T| <a>$5|→|你好a",
}
SAME = {"starcoder": "smollm", "command-r": "smollm", "olmo": "gpt-2", "llama4": "gpt-4o"}
SAME |= {"llama3": "llama-bpe", "glm4": "dbrx", "megrez": "qwen2", "hunyuan-dense": "deepseek-v3"}


@pytest.mark.parametrize("pre", [*SPLITS, *SAME])
def test_pre_tokenizers(pre):
    pieces = [piece for piece, _ in PRE_TOKENIZERS[pre].build().pre_tokenize_str(TEXT)]
    spelled = "|".join(decoders.ByteLevel().decode([piece]) for piece in pieces)
    assert spelled.translate(str.maketrans("\n\t", "⏎→")) == SPLITS[SAME.get(pre) or pre]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_no_text_is_lost(pre):
    text = TEXT + " e\u0301 ½ 😀👍🏽\r\n  \u00a0\u3000 Ωǅ \x00 12 1234567 ⅷ Ⴀ𐐀"
    made = tokenizer(pre=pre)
    composed = text.replace("e\u0301", "é") if PRE_TOKENIZERS[pre].composes else text
    assert made.decode(made.encode(text)) == composed


def test_capitals_are_cut_as_by_tekken_and_gpt_4o():
    for pre in ("tekken", "gpt-4o"):
        pieces = PRE_TOKENIZERS[pre].build().pre_tokenize_str("camelCase ÄÖ öÄ")
        spelled = [decoders.ByteLevel().decode([piece]) for piece, _ in pieces]
        assert spelled == ["camel", "Case", " ÄÖ", " ö", "Ä"]


def metadata(**change) -> dict:
    """A vocabulary of bytes, a few merges and special tokens, as a GGUF file holds it."""
    tokens = [*ALPHABET, "Ġa", "Ġab", *CONTROLS]
    plain = len(tokens) - len(CONTROLS)
    given = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": ["Ġ a", "Ġa b"],
        "token_type": [1] * plain + [3] * (len(CONTROLS) - 1) + [4],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }
    keyed = {f"tokenizer.ggml.{k}": v for k, v in (given | change).items() if v is not None}
    return keyed | {"tokenizer.chat_template": change.get("template")}


def tokenizer(**change) -> Tokenizer:
    return gguf_tokenizer(gguf_metadata(metadata(**change)))


def test_a_composed_accent_is_qwens_alone():
    accents = "cafe\u0301", "caf\u00e9"
    for pre, same in (("qwen2", True), ("llama-bpe", False), ("default", False)):
        made = tokenizer(pre=pre)
        assert (made.encode(accents[0]) == made.encode(accents[1])) == same


def test_without_a_name_it_is_the_default():
    assert tokenizer(pre=None).encode("a 123") == tokenizer(pre="default").encode("a 123")


# BOS.


@pytest.mark.parametrize(
    ("change", "adds"),
    [
        ({}, False),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "qwen2"}, False),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"add_bos_token": True}, True),
        ({"add_bos_token": True, "bos_token_id": None}, False),
    ],
)
def test_whether_a_text_begins_with_bos(change, adds, tmp_path):
    made = tokenizer(**change)
    assert made.adds_bos == adds
    bos = [made.bos_id] if adds else []
    assert made.backend.encode(" ab").ids == [*bos, len(ALPHABET) + 1]
    made.save(tmp_path)
    assert Tokenizer.load(tmp_path).adds_bos == adds


def test_smollm2_does_not():
    assert not gguf_tokenizer(open_gguf(resolve("smollm2-135m"))).adds_bos


# Ends of turns.

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def ends(**change) -> list[str | None]:
    made = tokenizer(**change)
    return [made.backend.id_to_token(i) for i in made.eos_ids]


def test_ends_of_turns_by_their_text():
    """Converters that name eos alone: llama.cpp knows these tokens by their text."""
    assert ends() == ["</s>", "<|eot_id|>", "<|im_end|>", "<|end|>"]
    assert ends(eot_token_id=metadata()["tokenizer.ggml.tokens"].index("<|end|>"))[:2] == [
        "</s>",
        "<|end|>",
    ]
    assert ends(tokens=[*metadata()["tokenizer.ggml.tokens"], "<|call|>", "<|return|>"])[-1] == (
        "<|im_end|>"
    )


def test_an_end_of_another_type_is_special_too():
    types = metadata()["tokenizer.ggml.token_type"]
    made = tokenizer(token_type=[1] * len(types))
    end = made.backend.token_to_id("<|im_end|>")
    assert end in made.eos_ids
    assert end not in made.encode("<|im_end|>")
    assert made.backend.encode("<|im_end|>").ids == [end]


def test_the_template_shows_what_ends_a_turn():
    tokens = [t.replace("<|im_end|>", "<fin>") for t in metadata()["tokenizer.ggml.tokens"]]
    assert "<fin>" not in ends(tokens=tokens)
    assert "<fin>" in ends(tokens=tokens, template=CHATML.replace("<|im_end|>", "<fin>"))


def test_special_tokens_by_their_names():
    made = tokenizer(unknown_token_id=0, padding_token_id=257)
    assert made.special == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "!",
        "pad_token": "Ġab",
    }
