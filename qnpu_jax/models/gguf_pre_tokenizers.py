"""Pre-tokenizers by their names in GGUF files: how a text is cut before byte-level BPE merges.

GGUF keeps only the name. A pre-tokenizer is a list of patterns, each of which cuts the pieces of
the one before into matches and what lies between. Where the model's own tokenizer.json is known to
hold another pattern than llama.cpp, which rewrites some for its own regex engine, that one counts.

Reference: llama.cpp src/llama-vocab.cpp, `llm_tokenizer_bpe` and `llama_vocab::impl::load`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True)
class PreTokenizer:
    """How a model cuts text, and what goes with it.

    Attributes:
      patterns: regular expressions, applied one after another.
      whole_words: a word that is in the vocabulary is one token even if no merges reach it.
      adds_bos: texts begin with BOS, unless the metadata say otherwise.
      composes: text is put in Unicode's form NFC first. Qwen's own tokenizer does so, llama.cpp
        does not: "e" with a combining accent gives the ids of "é" here and in transformers.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Makes the pre-tokenizer of library `tokenizers`."""
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in self.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, to_bytes])

    def normalizer(self) -> normalizers.Normalizer | None:
        """Makes the normalizer of library `tokenizers`; None where text stays as it is."""
        return normalizers.NFC() if self.composes else None


_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE = rf"(?i:{_ENDINGS})"
_GPT2 = rf"{_ENDINGS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_MARKS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_THREE = r"[0-9][0-9][0-9]"
_SENTENCES = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿ\u0386\u0388-\u038aΌ\u038e-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽ"
    "Ა-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57"
    "\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffcℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ"
    "\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻"
    "𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""Letters with a case, as the DeepSeek LLM's tokenizer lists them."""


def _cl100k(digits: str, endings: str = _ANY_CASE, word: str = rf"{_MARKS}\p{{L}}+") -> str:
    """Builds the pattern of Llama 3 (digits in threes), of Qwen 2 (single ones) and their kin."""
    return rf"{endings}|{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _o200k(digits: str, endings: str) -> str:
    """Builds the pattern of GPT-4o and of Mistral's Tekken, which cut before capitals."""
    title, capitals = f"{_MARKS}{_UPPER}*{_LOWER}+", f"{_MARKS}{_UPPER}+{_LOWER}*"
    words = f"{title}{endings}|{capitals}{endings}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_QWEN35 = (
    rf"{_ANY_CASE}|{_MARKS}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    rf"{_PUNCTUATED}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*"
    rf"|{_SPACES}",
)
_IDEOGRAPHS = "[一-龥ࠀ-一가-\ud7ff]+"
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = rf"{_ANY_CASE}|{_MARKS}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"

_KINDS = {
    "default": PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE),
    ),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4": (
        PreTokenizer((_GPT2,))
    ),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (
        PreTokenizer((r"\p{N}", _GPT2))
    ),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": (
        PreTokenizer((_cl100k(r"\p{N}{1,3}"),), whole_words=True, adds_bos=True)
    ),
    "dbrx smaug-bpe chatglm-bpe glm4": PreTokenizer((_cl100k(r"\p{N}{1,3}"),)),
    "qwen2": PreTokenizer((_cl100k(r"\p{N}"),), composes=True),
    "deepseek-r1-qwen kormo stablelm2 hunyuan solar-open megrez grok-2": (
        PreTokenizer((_cl100k(r"\p{N}"),))
    ),
    "qwen35": PreTokenizer((_QWEN35,), composes=True),
    "tekken": PreTokenizer((_o200k(r"\p{N}", ""),), whole_words=True, adds_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer((_o200k(r"\p{N}{1,3}", f"{_ANY_CASE}?"),)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            _IDEOGRAPHS,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer(_DEEPSEEK3),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILING,)),
    "seed-coder": PreTokenizer((_SEED,)),
    "bloom poro-chat gpt3-finnish": PreTokenizer((_SENTENCES,)),
    "viking": PreTokenizer((_SENTENCES, r"\p{N}")),
}

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    name: kind for names, kind in _KINDS.items() for name in names.split()
}
"""By values of tokenizer.ggml.pre."""
