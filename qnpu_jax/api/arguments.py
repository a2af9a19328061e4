"""What callers pass, checked at once: each mistake is a `UserError` of one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.integer import IntegerModel
from qnpu_jax.models import Checkpoint
from qnpu_jax.progress import Observer, Told
from qnpu_jax.recipes import Effort, Recipe, load_effort, load_recipe
from qnpu_jax.text import token_ids

Ids = np.ndarray | Array | Sequence[int] | Sequence[Sequence[int]]
"""Token ids: a NumPy or JAX array of integers, or lists."""


def check_checkpoint(value: Any) -> None:
    if not isinstance(value, Checkpoint):
        named = isinstance(value, str | Path)
        way_out = f"load it first: qnpu.load({str(value)!r})" if named else "pass what `load` gives"
        raise unexpected("checkpoint", "a Checkpoint", value, way_out)


def check_model(value: Any) -> None:
    if not isinstance(value, IntegerModel):
        floats = isinstance(value, Checkpoint)
        way_out = "quantize it first" if floats else "pass what `quantize` gives"
        raise unexpected("model", "an IntegerModel", value, way_out)


def unexpected(name: str, expected: str, value: Any, way_out: str) -> UserError:
    got = repr(value) if isinstance(value, str) else type(value).__name__
    return UserError(f"{name}: expected {expected}; got {got}; {way_out}")


def path_of(value: Any) -> Path:
    """A path that is given as a string or a Path."""
    if not isinstance(value, str | Path):
        raise unexpected("path", "a string or a Path", value, "name a file")
    return Path(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name}: expected one of {list(choices)}; got {value!r}; choose one")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(
            f"{name}: expected an integer from {low} to {high}; got {value!r}; change it"
        )


def room(model: IntegerModel) -> int:
    """Positions after the prefix."""
    return model.config.max_positions - len(model.prefix)


def recipe_of(recipe: Any) -> Recipe:
    if isinstance(recipe, str | Path):
        return load_recipe(recipe)
    if not isinstance(recipe, Recipe):
        raise unexpected("recipe", "a name, a JSON file or a Recipe", recipe, "see qnpu.RECIPES")
    return recipe


def effort_of(effort: Any) -> Effort:
    if isinstance(effort, str):
        return load_effort(effort)
    if not isinstance(effort, Effort):
        raise unexpected("effort", "a name or an Effort", effort, "see qnpu.EFFORTS")
    return effort


def observer_of(progress: Observer | Callable[[str, int, int], object] | None) -> Observer:
    if progress is None:
        return Observer()
    if not isinstance(progress, Observer) and not callable(progress):
        raise unexpected("progress", "a function or an Observer", progress, "or leave it out")
    return progress if isinstance(progress, Observer) else Told(progress)


def text_of(text: Any, config: ModelConfig) -> Path | list[str] | np.ndarray:
    """A file, documents, or windows of ids."""
    if isinstance(text, str) and ("\n" in text or len(text) > 255):
        raise UserError(
            f"text: {text[:40]!r}... is no path; expected a path, a list of strings, or windows of"
            " ids; put text itself in a list"
        )
    if isinstance(text, str | Path):
        return Path(text)
    if isinstance(text, list | tuple) and text and all(isinstance(t, str) for t in text):
        if not any(t.strip() for t in text):
            raise UserError("text: no text in it; expected at least one document; give some")
        return list(text)
    return ids_of(text, config, "text", None, least=8)


def ids_of(
    values: Any,
    config: ModelConfig,
    source: str,
    most: int | None,
    *,
    least: int = 1,
    ranks: tuple[int, ...] = (2,),
) -> np.ndarray:
    """Token ids, checked, of at least and at most so many in a row."""
    ids = token_ids(values, config.vocab_size, source, ranks)
    length, high = ids.shape[-1], most or config.max_positions
    if length < least or (most is not None and length > most):
        raise UserError(
            f"{source}: {length} tokens in a row; expected {least} to {high}; cut them to another"
            " length"
        )
    return ids
