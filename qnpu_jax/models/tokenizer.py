"""Tokenizers: text to token ids and back, and chats through the model's own template.

Library `tokenizers` does the work, whatever the source: a Hugging Face folder gives tokenizer.json,
a GGUF file the pieces to rebuild it (`gguf_tokenizer.py`). `save` writes a folder that transformers
reads as well.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError, is_text
from qnpu_jax.models.chat import after_an_answer, render_question

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
SPECIAL_MAP = "special_tokens_map.json"
SPECIAL = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""Names of special tokens in files and, as variables, in chat templates."""


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
      backend: encodes rendered chats: "<|im_end|>" in a text is the special token.
      plain: encodes texts: "<|im_end|>" in a text is text.
      bos_id: token of the beginning; None where the model has none.
      eos_ids: tokens that end a text or a turn, by the files and by what the chat template prints
        after an answer; the first is the model's eos_token.
      adds_bos: whether a text begins with BOS by the model's own rule. Qwen's, for one, does not:
        its BOS is the token that ends texts.
      special: texts of special tokens by their names in chat templates.
      chat_template: Jinja source; None for base models.
      vocab_size: one more than the largest id; a model's embedding may be padded beyond it.
      source: name of the model, for messages.
    """

    backend: tokenizers.Tokenizer
    plain: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    special: Mapping[str, str]
    chat_template: str | None
    vocab_size: int
    source: str

    @staticmethod
    def build(
        backend: tokenizers.Tokenizer,
        bos_ids: Sequence[Any],
        eos_ids: Sequence[Any],
        chat_template: str | None,
        source: str,
        *,
        special: Mapping[str, str] | None = None,
        adds_bos: bool | None = None,
    ) -> Tokenizer:
        """Builds a tokenizer from its parts, as files give them.

        Args:
          bos_ids: BOS by each of the files, the most trusted first, which counts; None where a file
            does not say.
          eos_ids: EOS likewise; all of them count.
          source: name of the model, for messages.
          special: as the attribute; None for BOS and the first EOS.
          adds_bos: as the attribute; None where only `backend` tells, by what it adds to a text.

        Raises:
          UserError: a special id is no integer or lies outside the vocabulary.
        """
        # Files saved after training may truncate and pad; a text must come back whole.
        backend.no_truncation()
        backend.no_padding()
        plain = tokenizers.Tokenizer.from_str(backend.to_str())
        plain.encode_special_tokens = True
        size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        bos_id = next((i for i in bos_ids if i is not None), None)
        known_eos = [i for n, i in enumerate(eos_ids) if i is not None and i not in eos_ids[:n]]
        for token_id in ([] if bos_id is None else [bos_id]) + known_eos:
            _check_id(token_id, size, "special token", source)
        if special is None:
            special = _texts(backend, {"bos_token": [bos_id], "eos_token": known_eos})
        ends = _turn_end(backend, chat_template, special)
        known_eos += [i for i in ends if i not in known_eos]
        adds_bos = _begins(backend, bos_id) if adds_bos is None else adds_bos
        adds_bos = adds_bos and bos_id is not None
        if adds_bos:
            _begin(backend, bos_id)
        ids = bos_id, tuple(known_eos), adds_bos
        return Tokenizer(backend, plain, *ids, special, chat_template, size, source)

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """Reads a folder of Hugging Face tokenizer files, or one that `save` wrote.

        Raises:
          UserError: tokenizer.json is missing or a file in the folder is damaged.
        """
        folder = Path(folder)
        if not (folder / TOKENIZER).is_file():
            raise UserError(
                f"{folder.name}: {TOKENIZER} is missing; expected it in the model's folder; copy it"
                " there, or make it from older files with transformers:"
                " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        backend = _parse(folder / TOKENIZER)
        config = read_json(folder / CONFIG)
        named = _named(config, read_json(folder / SPECIAL_MAP))
        # generation_config.json overrides the same keys of config.json.
        model = {**read_json(folder / "config.json"), **read_json(folder / GENERATION)}
        bos = _special(named, "bos_token", backend, folder.name)
        eos = _special(named, "eos_token", backend, folder.name)
        others = model.get("eos_token_id")
        # A template that puts tokens around texts says all; other files may add to its silence.
        silent = not isinstance(backend.post_processor, processors.TemplateProcessing)
        adds_bos = True if silent and config.get("add_bos_token") is True else None
        return Tokenizer.build(
            backend,
            [bos, model.get("bos_token_id")],
            [eos, *(others if isinstance(others, list) else [others])],
            _template(folder, config),
            folder.name,
            special=named or None,
            adds_bos=adds_bos,
        )

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, its two configuration files and the chat template.

        `Tokenizer.load(folder)` gives the tokenizer back, and so does transformers' AutoTokenizer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        config |= {"add_bos_token": self.adds_bos}
        # Without this key transformers may drop spaces before punctuation when it decodes.
        _write_json(folder / CONFIG, {**config, "clean_up_tokenization_spaces": False})
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids)}
        _write_json(folder / GENERATION, ids)
        if self.chat_template is None:
            (folder / TEMPLATE).unlink(missing_ok=True)  # left by an earlier save
        else:
            (folder / TEMPLATE).write_text(self.chat_template, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Encodes plain text; no BOS or EOS is added, and "<|im_end|>" in it is only text.

        Raises:
          UserError: text that is no UTF-8.
        """
        _check_text(text)
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Decodes token ids; bytes that are no UTF-8 give U+FFFD.

        Args:
          skip_special: leave special tokens out.

        Raises:
          UserError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for token_id in {min(ids), max(ids)} if ids else ():
            _check_id(token_id, self.vocab_size, "token", self.source)
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        bos: bool = True,
        now: datetime.datetime | None = None,
        answer_next: bool = True,
    ) -> list[int]:
        """Encodes a chat, by default up to where the assistant's next answer begins.

        A template that refuses to begin without a system message gets `chat.SYSTEM`.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text}, in order.
          bos: put BOS where the template says `bos_token`. False is for a model with a prefix,
            which begins with BOS already.
          now: as in `render_chat`; `chat.FIXED_DATE` where the ids must be the same every day.
          answer_next: as in `render_chat`.

        Raises:
          UserError: the model has no chat template, or its template refuses the messages; they
            hold text that is no UTF-8.
        """
        if self.chat_template is None:
            raise UserError(
                f"{self.source}: no chat template; expected {TEMPLATE}, or chat_template in"
                f" {CONFIG}; use an instruct model, or plain text"
                " (`qnpu generate --raw`)"
            )
        special = {**self.special} | ({} if bos else {"bos_token": ""})
        text = render_question(self.chat_template, messages, special, self.source, now, answer_next)
        _check_text(text)
        return self.backend.encode(text, add_special_tokens=False).ids


