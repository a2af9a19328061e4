"""Chat templates: Jinja programs that come with a model, rendered as transformers renders them.

The programs are strangers' code, so they run in Jinja's sandbox. transformers itself is not
imported: it takes 0.6 s and 35 MiB where this file takes 0.05 s, and a test compares the two.

Reference: transformers/utils/chat_template_utils.py, `_compile_jinja_template`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qnpu_jax.errors import UserError

FIXED_DATE = datetime.datetime(2024, 7, 26)
"""Date of chats that a model learns from or that are hashed, so that every day gives the same ids:
the one that Llama 3.2's template prints where it is given no clock."""
SYSTEM = "You are a helpful assistant."
"""System message for templates that refuse to begin without one."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning, each of which some template reads."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special: Mapping[str, str],
    source: str,
    *,
    now: datetime.datetime | None = None,
    answer_next: bool = True,
) -> str:
    """Renders a chat, by default up to where the assistant's next answer begins.

    >>> template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    >>> render_chat(template, [{"role": "user", "content": "Hi"}], {"eos_token": "</s>"}, "tiny")
    'user: Hi</s>'

    Args:
      template: Jinja source.
      messages: {"role": "system" | "user" | "assistant", "content": text}, in order.
      special: texts of bos_token, eos_token, unk_token and so on, where the model has them.
      source: the model's name, for messages.
      now: date and time that the template's `strftime_now` gives; None for the clock's.
      answer_next: end with what begins an answer.

    Raises:
      UserError: the template is broken, or refuses these messages.
    """
    # Without tools and documents templates read None, not Jinja's undefined: they test `is none`.
    given = {"messages": [_message(m) for m in messages], "tools": None, "documents": None}
    try:
        program = _environment(now).from_string(template)
        return program.render(**given, add_generation_prompt=answer_next, **special)
    except Exception as error:  # a template is a program: any exception of any type may come out
        reason = " ".join(str(error).split())
        raise UserError(
            f"{source}: the chat template does not render {len(messages)} messages ({reason});"
            " expected roles system, user, assistant in an order the model knows;"
            " correct the messages"
        ) from None


def render_question(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special: Mapping[str, str],
    source: str,
    now: datetime.datetime | None = None,
    answer_next: bool = True,
) -> str:
    """As `render_chat`, with the system message SYSTEM where the template asks for one.

    Chats that begin with the user's words are rendered as they are if the template takes them.

    Raises:
      UserError: as `render_chat`, whose reason is that of the chat as it was given.
    """
    try:
        return render_chat(template, messages, special, source, now=now, answer_next=answer_next)
    except UserError:
        if not messages or messages[0].get("role") != "user":
            raise
        begun = [{"role": "system", "content": SYSTEM}, *messages]
        with contextlib.suppress(UserError):
            return render_chat(template, begun, special, source, now=now, answer_next=answer_next)
        raise


def after_an_answer(template: str, special: Mapping[str, str]) -> str:
    """Gives what a template prints between an answer and the next question.

    >>> after_an_answer("{% for m in messages %}{{ m.content }}</s>{% endfor %}", {})
    '</s>Why?</s>'

    Returns:
      Text from the end of the answer on; empty where the template renders no such chat.
    """
    answer = "qnpu's answer"
    turns = [("user", "Who?"), ("assistant", answer), ("user", "Why?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    for messages in (chat, [{"role": "system", "content": SYSTEM}, *chat]):
        with contextlib.suppress(UserError):
            text = render_chat(template, messages, special, "", now=FIXED_DATE, answer_next=False)
            return text.rpartition(answer)[2] if answer in text else ""
    return ""


def python_methods(template: str) -> list[str]:
    """Names the methods of Python's strings, lists and dicts that a template calls.

    Jinja in other languages has filters instead: `x | trim` for `x.strip()`.

    >>> python_methods("{{ m.get('role') }}{{ loop.cycle('a', 'b') }}{{ m.content | trim }}")
    ['get']
    """
    try:
        program = _environment(None).parse(template)
    except jinja2.TemplateError:
        return []
    called = [call.node for call in program.find_all(jinja2.nodes.Call)]
    methods = {n.attr for n in called if isinstance(n, jinja2.nodes.Getattr) and not _of_loop(n)}
    return sorted(methods)


def _of_loop(node: jinja2.nodes.Getattr) -> bool:
    return isinstance(node.node, jinja2.nodes.Name) and node.node.name in ("loop", "self")


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a message as transformers passes it on: no None, reasoning by all its names."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _environment(now: datetime.datetime | None) -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda format: (now or datetime.datetime.now()).strftime(format)
    env.globals["dict"] = _Dict()
    env.globals["namespace"] = _Namespace
    return env


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Gives JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Dict:
    """Python's `dict` as far as templates may use it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with "_", a way out of older sandboxes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's: a template may say self=
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with _")


class _Generation(jinja2.ext.Extension):
    """Renders the body of `{% generation %}`, a tag that marks the assistant's words for training.

    The body is a scope of its own: what it sets ends with it.
    """

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        return caller()
