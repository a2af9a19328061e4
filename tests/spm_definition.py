"""SentencePiece by its definition, and vocabularies as GGUF files hold them."""

import heapq
from collections.abc import Iterator
from itertools import count, pairwise
from typing import Any

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
HARD = (
    "",
    " ",
    "   three, then  two ",
    "tabs\t\tand\n\n\nnewlines\r\n",
    "naïve e\u0301 u\u0308 \ufb01 １２３ ½",
    "你好，世界 こんにちは 한국어",
    "😀👍🏽👨\u200d👩\u200d👧 \U0001f1e9\U0001f1ea",
    "\x00\x07 \ufffd \u200b \u00a0 𐎀𐎁 🜁",
    "a" * 300 + " " * 70 + "\n" * 40,
    "<s> </s> <bos> <unk> <0x0A> [INST] <b>bold</b> ▁ ▁▁x",
    "def f(x):\n\treturn x**2 + 3.14159  # 1234567\n",
)
"""Strings that tokenizers get wrong."""
WHOLE = ("[INST]", "<b>", "</b>", "\n\n", "\t\t", "  ", "   ")
"""User-defined pieces."""


class Merger:
    """Merges neighbours by score, as llama.cpp's `llm_tokenizer_spm`.

    Args:
      metadata: of a GGUF file.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        keys = ("tokens", "scores", "token_type")
        pieces, scores, types = (metadata[f"tokenizer.ggml.{key}"] for key in keys)
        rows = [*zip(pieces, scores, types, strict=True)]
        self.ids = {p: i for i, (p, _, kind) in enumerate(rows) if kind in (NORMAL, USER_DEFINED)}
        self.scores = scores
        self.bytes = {p: i for i, (p, _, kind) in enumerate(rows) if kind == BYTE}
        self.whole = sorted((p for p, _, k in rows if k == USER_DEFINED), key=len, reverse=True)
        self.prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)

    def encode(self, text: str) -> list[int]:
        """User-defined pieces whole, longest first at each place; the rest by merges."""
        firsts = {p[0] for p in self.whole}
        ids: list[int] = []
        begin = at = 0
        while at < len(text):
            found = text[at] in firsts and next(
                (p for p in self.whole if text.startswith(p, at)), ""
            )
            if found:
                ids += [*self._merged(text[begin:at]), self.ids[found]]
                begin = at = at + len(found)
            else:
                at += 1
        return [*ids, *self._merged(text[begin:])]

    def _merged(self, text: str) -> Iterator[int]:
        if not text:
            return
        symbols: list[str | None] = list(((" " if self.prefix else "") + text).replace(" ", SPACE))
        after = [*range(1, len(symbols)), -1]
        before = [*range(-1, len(symbols) - 1)]
        queue: list[tuple[float, int, int, str]] = []

        def propose(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = f"{symbols[left]}{symbols[right]}"
                if joined in self.ids:
                    heapq.heappush(queue, (-self.scores[self.ids[joined]], left, right, joined))

        for left in range(len(symbols) - 1):
            propose(left, left + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if None in (symbols[left], symbols[right]) or symbols[left] + symbols[right] != joined:  # type: ignore[operator]
                continue
            if after[left] != right:
                continue
            symbols[left], symbols[right] = joined, None
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            propose(before[left], left)
            propose(left, after[left])
        for symbol in symbols:
            if symbol in self.ids:
                yield self.ids[symbol]
            elif symbol is not None:
                yield from (self.bytes[f"<0x{b:02X}>"] for b in symbol.encode())


def trained(text: str, size: int) -> list[str]:
    """Pieces of more than one character, in the order in which BPE would merge them in `text`."""
    words = {tuple(SPACE + w): text.split().count(w) for w in set(text.split())}
    pieces: list[str] = []
    while len(pieces) < size:
        pairs: dict[str, int] = {}
        for word, times in words.items():
            for a, b in pairwise(word):
                pairs[a + b] = pairs.get(a + b, 0) + times
        best = max(pairs, key=lambda p: (pairs[p], p))
        pieces.append(best)
        words = {tuple(_joined(word, best)): times for word, times in words.items()}
    return pieces


def _joined(word: tuple[str, ...], piece: str) -> Iterator[str]:
    at = 0
    while at < len(word):
        two = "".join(word[at : at + 2])
        yield two if two == piece else word[at]
        at += 2 if two == piece else 1


def metadata(text: str, size: int = 700) -> dict[str, Any]:
    """A small vocabulary as converters write Llama's, with user-defined pieces like Gemma's."""
    rows = [("<unk>", -1000.0, UNKNOWN), ("<s>", -1000.0, CONTROL), ("</s>", -1000.0, CONTROL)]
    rows += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    rows += [
        (p, -1000.0, USER_DEFINED) for p in ("[INST]", "<b>", "</b>", "\n\n", "\t\t", "  ", "   ")
    ]
    rank = count()
    rows += [(p, -float(next(rank)), NORMAL) for p in trained(text, size)]
    letters = sorted({*text, SPACE, *"你好é"} - {" ", "\n", "\t"})
    rows += [(p, -float(next(rank)), NORMAL) for p in letters]
    pieces, scores, types = (list(column) for column in zip(*rows, strict=True))
    given = {"model": "llama", "tokens": pieces, "scores": scores, "token_type": types}
    return {f"tokenizer.ggml.{key}": value for key, value in given.items()}
