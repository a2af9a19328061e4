"""An `IntegerModel` written as a .tflite with one prefill signature."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Positions
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
    """Writes the signature `prefill_<tokens>`: ids int32 (tokens,) to logits (tokens or 1, V).

    Args:
      tokens: static length of the prefill.
      logits: of every position, or only the last.

    Raises:
      UserError: more positions than the model has.
    """
    build_prefill(model, tokens, logits).write(path)


def build_prefill(
    model: IntegerModel, tokens: int, logits: Positions = "all", form: FileForm | None = None
) -> ModelWriter:
    """The model of `write_prefill`, in memory; as integers, if `form` does not say otherwise."""
    form = Integers(model) if form is None else form
    dec = model.decoder(tokens, logits=logits)
    writer = ModelWriter()
    subgraph = writer.add_subgraph("main")
    ids = subgraph.add_tensor("ids", (tokens,), "int32")
    common = Emitter(form, subgraph, dec.layer, 0)
    shared = {name: common.tensor(name, x, name) for name, x in form.inputs(dec).items()}
    emitter, caches = partial(Emitter, form, subgraph), [{}] * dec.layer.layers
    out, _ = emit(emitter, dec.graphs, ids, shared, caches)
    subgraph.add_signature(f"prefill_{tokens}", {"ids": ids}, {"logits": out})
    return writer


def check_prefill(prefill: int) -> None:
    """Raises UserError for a prefill too short to be one."""
    if prefill < 2:
        raise UserError(f"prefill: {prefill} is too short; expected at least 2; raise --prefill")
