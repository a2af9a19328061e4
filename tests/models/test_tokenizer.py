"""Tokenizers: ids equal those of the reference implementations, and survive saving."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import transformers
from model_files import read_model, write_gguf, write_model

from qnpu_jax.errors import UserError
from qnpu_jax.models.checkpoint import load, resolve
from qnpu_jax.models.gguf_file import open_gguf
from qnpu_jax.models.gguf_tokenizer import gguf_tokenizer
from qnpu_jax.models.tokenizer import Tokenizer

TEXT = (
    "The Transformer was introduced in 2017. It's now used for 95 % of language models , don't you"
    " agree?\n\n  def f(x):\n\treturn x**2 + 3.14159  # naïve café, 你好 😀 <|im_end|>\n"
)
# llama.cpp (llama_cpp_python 0.3.36): tokenize(TEXT, add_bos=False, special=False). Both also agree
# on the 1.3 MB of the WikiText-2 test set (301,948 tokens), and there with every pre-tokenizer.
IDS = """504 3790 20714 436 4727 281 216 34 32 33 39 30 657 506 1209 804 327 216 41 37 2471 282 1789
2859 3297 1326 982 346 3387 47 8866 753 275 24 104 727 198 197 5406 1792 828 34 1232 216 35 30 33 36
33 37 41 216 907 15486 46494 37366 28 216 18645 250 48392 138 40303 218 2067 108 306 79 486 108 46
198"""
# transformers' AutoTokenizer on the folder that `save` writes: apply_chat_template(CHAT, True).
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Why?"},
]
CHAT_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
    "<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
CHAT_IDS = [1, 9690, 198, 6077, 5453, 30, 2, 198, 1, 4093, 198, 34, 27, 34, 47, 2, 198]
CHAT_IDS += [1, 520, 9531, 198, 36, 2, 198, 1, 4093, 198, 4898, 47, 2, 198, 1, 520, 9531, 198]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return gguf_tokenizer(open_gguf(resolve("smollm2-135m")))


def test_import_is_light():
    heavy = ("jax", "transformers", "torch", "huggingface_hub", "llama_cpp")
    code = f"import sys, qnpu_jax.models; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]"


# Ids.


@pytest.mark.slow
def test_encode_equals_llama_cpp(tokenizer):
    assert tokenizer.encode(TEXT) == [int(i) for i in IDS.split()]


@pytest.mark.parametrize(
    "text", ["", " ", "\n", TEXT, "e\u0301 \u00a0\u200b １２３ ½ \U0001f44d\U0001f3fd"]
)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 49152)
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.decode([504, 2]) == "The<|im_end|>"
    assert tokenizer.decode([504, 2], skip_special=True) == "The"


def test_chat(tokenizer):
    assert tokenizer.chat(CHAT) == CHAT_IDS
    assert tokenizer.decode(CHAT_IDS) == CHAT_TEXT


def test_save(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    back = Tokenizer.load(tmp_path / "new" / "folder")
    assert back.encode(TEXT) == tokenizer.encode(TEXT)
    assert back.chat(CHAT) == CHAT_IDS
    assert (back.bos_id, back.eos_ids, back.vocab_size) == (1, (2,), 49152)
    assert back.chat_template == tokenizer.chat_template


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    """An output folder's `tokenizer/` serves others: same ids, same chats, same texts."""
    tokenizer.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert other(TEXT, add_special_tokens=False, split_special_tokens=True).input_ids == (
        tokenizer.encode(TEXT)
    )
    assert other.apply_chat_template(CHAT, add_generation_prompt=True).input_ids == CHAT_IDS
    assert other.decode(CHAT_IDS) == CHAT_TEXT
    assert (other.bos_token_id, other.eos_token_id) == (1, 2)


# Small tokenizers: 96 tokens as the golden models have.

LETTERS = [chr(c) for c in range(33, 33 + 90)]
TOKENS = [*LETTERS, "Ġ", "ab", "abc", "<s>", "</s>", "<think>"]


def write_tokens(**change):
    """Adds a tokenizer to a GGUF file; `abc` is a word that no merge makes."""

    def extra(writer: gguf.GGUFWriter) -> None:
        pre = change.get("pre", "llama-bpe")
        writer.add_tokenizer_model(change.get("model", "gpt2"))
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(change.get("tokens", TOKENS))
        writer.add_token_types([1] * 93 + [3, 3, 4])
        writer.add_token_merges(change.get("merges", ["a b"]))
        writer.add_bos_token_id(93)
        writer.add_eos_token_id(change.get("eos", 94))
        writer.add_eot_token_id(92)

    return extra


