"""An `IntegerModel` written as a .tflite with one prefill signature."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Positions, shared_names
from qnpu_jax.integer import IntegerModel
from qnpu_jax.tflite.emitter import Emitter, emit
from qnpu_jax.tflite.flatbuffer import ModelWriter
from qnpu_jax.tflite.forms import FileForm, Integers


def write_prefill(
    model: IntegerModel,
    path: Path,
    tokens: int,
    logits: Positions = "all",
) -> None:
    """Writes a model as a .tflite with the signature `prefill_<tokens>`.

    Input: `ids`, int32 (tokens,), without the prefix. Output: `logits`, int8 or int16 codes
    (tokens, V), or (1, V) with `logits="last"`.

    Args:
      tokens: static length of the prefill.
      logits: of every position, or of the last only.

    Raises:
      UserError: more positions than the model has.
    """
    build_prefill(model, tokens, logits).write(path)


def build_prefill(
    model: IntegerModel, tokens: int, logits: Positions = "all", form: FileForm | None = None
) -> ModelWriter:
    """Returns the file of `write_prefill`, not yet written.

    Args:
      form: how the file holds the model; None takes `Integers`.
    """
    form = Integers(model) if form is None else form
    dec = model.decoder(tokens, logits=logits)
    writer = ModelWriter()
    subgraph = writer.add_subgraph("main")
    ids = subgraph.add_tensor("ids", (tokens,), "int32")
    readers, shared = shared_names(dec), {}
    for name, x in form.inputs(dec).items():
        graph, local, layer = readers[name]
        shared[name] = Emitter(form, subgraph, graph, layer).tensor(local, x, name)
    emitter, caches = partial(Emitter, form, subgraph), [{}] * dec.layer.layers
    out, _ = emit(emitter, dec, ids, shared, caches)
    subgraph.add_signature(f"prefill_{tokens}", {"ids": ids}, {"logits": out})
    return writer


def check_prefill(prefill: int) -> None:
    """Raises UserError for a prefill too short to be one."""
    if prefill < 2:
        raise UserError(f"prefill: {prefill} is too short; expected at least 2; raise --prefill")


def check_name(file: Path) -> None:
    """Raises UserError for a .tflite that would pass for a LiteRT-LM package by its name."""
    if file.suffix == ".litertlm":
        raise UserError(
            f"{file}: a plain .tflite would get this name; expected one that ends in .tflite;"
            " rename it, or write a package with `qnpu export --litertlm`"
        )
