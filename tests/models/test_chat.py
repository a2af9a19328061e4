"""Chats are rendered as transformers renders them, or refused where it refuses."""

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import chat_template_utils as reference

from qnpu_jax.errors import UserError
from qnpu_jax.models import chat
from qnpu_jax.models.chat import (
    FIXED_DATE,
    after_an_answer,
    python_methods,
    render_chat,
    render_question,
)
from qnpu_jax.models.chat import SYSTEM as SYSTEM_MESSAGE

SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": '  Où est "l\'été"?\n<b>&</b> 你好 😀  '}
ANSWER = {"role": "assistant", "content": "Là-bas."}
CHATS = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "Why?"}],
    "two answers": [USER, ANSWER, ANSWER],
    "nothing": [],
}
TEMPLATES = {
    # The shape of SmolLM2's and Qwen's: a system message of their own where there is none.
    "chatml": """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
        {{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {% endif %}
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # Llama 3.1's: BOS, the date, tools that are not there, trimmed contents.
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{%- if documents is defined and documents is none %}{{- "no documents\\n" }}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}""",
    # Mistral's and Gemma's: roles must alternate, and a system message may be refused.
    "alternate": """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}""",
    # Templates for training mark answers; what the mark's body sets is not seen behind it.
    "generation": """{% set seen = 0 %}{% for m in messages %}{% if m.role == 'assistant' %}
    {% generation %}{% set seen = 1 %}{{ m.content }}{{ seen }}{% endgeneration %}
{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{{ seen }}{% endfor %}""",
    "loop controls": """{% set ns = namespace(n=0) %}{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}{% if ns.n == 1 %}{% break %}{% endif %}
{% set ns.n = ns.n + 1 %}{{ loop.index }} {{ m.content }}
{% endfor %}""",
    "json": """{{ messages | tojson }}{{ messages | tojson(indent=2) }}
{{- messages | tojson(ensure_ascii=True) }}{{ messages | tojson(True, 1) }}
{{- {'b': 1, 'a': none} | tojson(separators=(',', ':'), sort_keys=True) }}""",
    "undefined": "{{ unk_token }}{{ messages[0].name }}{{ tools }}{{ documents }}",
    "macro": """{%- macro turn(m) -%}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{%- endmacro -%}
{% for m in messages %}    {{ turn(m) }}
    {# a comment #}
{% endfor %}{{ dict(a=1).items() | list }}""",
    "private": "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "private at once": "{% set ns = namespace(__init__=1) %}x",
    "immutable": "{{ messages.append(1) }}",
    "broken": "{% if %}",
}


class Noon(datetime.datetime):
    """A clock that stands still, so that two renderings see one date."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 2, 29, 12)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendered_as_transformers_renders(template, messages, monkeypatch):
    monkeypatch.setattr(reference, "datetime", Noon)
    monkeypatch.setattr(chat, "datetime", SimpleNamespace(datetime=Noon))
    source, conversation = TEMPLATES[template], CHATS[messages]
    try:
        expected, _ = reference.render_jinja_template(
            [conversation], chat_template=source, add_generation_prompt=True, **SPECIAL
        )
    except Exception:  # refused there, by whatever exception: refused here, in one line
        with pytest.raises(UserError, match=r"^tiny: the chat template does not render"):
            render_chat(source, conversation, SPECIAL, "tiny")
        return
    assert render_chat(source, conversation, SPECIAL, "tiny") == expected[0]


def test_the_templates_say_something():
    """Of every template that can be rendered, so that no comparison above is of nothing."""
    turns = CHATS["turns"]
    refused = {"alternate", "private", "private at once", "immutable", "broken"}
    for name in TEMPLATES.keys() - refused:
        assert len(render_chat(TEMPLATES[name], turns, SPECIAL, "tiny")) >= 8, name
    for name in refused:
        with pytest.raises(UserError):
            render_chat(TEMPLATES[name], turns, SPECIAL, "tiny")
    assert render_chat(TEMPLATES["alternate"], [USER], SPECIAL, "tiny").startswith("<s>[INST]")
    assert "Là" in render_chat(TEMPLATES["json"], turns, SPECIAL, "tiny")
    assert "Environment" not in render_chat(TEMPLATES["llama3"], turns, SPECIAL, "tiny")


REASONED = {"role": "assistant", "content": "4", "reasoning": "2+2", "name": None}


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content", "name", "content"])
def test_messages_reach_a_template_as_in_transformers(name):
    """Under every name that templates read, and without what is None."""
    source = "{% for m in messages %}{{ m." + name + " }}{{ m.keys() | list }}{% endfor %}"
    chat_ = [USER, REASONED, {"role": "assistant", "content": None, "thinking": "so"}]
    normal = [{k: v for k, v in m.items() if v is not None} for m in chat_]
    expected, _ = reference.render_jinja_template(
        [normal], chat_template=source, add_generation_prompt=True, **SPECIAL
    )
    assert render_chat(source, chat_, SPECIAL, "tiny") == expected[0]


def test_a_fixed_date_takes_the_place_of_the_clock():
    source = "{{ strftime_now('%Y-%m-%d %H:%M') }}"
    assert render_chat(source, [USER], SPECIAL, "tiny", now=FIXED_DATE) == "2024-07-26 00:00"


REFUSES = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"


def test_a_system_message_where_the_template_asks_for_one():
    source = REFUSES + TEMPLATES["chatml"]
    begun = [{"role": "system", "content": SYSTEM_MESSAGE}, USER]
    assert render_question(source, [USER], SPECIAL, "tiny") == render_chat(
        source, begun, SPECIAL, "tiny"
    )
    # Not where the template takes the question as it is, nor where it would not help.
    plain = TEMPLATES["llama3"]
    assert render_question(plain, [USER], SPECIAL, "tiny", FIXED_DATE) == render_chat(
        plain, [USER], SPECIAL, "tiny", now=FIXED_DATE
    )
    with pytest.raises(UserError, match="system first"):
        render_question(source, [ANSWER], SPECIAL, "tiny")
    with pytest.raises(UserError, match="no roles"):
        render_question("{{ raise_exception('no roles') }}", [USER], SPECIAL, "tiny")


def test_what_follows_an_answer():
    assert after_an_answer(TEMPLATES["chatml"], SPECIAL).startswith("<|im_end|>\n\n<|im_start|>")
    assert after_an_answer(TEMPLATES["alternate"], SPECIAL).startswith("</s>[INST]")
    assert after_an_answer(REFUSES + TEMPLATES["chatml"], SPECIAL).startswith("<|im_end|>")
    assert after_an_answer(TEMPLATES["broken"], SPECIAL) == ""


@pytest.mark.parametrize("template", TEMPLATES)
def test_methods_of_python(template):
    methods = {"macro": ["items"], "immutable": ["append"]}
    assert python_methods(TEMPLATES[template]) == methods.get(template, [])


def test_refusals_are_one_line():
    with pytest.raises(UserError) as error:
        render_chat("{{ raise_exception('no\\n  system role') }}", [SYSTEM], {}, "tiny")
    assert str(error.value).startswith(
        "tiny: the chat template does not render 1 messages (no system role); expected roles"
    )