def _check_text(text: str) -> None:
    """Raises UserError for text that the Rust library cannot take."""
    if is_text(text):
        return
    at = next(i for i, c in enumerate(text) if not is_text(c))
    raise UserError(
        f"text {text[max(at - 20, 0) : at + 20]!r}: holds half of a surrogate pair; expected what"
        " UTF-8 can write; remove it"
    )


def _begins(backend: tokenizers.Tokenizer, bos_id: int | None) -> bool:
    """Tells whether the tokenizer puts BOS before a text of its own accord."""
    return bos_id is not None and backend.encode("").ids[:1] == [bos_id]


def _begin(backend: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Makes the tokenizer put BOS before texts, for those who read what `Tokenizer.save` writes."""
    if bos_id is None or _begins(backend, bos_id):
        return
    bos = str(backend.id_to_token(bos_id))
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
    )


def _texts(
    backend: tokenizers.Tokenizer, ids: Mapping[str, Sequence[int | None]]
) -> dict[str, str]:
    """Gives the text of the first id of each name, where there is one."""
    firsts = {name: next(iter(some), None) for name, some in ids.items()}
    texts = {name: backend.id_to_token(i) for name, i in firsts.items() if i is not None}
    return {name: text for name, text in texts.items() if text is not None}


def _turn_end(
    backend: tokenizers.Tokenizer, template: str | None, special: Mapping[str, str]
) -> list[int]:
    """Finds the token that ends a turn: the special one, if any, that a chat template prints after
    an answer, spaces and line breaks aside."""
    text = "" if template is None else after_an_answer(template, special).lstrip()
    added = {i: t.content for i, t in backend.get_added_tokens_decoder().items()}
    ends = [i for i, token in added.items() if token.strip() and text.startswith(token)]
    return [max(ends, key=lambda i: len(added[i]))] if ends else []


def _check_id(token_id: Any, size: int, what: str, source: str) -> None:
    if not isinstance(token_id, int) or not 0 <= token_id < size:
        raise UserError(
            f"{source}: {what} id {token_id!r} is outside the vocabulary; expected 0 to {size - 1};"
            " take ids and tokenizer of the same model"
        )


def _parse(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(_read_text(path))
    except UserError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(
            f"{path.name}: not a valid tokenizer ({error}); download it again"
        ) from None


def _named(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    """Reads the texts of special tokens: each a string or {"content": string}.

    Of the two files the map counts, as in transformers, unless the configuration lists the added
    tokens: files with that list are newer than their map.
    """
    newer = "added_tokens_decoder" in config
    files = {**special_map, **config} if newer else {**config, **special_map}
    given = {key: files.get(key) for key in SPECIAL}
    texts = {k: t.get("content") if isinstance(t, dict) else t for k, t in given.items()}
    return {key: str(text) for key, text in texts.items() if text is not None}


def _special(
    named: Mapping[str, str], key: str, backend: tokenizers.Tokenizer, source: str
) -> int | None:
    """Looks up the id of a token that `_named` found."""
    if (text := named.get(key)) is None:
        return None
    if (token_id := backend.token_to_id(text)) is None:
        raise UserError(
            f"{source}: {key} in {CONFIG} or {SPECIAL_MAP} is {text!r}, which {TOKENIZER}"
            " lacks; expected a token of the vocabulary; take all files of the same model"
        )
    return token_id


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Finds the chat template: in a file, or in the configuration, alone or by name in a list."""
    if (folder / TEMPLATE).is_file():
        return _read_text(folder / TEMPLATE)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; gives an empty one where there is no such file.

    Raises:
      UserError: no valid JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        data = artifacts.parse_json(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path.name}: not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path.name}: expected a JSON object, got {type(data).__name__}; download it again"
        )
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path.name}: cannot be read as UTF-8 text ({error}); download it again"
        ) from None


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
