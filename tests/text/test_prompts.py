"""Prompts of the model's own text: by its template, in scripts that it knows, and varied."""

import pytest
from characters import characters

from qnpu_jax.text.dialogues import QUESTIONS, chats
from qnpu_jax.text.openers import plain
from qnpu_jax.text.prompts import CHAT, _chats, _knows


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        ("U:{{ messages[0].content }}A:", "U:What is the capital"),
        ("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}", "26 Jul 2024 What is the"),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}[{{ m.content }}]{% endfor %}",
            "[You are a helpful assistant.][What is",
        ),
    ],
)
def test_chats_are_the_same_every_day_and_in_every_template(template, begins):
    made = characters(True, template)
    found = _chats(made)
    assert made.decode(found[0].ids).startswith(begins)
    asked = [chat.messages for chat in found if chat.domain == CHAT]
    assert asked == [(("user", question),) for question in QUESTIONS if _knows(made, question)]
    assert len(asked) > 30
    kinds = {chat.domain for chat in found}  # the others' first message is not their last
    assert kinds == ({CHAT, "system", "turns", "tools"} if "for m in" in template else {CHAT})


@pytest.mark.parametrize(
    ("template", "kinds"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", ["system", "turns", "tools"]),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif"
            " %}[{{ m.content }}]{% endfor %}",
            ["turns"],
        ),
        ("{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}", ["turns"]),
        ("[{{ messages[-1].content }}]", []),
    ],
)
def test_kinds_of_chats_that_a_template_takes(template, kinds):
    """Those of which it prints every message, in scripts that the tokenizer does not spell out."""
    made = characters(False, template)
    found = _chats(made)
    expected = {CHAT, *kinds}
    assert [chat.domain for chat in found[: len(expected)]] == [CHAT, *kinds]
    asked = [x for domain, x in chats() if domain in expected]
    assert [x.messages for x in found] == [
        x for x in asked if all(_knows(made, text) for _, text in x)
    ]


def test_a_script_that_is_spelled_out_is_not_known():
    """Characters are tokens of this one, and those that it lacks none."""
    made = characters(False, None)
    assert _knows(made, "A plain text.") and _knows(made, "中文 A")
    assert not _knows(made, "naïve it is")


def test_a_template_that_refuses_questions_leaves_free_text():
    assert _chats(characters(True, "{{ raise_exception('tools only') }}")) == []
    assert _chats(characters(True, None)) == []
    tools = "{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}"
    assert _chats(characters(True, tools)) == []  # it renders questions to nothing


def test_beginnings_are_varied():
    assert len(set(QUESTIONS)) == len(QUESTIONS) == 40
    assert max(map(len, QUESTIONS)) < 80
    assert len(set(chats())) == len(chats()) > 70
    for _, messages in chats():
        roles = [role for role, _ in messages if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert sum(len(content) for _, content in messages) < 400  # room for an answer
    assert len(set(plain())) == len(plain()) > 100
    tokenizer = characters(False, None)
    assert sum(bool(tokenizer.encode(text)) for _, text in plain()) > 50
