"""SentencePiece tokenizers of GGUF files (Llama 2, Mistral, Gemma), as BPE of `tokenizers`.

SentencePiece merges, of all neighbours whose join is a piece, those whose join has the highest
score; the library merges pairs in the order of a list. So the list holds every cut of every piece
in two pieces, by falling score. What no piece covers becomes its UTF-8 bytes.

Reference: llama.cpp src/llama-vocab.cpp, `llm_tokenizer_spm`; transformers
  convert_slow_tokenizer.py, `LlamaConverter`; arXiv 1808.06226.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from qnpu_jax.errors import UserError

SPACE = "\u2581"
"""Character that stands for a space in pieces."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Values of tokenizer.ggml.token_type (llama.h, `llama_token_type`); 6 is a byte, `<0x0A>`."""
_MERGED = (NORMAL, USER_DEFINED, UNUSED)


def sentencepiece_backend(meta: dict[str, Any], name: str) -> Backend:
    """Builds the tokenizer of the metadata of a GGUF file.

    A control piece is special, which a text cannot spell. A user-defined piece is matched whole in
    the text, before any merge; Gemma's are its runs of spaces, tabs and newlines, and HTML tags.

    Args:
      name: name of the file, for messages.

    Raises:
      UserError: pieces, scores or types are missing, or differ in number.
    """
    pieces, scores, types = _lists(meta, name)
    prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    unknown = next((p for p, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges_by_score(pieces, scores, types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # llama.cpp puts a space before every stretch of text between tokens that are matched whole.
    spaces = normalizers.Replace(" ", SPACE)
    first = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, spaces])
    undone = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    last = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([*undone, *last])
    backend.add_tokens(
        [
            AddedToken(piece, special=kind != USER_DEFINED, normalized=False)
            for piece, kind in zip(pieces, types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return backend


def merges_by_score(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Lists the pairs of pieces whose join is a piece, that of the highest score first.

    Where scores are equal, as in files that were converted without them, the piece with the smaller
    id comes first: ids are given in the order of merging.

    >>> merges_by_score(["a", "b", "ab", "ba"], [0.0, 0.0, -2.0, -1.0], [1] * 4)
    [('b', 'a'), ('a', 'b')]
    """
    ids = {p: i for i, p in enumerate(pieces) if types[i] in _MERGED}
    found: list[tuple[float, int, int, int]] = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left = ids.get(piece[:cut])
            if left is None:
                continue
            right = ids.get(piece[cut:])
            if right is not None:
                found.append((-scores[i], i, left, right))
    found.sort()
    return [(pieces[left], pieces[right]) for _, _, left, right in found]


def _lists(meta: dict[str, Any], name: str) -> tuple[list[str], list[float], list[int]]:
    """Reads pieces, scores and types.

    Raises:
      UserError: as `sentencepiece_backend`.
    """
    keys = [f"tokenizer.ggml.{key}" for key in ("tokens", "scores", "token_type")]
    lists = [meta.get(key) for key in keys]
    for key, values in zip(keys, lists, strict=True):
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{name}: {key} is missing; expected pieces, their scores and types;"
                " use a GGUF that has its tokenizer"
            )
    if len({len(values) for values in lists if values}) > 1:
        raise UserError(
            f"{name}: {len(lists[0] or [])} pieces, {len(lists[1] or [])} scores and"
            f" {len(lists[2] or [])} types; expected as many of each; download it again"
        )
    pieces, scores, types = lists
    return pieces or [], scores or [], types or []