def test_tokens_of_gguf(tmp_path):
    loaded = load(write_gguf(tmp_path / "m.gguf", "mha_tied", write_tokens()))
    tokenizer = loaded.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (93, (94, 92))
    a, b, c, space = (TOKENS.index(t) for t in ("a", "b", "c", "Ġ"))
    assert tokenizer.encode("ab abc") == [TOKENS.index("ab"), space, TOKENS.index("ab"), c]
    assert tokenizer.encode("abc") == [TOKENS.index("abc")]
    # Control tokens are text, tokens that users defined are tokens.
    assert tokenizer.encode("b<s><think>a")[-2:] == [95, a]
    assert 93 not in tokenizer.encode("b<s>")
    assert b == tokenizer.encode("b<s>")[0]
    assert loaded.source == "m.gguf"
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.chat(CHAT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; expected 'gpt2'"),
        ({"pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2' is unknown; expected one of"),
        ({"merges": ["a zz"]}, "vocabulary and merges do not fit"),
        ({"eos": 96}, "special token id 96 is outside the vocabulary; expected 0 to 95"),
    ],
)
def test_broken_tokens_of_gguf(tmp_path, change, message):
    path = write_gguf(tmp_path / "m.gguf", "mha_tied", write_tokens(**change))
    with pytest.raises(UserError) as error:
        load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Hugging Face folder of a golden model with a tokenizer."""
    path = write_gguf(tmp_path / "m.gguf", "mha_tied", write_tokens())
    gguf_tokenizer(open_gguf(path)).save(tmp_path / "model")
    return write_model(tmp_path / "model", *read_model("mha_tied"))


def write_json(path: Path, **change) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **change}))


def test_huggingface_folder(folder):
    template = (
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}"
    )
    template += "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}ab{% endif %}"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
    write_json(folder / "tokenizer_config.json", chat_template=named, eos_token={"content": "</s>"})
    write_json(folder / "generation_config.json", eos_token_id=[92, 94, 91])
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    write_json(folder / "tokenizer.json", padding=padding, truncation=cut)
    loaded = load(str(folder))
    assert loaded.tokenizer.eos_ids == (94, 92, 91)
    assert loaded.tokenizer.chat([{"role": "user", "content": "abc"}]) == [93, 92, 94, 91]
    assert len(loaded.tokenizer.encode("b c b")) == 5  # neither cut to 2 nor padded to 9
    assert loaded.source == "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.sha256 == digest


def test_ids_from_the_model_configuration(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))  # as config.json has it


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<end>"}, "eos_token in tokenizer_config.json or"),
        ("generation_config.json", {"eos_token_id": [2, 96]}, "id 96 is outside the vocabulary"),
        ("generation_config.json", {"eos_token_id": [[2]]}, "id [2] is outside the vocabulary"),
        ("tokenizer.json", {"model": {"type": "None"}}, "tokenizer.json: not a valid tokenizer"),
        ("config.json", {"vocab_size": 95}, "model.safetensors: tensor model.embed_tokens.weight"),
    ],
)
def test_broken_folder(folder, file, change, message):
    write_json(folder / file, **change)
    with pytest.raises(UserError) as error:
        load(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tokenizer_larger_than_the_model(folder):
    config, tensors = read_model("mha_tied")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:90].copy()
    write_model(folder, {**config, "vocab_size": 90}, tensors)
    with pytest.raises(UserError, match=r"token ids up to 95, outside.*expected at most 89"):
        load(folder)


@pytest.mark.parametrize("ids", [[96], [-1], [3, 10**9]])
def test_decode_outside_the_vocabulary(folder, ids):
    with pytest.raises(UserError, match="outside the vocabulary; expected 0 to 95"):
        Tokenizer.load(folder).decode(ids)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system role') }}", "{% if %}", "{{ messages[9].content.x }}"],
)
def test_chat_template_fails(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="the chat template does not render 4 messages"):
        Tokenizer.load(folder).chat(CHAT)


def test_chat_template_is_sandboxed(folder):
    code = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(code)
    with pytest.raises(UserError, match="unsafe"):
        Tokenizer.load(folder).chat(CHAT)
