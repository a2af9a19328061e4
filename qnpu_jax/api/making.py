"""A checkpoint made into integers, and integers into a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from qnpu_jax import artifacts, pipeline
from qnpu_jax.api.arguments import (
    Ids,
    check_checkpoint,
    check_choice,
    check_integer,
    check_model,
    effort_of,
    observer_of,
    path_of,
    recipe_of,
    room,
    text_of,
)
from qnpu_jax.choices import Positions
from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params
from qnpu_jax.integer import IntegerModel
from qnpu_jax.learn import learns
from qnpu_jax.models import Checkpoint
from qnpu_jax.progress import Observer
from qnpu_jax.proof import bound_accumulators
from qnpu_jax.recipes import Effort, Recipe
from qnpu_jax.text import check_share, excerpts, mixed, starts_of
from qnpu_jax.tflite import build_cached, build_prefill, check_name


def quantize(
    checkpoint: Checkpoint,
    recipe: str | Path | Recipe = "w8a8",
    *,
    effort: str | Effort = "none",
    text: str | Path | Sequence[str] | Ids | None = None,
    own_share: float = 0.0,
    progress: Observer | Callable[[str, int, int], object] | None = None,
) -> IntegerModel:
    """Quantizes a model: every tensor an integer with a scale that is fixed before it runs.

    Folds the norms, rotates, finds a prefix, sets ranges on calibration text, learns what the
    recipe says, and rounds once. Equal arguments give equal integers, those of `qnpu quantize`.

    Args:
      checkpoint: of `load`.
      recipe: a name of `RECIPES`, a JSON file, or a `Recipe`.
      effort: how much is learned: a name of `EFFORTS` or an `Effort`. With "none" the recipe's
        stages calibrate and round only.
      text: calibrated with and learned from. None: the model writes it. A path: plain text or JSON
        lines. A list of strings: documents. (N, T) token ids without BOS: windows as they are.
      own_share: of windows that the model writes itself, beside those of `text`: 0 to 1.
      progress: called with (what runs, how much is done, how much there is; 0 where that is not
        known), or an `Observer`. By default nothing is shown.

    Returns: the integers; nothing is written.

    Raises:
      UserError: no such recipe, effort or file; a share beside no text; text that is too short or
        not of this vocabulary; a model with fewer positions than the recipe needs; an accumulator
        that can overflow; learning that diverges.

    Example:
      >>> model = qnpu.quantize(checkpoint, "w8a8", text=windows)
      >>> model.config.num_layers
      2
    """
    check_checkpoint(checkpoint)
    recipe, effort = recipe_of(recipe), effort_of(effort)
    config, watch = checkpoint.config, observer_of(progress)
    taught = effort if learns(recipe, effort) else None
    given = _given(text, own_share, config, recipe, taught)
    judges = excerpts.judged(checkpoint, taught)
    found = None if given is None else excerpts.given(given, checkpoint, recipe, taught)
    with watch.stage("fold, rotate"):
        params = pipeline.prepare(config, checkpoint.params, recipe)
    found = _with_own(found, own_share, checkpoint, params, recipe, taught, watch)
    windows, starts = excerpts.windows_of(*found, judges), starts_of(checkpoint.tokenizer)
    made = pipeline.quantize(config, params, recipe, windows, starts, effort=effort, watch=watch)
    return made.model


def _check_lengths(
    config: ModelConfig, recipe: Recipe, given: object, taught: Effort | None
) -> None:
    """Refuses windows that are longer than the model has positions for."""
    length = given.shape[1] if isinstance(given, np.ndarray) else recipe.calibration_length
    asked = {"calibration_length" if given is None else "text": length}
    pipeline.check_model(config, recipe, asked | ({"effort": taught.length} if taught else {}))


def _given(
    text: str | Path | Sequence[str] | Ids | None,
    own_share: float,
    config: ModelConfig,
    recipe: Recipe,
    taught: Effort | None,
) -> Path | list[str] | np.ndarray | None:
    """The caller's text, checked."""
    check_share(own_share, text is not None)
    given = None if text is None else text_of(text, config)
    _check_lengths(config, recipe, given, taught)
    return given


def _with_own(
    found: excerpts.Material | None,
    own_share: float,
    checkpoint: Checkpoint,
    params: Params,
    recipe: Recipe,
    taught: Effort | None,
    watch: Observer,
) -> excerpts.Material:
    """Calibration and learning text: what was given, with what the model writes itself."""
    if found is not None and not own_share:
        return found
    if found is not None:  # windows of ids have a length of their own
        length = found.calibration.windows.shape[1]
        recipe = replace(recipe, calibration_length=length)
    with watch.stage("calibration text"):
        steps = partial(watch.track, what="calibration text")
        own = excerpts.written(checkpoint, params, recipe, taught, steps)
    return own if found is None else mixed(found, own, own_share)


def write_tflite(
    model: IntegerModel,
    path: str | Path,
    tokens: int = 128,
    logits: Positions = "all",
    context: int | None = None,
) -> None:
    """Writes a model as an integer-only .tflite, in place of an older file of that name.

    The signature `prefill_<tokens>` takes ids int32 (tokens,) and gives codes of the logits. With a
    context the file has a KV cache, and the signature `decode` for one token too.

    Args:
      model: of `quantize`.
      path: of the file; its folder exists.
      tokens: of a prefill, 2 or more; multiples of 64 are fastest.
      logits: of `all` positions, or of the `last` only.
      context: positions of the KV cache, after the prefix; None for none.

    Raises:
      UserError: no model; lengths that the model or the cache has no room for; an accumulator that
        can overflow at this length; a file that cannot be written or is named as a package.

    Example:
      >>> qnpu.write_tflite(model, "model.tflite", tokens=16)
      >>> qnpu.write_tflite(model, "chat.tflite", tokens=16, logits="last", context=64)
    """
    check_model(model)
    path = path_of(path)
    check_choice("logits", logits, ("all", "last"))
    check_integer("tokens", tokens, 2, room(model) if context is None else room(model) - 1)
    if context is not None:
        check_integer("context", context, tokens + 1, room(model))
    check_name(path)
    bound_accumulators(model, context or tokens, logits)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a file; name one in it")
    with artifacts.new_file(path, replace=True) as partial:
        if context is None:
            build_prefill(model, tokens, logits).write(partial)
        else:
            build_cached(model, tokens, context, logits).write(partial)
