"""Packages `.litertlm`: model, tokenizer, chat template and stop tokens in one file, which
LiteRT-LM runs as it is. PyPI's litert-lm-builder (extra `litertlm`) writes it.

Reference: google-ai-edge/LiteRT-LM, schema/py/litertlm_builder.py,
  runtime/proto/llm_metadata.proto, runtime/engine/engine_settings.cc (how metadata is used).
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from qnpu_jax import extras
from qnpu_jax.errors import UserError
from qnpu_jax.models import TOKENIZER, Tokenizer, python_methods
from qnpu_jax.runtime import litertlm_signatures
from qnpu_jax.tflite import Integers

BUILDER = "litert-lm-builder"
OLDEST = (0, 18)
"""First version whose metadata can say that a model does not think or call functions."""
EXTRA = "litertlm"

PLAIN_CONTENT = (
    "{%- set plain = namespace(messages=[]) -%}"
    "{%- for m in messages -%}"
    "{%- set text = m.content if m.content is string else m.content | map(attribute='text') | join"
    " -%}"
    "{%- set plain.messages = plain.messages + [{'role': m.role, 'content': text}] -%}"
    "{%- endfor -%}"
    "{%- set messages = plain.messages %}"
)
"""Jinja code that goes before a chat template and turns contents into plain text. LiteRT-LM passes
contents as lists of typed parts, which Hugging Face's templates would print as lists."""


def write_package(
    form: Integers, tokenizer_folder: Path, path: Path, prefill: int, context: int
) -> None:
    """Writes a `.litertlm` with the signatures of `litertlm_signatures.write_signatures`.

    The metadata names no start token, because BOS belongs to the prefix, whose keys and values are
    constants of the graph.

    Args:
      form: the model, and how the file holds it.
      tokenizer_folder: folder that `Tokenizer.save` wrote.
      path: file to write or replace. Its bytes differ from call to call, because the builder writes
        a random id and the time.
      prefill, context: as `litertlm_signatures.write_signatures`.

    Raises:
      UserError: the extra is missing or too old; a tokenizer without a token that ends a text; a
        chat template that calls methods of Python; or as `litertlm_signatures.write_signatures`.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    _check_template(tokenizer)
    builder_module = load_builder()
    facts = _metadata(tokenizer, context)
    with tempfile.TemporaryDirectory() as folder:
        tflite, facts_file = Path(folder) / "model.tflite", Path(folder) / "metadata.pb"
        litertlm_signatures.write_signatures(form, tflite, prefill, context)
        facts_file.write_bytes(facts.SerializeToString())
        builder = builder_module.LitertLmFileBuilder()
        kind = builder_module.TfLiteModelType.PREFILL_DECODE
        builder.add_tflite_model(str(tflite), kind)
        builder.add_hf_tokenizer(str(tokenizer_folder / TOKENIZER))
        builder.add_llm_metadata(str(facts_file))
        with path.open("wb") as file:
            builder.build(file, validate_metadata=True)


def load_builder() -> Any:
    """Imports the module litert_lm_builder.

    Raises:
      UserError: the extra is missing or too old.
    """
    got = extras.version(BUILDER, EXTRA)
    if tuple(int(n) for n in got.split(".")[:2] if n.isdecimal()) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UserError(
            f"{BUILDER}: version {got}, expected {wanted} or newer; {extras.remedy(EXTRA)}"
        )
    return importlib.import_module("litert_lm_builder")


def _metadata(tokenizer: Tokenizer, context: int) -> Any:
    """Returns the proto LlmMetadata of a model.

    Raises:
      UserError: the tokenizer has no token that ends a text.
    """
    if not tokenizer.eos_ids:
        raise UserError(
            f"{tokenizer.source}: names no token that ends a text; expected an eos_token, without"
            " which LiteRT-LM opens no session; add it to the model's tokenizer_config.json and run"
            " `qnpu quantize` again"
        )
    protos = importlib.import_module("litert_lm_builder.runtime.proto.llm_metadata_pb2")
    facts = protos.LlmMetadata(
        stop_tokens=[{"token_ids": {"ids": [i]}} for i in tokenizer.eos_ids],
        max_num_tokens=context,
        llm_model_type={"generic_model": {}},
        supports_thinking=False,
        supports_function_calling=False,
    )
    if tokenizer.chat_template is not None:
        facts.jinja_prompt_template = PLAIN_CONTENT + tokenizer.chat_template
    return facts


def _check_template(tokenizer: Tokenizer) -> None:
    """Refuses a chat template that LiteRT-LM's Jinja (minijinja) cannot render.

    Raises:
      UserError: the template calls methods of Python's strings, lists or dicts.
    """
    if methods := python_methods(tokenizer.chat_template or ""):
        called = ", ".join(f".{name}()" for name in methods)
        raise UserError(
            f"{tokenizer.source}: the chat template calls {called}; expected no methods of Python,"
            " which LiteRT-LM's Jinja lacks; write filters (x | trim, x | default('')) in the"
            " model's chat_template.jinja and run `qnpu quantize` again"
        )
