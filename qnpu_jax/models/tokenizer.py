"""Tokenizers: text to token ids and back, and chats through the model's own template.

Library `tokenizers` does the work, whatever the source: a Hugging Face folder gives tokenizer.json,
a GGUF file the pieces to rebuild it (`gguf_tokenizer.py`). `save` writes a folder that transformers
reads as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError, is_text
from qnpu_jax.models.chat import render_chat

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes:
      backend: encodes rendered chats: "<|im_end|>" in a text is the special token.
      plain: encodes texts: "<|im_end|>" in a text is text.
      bos_id: token that a text begins with; None where the model has none.
      eos_ids: tokens that end a text or a turn; templates call the first eos_token.
      chat_template: Jinja source; None for base models.
      vocab_size: one more than the largest id; a model's embedding may be padded beyond it.
      source: name of the model, for messages.
    """

    backend: tokenizers.Tokenizer
    plain: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
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
    ) -> Tokenizer:
        """Builds a tokenizer from its parts, as files give them.

        Args:
          bos_ids: BOS by each of the files, the most trusted first, which counts; None where a file
            does not say.
          eos_ids: EOS likewise; all of them count.
          source: name of the model, for messages.

        Raises:
          UserError: a special id is no integer or lies outside the vocabulary.
        """
        # Files saved after training may truncate and pad; a text must come back whole.
        backend.no_truncation()
        backend.no_padding()
        plain = tokenizers.Tokenizer.from_str(backend.to_str())
        plain.encode_special_tokens = True
        size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        known_bos = [i for i in bos_ids if i is not None][:1]
        known_eos = [i for n, i in enumerate(eos_ids) if i is not None and i not in eos_ids[:n]]
        for token_id in known_bos + known_eos:
            _check_id(token_id, size, "special token", source)
        bos_id = known_bos[0] if known_bos else None
        return Tokenizer(backend, plain, bos_id, tuple(known_eos), chat_template, size, source)

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
        # generation_config.json overrides the same keys of config.json.
        model = {**read_json(folder / "config.json"), **read_json(folder / GENERATION)}
        bos = _special(config, "bos_token", backend, folder.name)
        eos = _special(config, "eos_token", backend, folder.name)
        others = model.get("eos_token_id")
        return Tokenizer.build(
            backend,
            [bos, model.get("bos_token_id")],
            [eos, *(others if isinstance(others, list) else [others])],
            _template(folder, config),
            folder.name,
        )

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, its two configuration files and the chat template.

        `Tokenizer.load(folder)` gives the tokenizer back, and so does transformers' AutoTokenizer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._special_tokens()}
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
        if not is_text(text):
            raise UserError(
                f"text {text[:40]!r}: holds half of a surrogate pair; expected what UTF-8 can"
                " write; remove it"
            )
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

    def chat(self, messages: Sequence[Mapping[str, str]], *, bos: bool = True) -> list[int]:
        """Encodes a chat up to where the assistant's next answer begins.

        Args:
          messages: {"role": "system" | "user" | "assistant", "content": text}, in order.
          bos: put BOS where the template says `bos_token`. False is for a model with a prefix,
            which begins with BOS already.

        Raises:
          UserError: the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise UserError(
                f"{self.source}: no chat template; expected {TEMPLATE}, or chat_template in"
                f" {CONFIG}; use an instruct model, or plain text"
            )
        special = self._special_tokens() | ({} if bos else {"bos_token": ""})
        text = render_chat(self.chat_template, messages, special, self.source)
        return self.backend.encode(text, add_special_tokens=False).ids

    def _special_tokens(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_id, "eos_token": next(iter(self.eos_ids), None)}
        named = {k: self.backend.id_to_token(i) for k, i in ids.items() if i is not None}
        return {k: token for k, token in named.items() if token is not None}


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


def _special(
    config: Mapping[str, Any], key: str, backend: tokenizers.Tokenizer, source: str
) -> int | None:
    """Looks up a token that tokenizer_config.json names: a string or {"content": string}."""
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    if (token_id := backend.token_to_id(str(text))) is None:
        raise UserError(
            f"{source}: {key} in {CONFIG} is {text!r}, which {TOKENIZER} lacks; expected a token of"
            " the vocabulary; take both files of the same model"
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
