"""Integers run: in the simulator, by LiteRT beside it, and as a generator of text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.api.arguments import (
    Ids,
    check_choice,
    check_integer,
    check_model,
    ids_of,
    path_of,
    room,
    unexpected,
)
from qnpu_jax.api.making import write_tflite
from qnpu_jax.choices import KernelSet
from qnpu_jax.integer import IntegerModel
from qnpu_jax.models import Tokenizer
from qnpu_jax.proof import Comparison, verify_file
from qnpu_jax.runtime import (
    Backend,
    LiteRTBackend,
    Sampling,
    Session,
    SimulatedBackend,
    check_room,
    generate_ids,
    prompt_ids,
    text_pieces,
)
from qnpu_sim import Profile, compile_model, run

PREFILL, CONTEXT = 128, 512
"""Lengths of the file that `generate` runs, where the model has as many positions."""


def simulate(
    model: IntegerModel, ids: Ids, keep: str | None = None, profile: Profile = "litert_ref"
) -> Any:
    """Runs a model in the bit-exact simulator.

    Compiles it for this length first. For many texts of one length call `qnpu_sim.compile_model`
    once, and `qnpu_sim.run` for each.

    Args:
      model: of `quantize`.
      ids: (T,) or (N, T) token ids, without the prefix.
      keep: a shell-style pattern of names of tensors, such as "layers.3.attn.*"; "*" keeps all.
      profile: whose bits: `litert_ref`, `litert_opt`, `litert_xnn`, `npu`, or an `Npu` with
        options.

    Returns:
      Without `keep`, codes of the logits (.., T, V), int8 or int16. With it, a dict of codes by
      global name: of the tensors that match, and of "head.logits".

    Raises:
      UserError: no model; ids that are no integers, outside the vocabulary or more than the model
        has room for; a pattern that matches nothing; no such profile, or one in which the model's
        accumulators do not fit.

    Example:
      >>> qnpu.simulate(model, ids).shape
      (16, 320)
      >>> sorted(qnpu.simulate(model, ids, keep="layers.1.mlp.res*"))
      ['head.logits', 'layers.1.mlp.residual']
    """
    check_model(model)
    ids = ids_of(ids, model.config, "ids", room(model), ranks=(1, 2))
    program = compile_model(model, model.decoder(ids.shape[-1]), profile)
    if keep is None:
        return np.asarray(run(program, ids)["head.logits"])
    return {name: np.asarray(x) for name, x in run(program, ids, keep=keep).items()}


def verify(
    model: IntegerModel, path: str | Path, ids: Ids, kernels: KernelSet = "ref"
) -> Comparison:
    """Compares every tensor of a file, run by LiteRT, with the simulator's.

    Args:
      model: that the file was written of.
      path: a .tflite of `write_tflite`, or a folder of `qnpu quantize`.
      ids: (T,) token ids of some text, at least as many as the file's prefill takes; with a KV
        cache one more, and twice as many with 4 more at most are used.
      kernels: LiteRT's `ref`, `opt`, or `xnn` (XNNPACK, one op at a time); `tf` for TensorFlow's
        interpreter.

    Returns:
      Tensors and elements that were compared, and each tensor that differs.

    Raises:
      UserError: no such file, one of another model, or ids that are too few or not of this model.

    Example:
      >>> qnpu.write_tflite(model, "model.tflite", tokens=16)
      >>> qnpu.verify(model, "model.tflite", ids).differing
      0
    """
    check_model(model)
    check_choice("kernels", kernels, get_args(KernelSet))
    path = path_of(path)
    ids = ids_of(ids, model.config, "ids", None, ranks=(1,))
    return verify_file(path / artifacts.MODEL if path.is_dir() else path, model, ids, kernels)


def generate(
    model: IntegerModel,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    tokenizer: Tokenizer,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    context: int | None = None,
    backend: Literal["litert", "sim"] = "litert",
) -> str:
    """Generates text over a KV cache, with integers only up to the logits.

    Args:
      model: of `quantize`.
      prompt: text to go on with; or a chat, whose answer is given: a list of {"role": "user",
        "content": text}.
      tokenizer: `checkpoint.tokenizer`.
      max_tokens: at most so many; a token that ends a turn ends it too.
      sampling: a `qnpu_jax.runtime.Sampling`; by default the likeliest token is taken.
      context: positions of the cache, prompt and answer; by default 512, or what the model has.
      backend: `litert` writes a file for a while, and runs it by XNNPACK; `sim` is the simulator,
        in the bits of the reference kernels.

    Returns:
      The text that follows, without the prompt.

    Raises:
      UserError: no model or tokenizer; a prompt that is empty or does not fit the context; a chat
        for a model without a chat template.

    Example:
      >>> text = qnpu.generate(model, "A list is", tokenizer=checkpoint.tokenizer, max_tokens=4)
      >>> len(checkpoint.tokenizer.encode(text)) <= 4
      True
    """
    check_model(model)
    if not isinstance(tokenizer, Tokenizer):
        raise unexpected("tokenizer", "a Tokenizer", tokenizer, "pass checkpoint.tokenizer")
    check_choice("backend", backend, ("litert", "sim"))
    check_integer("max_tokens", max_tokens, 1, 2**31 - 1)
    context = min(CONTEXT, room(model)) if context is None else context
    check_integer("context", context, 3, room(model))
    ids = prompt_ids(tokenizer, prompt, bos=not model.prefix)
    before = ids if isinstance(prompt, str) else ()
    ids_of(ids, model.config, "prompt", None, ranks=(1,))
    check_room(len(ids), 0, context)
    stops, sampling = tokenizer.eos_ids, sampling or Sampling()
    with _runner(model, min(PREFILL, context - 1), context, backend) as runner:
        made = generate_ids(Session(runner), ids, sampling, max_tokens, stops)
        return "".join(text_pieces(made, tokenizer, before))


@contextmanager
def _runner(model: IntegerModel, prefill: int, context: int, backend: str) -> Iterator[Backend]:
    """Opens a backend over a KV cache; LiteRT's file lives as long as the block."""
    if backend == "sim":
        yield SimulatedBackend(model, prefill, context)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        write_tflite(model, file, prefill, "last", context)
        yield LiteRTBackend(file)
