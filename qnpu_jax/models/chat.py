"""Chat templates: Jinja programs that come with a model, rendered in Jinja's sandbox.

The environment is the one templates are written for, Hugging Face's.

Reference: transformers/utils/chat_template_utils.py, `_compile_jinja_template`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qnpu_jax.errors import UserError


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], source: str
) -> str:
    """The text of a chat with the prompt for the assistant's answer at its end.

    Args:
      messages: {"role": ..., "content": ...}.
      special: bos_token, eos_token where the model has them.
      source: the model's name, for messages.
    Raises:
      UserError: the template is broken, or refuses these messages.
    """
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return env.from_string(template).render(
            messages=[dict(m) for m in messages], add_generation_prompt=True, **special
        )
    except Exception as error:  # a template is a program: any exception of any type may come out
        raise UserError(
            f"{source}: the chat template does not render {len(messages)} messages ({error});"
            " expected roles system, user, assistant in an order the model knows;"
            " correct the messages"
        ) from None


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own tojson escapes for HTML.
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (declared by Jinja)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
