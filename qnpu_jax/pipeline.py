"""From a checkpoint to an `IntegerModel`: fold, rotate, prefix, calibrate, freeze. The stages of
the main job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qnpu_jax.calibrate import collect, initialize, weight_scales
from qnpu_jax.config import ModelConfig, Recipe
from qnpu_jax.decoder import decoder
from qnpu_jax.evaluate import Params
from qnpu_jax.freeze import IntegerModel, freeze
from qnpu_jax.prefix import PrefixReport, add_prefix, find_prefix
from qnpu_jax.rotate import fold_norms, random_rotation, rotate

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Wraps an iteration of known length for a progress bar: (items, length, what)."""


def untracked(items: Iterable[Any], _: int, __: str) -> Iterable[Any]:
    """No progress bar."""
    return items


@dataclass
class Clock:
    """Seconds per stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made.

    Attributes:
      model: the frozen integers.
      params: folded, rotated float parameters, with the prefix's K/V.
      prefix: how the prefix was chosen, None without one.
      ranges: one row per calibrated tensor and layer.
    """

    model: IntegerModel
    params: Params
    prefix: PrefixReport | None
    ranges: list[dict[str, object]]


def prepare(config: ModelConfig, params: Params, recipe: Recipe) -> Params:
    """Folded and rotated parameters on the device: the float model that is quantized."""
    folded = fold_norms(config, dict(params))
    if recipe.rotation == "hadamard":
        folded = rotate(config, folded, random_rotation(config, recipe.seed))
    return {name: jnp.asarray(x) for name, x in folded.items()}


def quantize(
    config: ModelConfig,
    params: Params,
    recipe: Recipe,
    windows: Int[np.ndarray, "n t"],
    bos: int | None,
    clock: Clock | None = None,
    track: Track = untracked,
) -> Quantized:
    """Calibrates and freezes prepared parameters.

    Args:
      params: from `prepare`.
      windows: (N, T) calibration ids, without BOS.
      bos: the id sequences start with, which starts the prefix.

    Raises:
      UserError: no prefix tames the outliers, an accumulator can overflow, non-finite values.
    """
    clock = clock or Clock()
    report = None
    if recipe.prefix == "auto":
        with clock.stage("prefix"):
            report = find_prefix(config, recipe.bits, params, windows, bos, recipe.max_prefix)
            if report.tokens:
                params = add_prefix(config, recipe.bits, params, report.tokens)
    tokens = report.tokens if report else ()
    dec = decoder(config, recipe.bits, windows.shape[1], len(tokens))
    with clock.stage("calibrate"):
        stats = collect(dec, params, windows, track=track)
        activations, ranges = initialize(dec, stats, recipe)
        free = activations | weight_scales(dec, params, recipe.weight_init)
    with clock.stage("freeze"):
        model = freeze(dec, params, free, tokens)
    return Quantized(model, params, report, ranges)
