"""Tokenizers of GGUF files, rebuilt from the metadata with library `tokenizers`.

GGUF keeps pieces and their types, with merges for byte-level BPE or scores for SentencePiece.

Reference: llama.cpp src/llama-vocab.cpp, `llama_vocab::impl::load`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from qnpu_jax.errors import UserError
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from qnpu_jax.models.gguf_sentencepiece import CONTROL, USER_DEFINED, sentencepiece_backend
from qnpu_jax.models.tokenizer import Tokenizer

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""Values of tokenizer.ggml.model."""
SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # spelled so in the format
    "pad_token": "padding",
    "mask_token": "mask",
}
"""Names in chat templates, and in the metadata tokenizer.ggml.*_token_id."""
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids of special pieces where the metadata do not say, as llama.cpp has them."""
TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "[EOT]",
)
"""Tokens that end a turn by their text. Files of older converters name none, and give some of them
another type than control."""


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Builds the tokenizer from the metadata of a GGUF file.

    Raises:
      UserError: another kind of tokenizer, an unknown pre-tokenizer, merges outside the vocabulary.
    """
    meta, name = file.metadata, file.path.name
    model = meta.get("tokenizer.ggml.model")
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise UserError(
            f"{name}: tokenizer.ggml.model is {model!r}; expected {BYTE_LEVEL!r} (byte-level BPE)"
            f" or {SENTENCEPIECE!r} (SentencePiece); use the model's Hugging Face folder"
        )
    try:
        if model == BYTE_LEVEL:
            pre = _pre_tokenizer(meta, name)
            backend, adds_bos = _byte_level_backend(meta, name, pre), pre.adds_bos
        else:
            backend, adds_bos = sentencepiece_backend(meta, name), True
        return _tokenizer(backend, meta, name, adds_bos)
    except UserError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(
            f"{name}: vocabulary and merges do not fit ({error}); download it again"
        ) from None


def _tokenizer(backend: Backend, meta: dict[str, Any], name: str, adds_bos: bool) -> Tokenizer:
    """Puts a tokenizer together; `adds_bos` holds where the metadata do not say."""
    ids = _special_ids(meta)
    # In a chat model eos may end the document, eot the turn, eom a message to a tool.
    eos = [ids.get("eos"), *(meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("eot", "eom"))]
    pieces = meta["tokenizer.ggml.tokens"]
    special = {
        key: pieces[ids[kind]]
        for key, kind in SPECIAL.items()
        if isinstance(ids.get(kind), int) and 0 <= ids[kind] < len(pieces)
    }
    adds_bos = bool(meta.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos_token" in special
    template = meta.get("tokenizer.chat_template")
    return Tokenizer.build(
        backend,
        [ids.get("bos")],
        [*eos, *_turn_ends(meta, backend)],
        template if isinstance(template, str) else None,
        name,
        special=special,
        adds_bos=adds_bos,
    )


def _special_ids(meta: dict[str, Any]) -> dict[str, Any]:
    """Reads the ids of special tokens by their kind; kinds that the metadata leave out have none,
    but for those that every SentencePiece model has."""
    usual: dict[str, Any] = {}
    if meta["tokenizer.ggml.model"] == SENTENCEPIECE:
        usual = {
            k: i for k, i in SENTENCEPIECE_IDS.items() if i < len(meta["tokenizer.ggml.tokens"])
        }
    given = {k: meta.get(f"tokenizer.ggml.{k}_token_id") for k in SPECIAL.values()}
    return usual | {k: i for k, i in given.items() if i is not None}


def _turn_ends(meta: dict[str, Any], backend: Backend) -> list[int]:
    """Finds the tokens that end a turn by their text, in the order of TURN_ENDS.

    A vocabulary with <|return|> and <|call|> (gpt-oss) puts <|end|> between the parts of a turn.
    """
    inner = {"<|end|>"} if {"<|return|>", "<|call|>"} <= {*meta["tokenizer.ggml.tokens"]} else set()
    found = [backend.token_to_id(text) for text in TURN_ENDS if text not in inner]
    return [i for i in found if i is not None]


def _pre_tokenizer(meta: dict[str, Any], name: str) -> PreTokenizer:
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{name}: pre-tokenizer {pre!r} is unknown; expected one of {sorted(PRE_TOKENIZERS)};"
            " use the model's Hugging Face folder"
        )
    return PRE_TOKENIZERS[pre]


def _byte_level_backend(meta: dict[str, Any], name: str, pre: PreTokenizer) -> Backend:
    tokens = meta.get("tokenizer.ggml.tokens")
    merges = meta.get("tokenizer.ggml.merges")
    if not tokens or merges is None:
        missing = "merges" if tokens else "tokens"
        raise UserError(
            f"{name}: tokenizer.ggml.{missing} is missing; expected vocabulary and merges;"
            " use a GGUF that has its tokenizer"
        )
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(m.split(" ", 1)) for m in merges],
            ignore_merges=pre.whole_words,
        )
    )
    if (normalizer := pre.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    types = meta.get("tokenizer.ggml.token_type", [])
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL or token in TURN_ENDS, normalized=False)
            for token, kind in zip(tokens, types, strict=False)
            if kind in (CONTROL, USER_DEFINED) or token in TURN_ENDS
        ]
    )
    return backend
