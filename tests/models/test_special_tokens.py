"""Hugging Face folders: BOS, ends and chats are those of transformers' AutoTokenizer."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from qnpu_jax.models.chat import FIXED_DATE, SYSTEM
from qnpu_jax.models.checkpoint import HUB_FILES
from qnpu_jax.models.tokenizer import Tokenizer

SPECIALS = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<turn>",
    "<end_of_turn>",
]
CHAT = [{"role": "user", "content": "hi"}]
TURNS = [*CHAT, {"role": "assistant", "content": "yes"}, *CHAT]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folder(folder: Path, *, processor: bool = False, template: str = CHATML, **files) -> Path:
    """A tokenizer of bytes; `files` are JSON objects by name without ending."""
    vocab = {t: i for i, t in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    if processor:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    files.setdefault("tokenizer_config", {"bos_token": "<s>", "eos_token": "</s>"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def reference(folder: Path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | config))
    return transformers.AutoTokenizer.from_pretrained(folder)


# BOS.


@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("adds", [True, False, None])
@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False}, None])
def test_texts_begin_with_bos_as_in_transformers(tmp_path, processor, adds, bos):
    config = {"bos_token": bos, "eos_token": "</s>"}
    config |= {} if adds is None else {"add_bos_token": adds}
    if isinstance(bos, dict):
        config["bos_token"] = {**bos, "__type": "AddedToken", "normalized": False, "rstrip": False}
    if bos is None and (adds or processor):
        pytest.skip("BOS of a model that names none")
    folder = write_folder(tmp_path / "m", processor=processor, tokenizer_config=config)
    made, other = Tokenizer.load(folder), reference(folder)
    # transformers reads add_bos_token only where it builds tokenizer.json itself.
    unread = adds is True and not processor
    assert made.adds_bos == (unread or other("ab").input_ids[:1] == [0])
    made.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").adds_bos == made.adds_bos
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (saved("ab").input_ids[:1] == [0]) == made.adds_bos


# Special tokens and ends.


def test_a_map_alone_names_them(tmp_path):
    named = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>"}
    folder = write_folder(tmp_path / "m", tokenizer_config={}, special_tokens_map=named)
    made, other = Tokenizer.load(folder), reference(folder)
    assert (made.bos_id, made.eos_ids) == (other.bos_token_id, (other.eos_token_id,)) == (0, (5,))
    assert made.special == other.special_tokens_map
    assert "special_tokens_map.json" in HUB_FILES


@pytest.mark.parametrize("newer", [True, False])
def test_the_map_and_the_configuration_disagree(tmp_path, newer):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    token = {"content": "</s>", "special": True, "lstrip": False, "rstrip": False}
    token |= {"normalized": False, "single_word": False}
    config |= {"added_tokens_decoder": {"1": token}} if newer else {}
    folder = write_folder(
        tmp_path / "m",
        template="{{ eos_token }}",
        tokenizer_config=config,
        special_tokens_map={"eos_token": "<end_of_turn>"},
    )
    made, other = Tokenizer.load(folder), reference(folder)
    assert made.eos_ids[0] == other.eos_token_id == (1 if newer else 7)
    assert made.chat(CHAT) == other.apply_chat_template(CHAT).input_ids


@pytest.mark.parametrize(
    ("ids", "expected"), [(3, (1, 3)), ([3, 1, 6], (1, 3, 6)), (None, (1,)), ([], (1,))]
)
def test_all_ends_of_the_generation_config(tmp_path, ids, expected):
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    folder = write_folder(
        tmp_path / "m", template=template, generation_config={"eos_token_id": ids}
    )
    assert Tokenizer.load(folder).eos_ids == expected


TEMPLATES = {
    "chatml": (CHATML, [5]),
    "gemma": (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}",
        [7],
    ),
    "next turn": ("{% for m in messages %}<turn>{{ m.content }}{% endfor %}", [6]),
    "eos": ("{% for m in messages %}[{{ m.content }}] {{ eos_token }}{% endfor %}", []),
    "text": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", []),
    "plain token": ("{% for m in messages %}{{ m.content }} a</s>{% endfor %}", []),
    "system first": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
        [5],
    ),
    "refuses all": ("{{ raise_exception('no') }}", []),
    "broken": ("{% if %}", []),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_shows_what_ends_a_turn(tmp_path, name):
    template, found = TEMPLATES[name]
    folder = write_folder(tmp_path / "m", template=template)
    made = Tokenizer.load(folder)
    assert made.eos_ids == (1, *found)
    made.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").eos_ids == made.eos_ids


# Chats.


@pytest.mark.parametrize("chat", [CHAT, TURNS, [{"role": "system", "content": "Be brief."}, *CHAT]])
@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}" + CHATML,
        "{% for m in messages %}{{ m.get('role', '') }}{{ m.get('name', '-') }}"
        "{{ m['content'].strip().split('e')[0].upper() }}{{ m.items() | list | length }}"
        "{% if m.content.startswith('h') %}<turn>{% endif %}{% endfor %}",
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}"
        "{{ dict(a=1) }}{{ dict.fromkeys(['b']) }}{{ range(3) | list }}{{ enable_thinking }}",
        "{{ bos_token is defined }}{{ mask_token is defined }}{{ unk_token is defined }}",
    ],
)
def test_chats_are_transformers(tmp_path, template, chat):
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    folder = write_folder(tmp_path / "m", template=template, tokenizer_config=config)
    expected = reference(folder).apply_chat_template(chat, add_generation_prompt=True).input_ids
    assert Tokenizer.load(folder).chat(chat) == expected


def test_a_template_that_wants_a_system_message_gets_one(tmp_path):
    folder = write_folder(tmp_path / "m", template=TEMPLATES["system first"][0])
    made = Tokenizer.load(folder)
    begun = [{"role": "system", "content": SYSTEM}, *CHAT]
    assert made.chat(CHAT) == made.chat(begun)
    other = reference(folder)
    assert (
        made.chat(begun) == other.apply_chat_template(begun, add_generation_prompt=True).input_ids
    )
    own = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert made.chat(own) != made.chat(begun)


def test_the_fixed_date(tmp_path):
    folder = write_folder(tmp_path / "m", template="{{ strftime_now('%d %b %Y') }}")
    made = Tokenizer.load(folder)
    assert made.decode(made.chat(CHAT, now=FIXED_DATE)) == "26 Jul 2024"
    assert made.decode(made.chat(CHAT)) != "26 Jul 2024"
