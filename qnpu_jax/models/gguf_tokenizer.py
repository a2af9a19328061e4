"""Tokenizers of GGUF files, rebuilt from the metadata as byte-level BPE of library `tokenizers`.

GGUF keeps vocabulary, merges and token types. Of the pre-tokenizer, which cuts text before merging,
it keeps only a name; the patterns here are those of the models' own tokenizer.json.

Reference: llama.cpp src/llama-vocab.cpp, `llm_tokenizer_bpe` and `llama_vocab::impl::load`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from qnpu_jax.errors import UserError
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4
"""Values of tokenizer.ggml.token_type (llama.h, `llama_token_type`)."""


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Builds the tokenizer from the metadata of a GGUF file.

    Raises:
      UserError: not byte-level BPE, an unknown pre-tokenizer, merges outside the vocabulary.
    """
    meta, name = file.metadata, file.path.name
    if (got := meta.get("tokenizer.ggml.model")) != "gpt2":
        raise UserError(
            f"{name}: tokenizer.ggml.model is {got!r}; expected 'gpt2' (byte-level BPE);"
            " use the model's Hugging Face folder"
        )
    try:
        backend = _backend(meta, name)
    except UserError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(
            f"{name}: vocabulary and merges do not fit ({error}); download it again"
        ) from None
    # In a chat model eos may end the document, eot the turn, eom a message to a tool.
    eos = [meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")]
    template = meta.get("tokenizer.chat_template")
    return Tokenizer.build(
        backend,
        [meta.get("tokenizer.ggml.bos_token_id")],
        eos,
        template if isinstance(template, str) else None,
        name,
    )


def _backend(meta: dict[str, Any], name: str) -> Backend:
    tokens = meta.get("tokenizer.ggml.tokens")
    merges = meta.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        missing = "merges" if tokens else "tokens"
        raise UserError(
            f"{name}: tokenizer.ggml.{missing} is missing; expected vocabulary and merges;"
            " use a GGUF that has its tokenizer"
        )
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{name}: pre-tokenizer {pre!r} is unknown; expected one of {sorted(PRE_TOKENIZERS)};"
            " use the model's Hugging Face folder"
        )
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(m.split(" ", 1)) for m in merges],
            # Llama 3 has whole words that no sequence of merges reaches.
            ignore_merges=pre in ("llama3", "llama-v3", "llama-bpe"),
        )
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    types = meta.get("tokenizer.ggml.token_type", [])
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return backend


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2()])


def _cl100k(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Makes the pre-tokenizer of Llama 3 (digits in threes) or of Qwen 2 (single digits)."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def build() -> pre_tokenizers.PreTokenizer:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])

    return build


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama3": _cl100k(r"\p{N}{1,3}"),
    "llama-v3": _cl100k(r"\p{N}{1,3}"),
    "llama-bpe": _cl100k(r"\p{N}{1,3}"),
    "qwen2": _cl100k(r"\p{N}"),
}
