"""Text files: what is read, and what is said of files that cannot be."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers
from characters import characters

from qnpu_jax.errors import UserError
from qnpu_jax.models.tokenizer import Tokenizer
from qnpu_jax.text.files import SEPARATOR, default_text, digest, read_text, tokenize
from qnpu_jax.text.windows import cut


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Lower-case letters and newline, one token a character; "z" is 25, newline 26."""
    vocab = {chr(97 + i): i for i in range(26)} | {"\n": 26}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    return Tokenizer.build(backend, [], [], None, "letters")


def message(path) -> str:
    with pytest.raises(UserError) as error:
        read_text(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text  # the command line prints one line
    return text.removeprefix(str(path))


# Files.


@pytest.mark.parametrize("name", ["a.txt", "a", "a.md"])
def test_plain_text_is_one_document(tmp_path, name):
    path = tmp_path / name
    text = '{"text": "not JSON here"}\n\nnaïve café 你好 😀\n'
    path.write_text(text, encoding="utf-8")
    assert read_text(path) == read_text(str(path)) == [text]
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path) == ["a\nb"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_json_lines_are_documents(tmp_path, name):
    path = tmp_path / name
    texts = ["one\ntwo", "naïve 😀 \u2028 still the same line", ""]
    values = [{"text": texts[0], "id": 3}, texts[1], {"text": texts[2]}]
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_text(path) == texts
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert read_text(path) == texts


def test_missing_file_and_folder(tmp_path):
    assert message(tmp_path / "a.txt").startswith(": no such file; expected plain text, or JSON")
    assert message(tmp_path).startswith(": is a folder; expected a file of text")
    with pytest.raises(UserError, match="no such file"):
        digest(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is a folder"):
        digest(tmp_path)


def test_unreadable_file(tmp_path):
    # Permissions would not do: root may read everything.
    path = tmp_path / ("x" * 300)
    assert message(path).startswith(": cannot be read (File name too long); expected a readable")
    with pytest.raises(UserError, match="cannot be read"):
        digest(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes("caf\xe9 au lait".encode("latin-1"))
    assert message(tmp_path / name).startswith(": byte 3 is not UTF-8 (0xe9); expected")


@pytest.mark.parametrize("data", [b"", b" \n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert message(tmp_path / name).startswith(": no text in it; expected at least one document")


def test_json_lines_of_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('""\n{"text": " "}\n')
    assert message(tmp_path / "a.jsonl").startswith(": no text in it")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "cut', "not valid JSON (Unterminated string"),
        ("plain words", "not valid JSON"),
        ("[", "not valid JSON"),
        ('{"content": "x", "id": 1}', "got the keys ['content', 'id']; correct or remove"),
        ("{}", "got the keys []"),
        ('{"text": null}', 'got "text" of type NoneType'),
        ('{"text": ["x"]}', 'got "text" of type list'),
        ('{"messages": null}', "got the keys ['messages']"),
        ('{"messages": [' + "[" * 500 + "]" * 500 + "]}", "got list of too many levels"),
        ('{"messages": "hi"}', '"messages" must be a list of at least one message; got "hi"'),
        ('{"messages": []}', "at least one message; got []"),
        ('{"messages": ["hi"]}', 'objects with strings "role" and "content"; got "hi"'),
        ('{"messages": [{"role": "user"}]}', 'got {"role": "user"}'),
        (
            '{"messages": [{"role": "user", "content": "a\\ud800"}]}',
            "character 1 of its text is half a surrogate pair ('\\ud800')",
        ),
        ("[1, 2]", "got list"),
        ("null", "got NoneType"),
        ('{"text": "a\\ud800"}', "character 1 of its text is half a surrogate pair ('\\ud800')"),
    ],
)
def test_line_without_text(tmp_path, line, expected):
    (tmp_path / "a.jsonl").write_text(f'"first"\n\n{line}\n')
    text = message(tmp_path / "a.jsonl")
    assert text.startswith(": line 3: ")
    assert expected in text
    assert "expected" in text or "must be" in text


def test_digest_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(path) == digest(str(path)) == expected
    path.write_bytes(bytes(range(256)) * 4096)
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# The default text.


def test_default_text():
    text = default_text()
    assert text == default_text()
    assert len(text) > 300_000
    assert "The standard type hierarchy" in text
    assert text.startswith('The "assert" statement')  # the topics are sorted


# Tokens.


def test_documents_are_joined_by_a_blank_line(tokenizer):
    assert SEPARATOR == "\n\n"
    assert tokenize(["ab", "c"], tokenizer, 27, "f") == [0, 1, 26, 26, 2]
    assert tokenize([], tokenizer, 27, "f") == []


def test_chats_take_the_template_between_texts():
    made = characters(False, "{% for m in messages %}<{{ m.role[0] }}{{ m.content }}>{% endfor %}")
    turns = [("user", "Hi"), ("assistant", "Ho")]
    chat = [{"role": r, "content": c} for r, c in turns]
    ids = tokenize(["a", "b", chat, chat, "c"], made, 96, "f")
    # No line break is in this vocabulary; nothing follows the last answer.
    assert made.decode(ids) == "ab<uHi><aHo><uHi><aHo>c"


def test_a_chat_that_a_template_refuses_is_named():
    made = characters(False, "{{ raise_exception('no') }}")
    chat = [{"role": "user", "content": "How are you?"}]
    with pytest.raises(UserError, match=r"f\.jsonl: chat that begins 'How are you\?': characters"):
        tokenize([chat], made, 96, "f.jsonl")
    with pytest.raises(UserError, match=r"f\.jsonl: holds chats, and characters has no chat templ"):
        tokenize(["text", chat], characters(False, None), 96, "f.jsonl")


def test_token_outside_the_vocabulary(tokenizer):
    assert tokenize(["xyz"], tokenizer, 26, "f") == [23, 24, 25]
    with pytest.raises(UserError) as error:
        tokenize(["xyz"], tokenizer, 25, "some.txt")
    expected = "some.txt: token 25 ('z') is outside the model's vocabulary of 25; expected 0 to 24;"
    assert str(error.value).startswith(expected)


def test_windows():
    ids = list(range(10))
    got = cut(ids, 3, 8, "f")
    assert got.dtype == np.int32
    assert got.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut(ids, 3, 2, "f").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut(ids, 10, 1, "f").shape == (1, 10)
    with pytest.raises(UserError, match=r"some\.txt: 10 tokens are too few; expected at least 11"):
        cut(ids, 11, 1, "some.txt")
