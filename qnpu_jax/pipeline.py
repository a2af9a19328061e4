"""From a checkpoint to an `IntegerModel`: fold, rotate, centre keys, prefix, norms, calibrate,
learn, freeze."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from qnpu_jax import heap
from qnpu_jax.calibrate import (
    Coverage,
    calibrate_activations,
    collect_statistics,
    cover,
    weight_scales,
    window_peaks,
)
from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder, Params, Scales, decoder
from qnpu_jax.integer import IntegerModel, check_bits, freeze
from qnpu_jax.learn import Calibrated, History, Store, learn, learns
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import EFFORTS, Effort, Recipe
from qnpu_jax.text import Windows
from qnpu_jax.transform import (
    PrefixReport,
    Starts,
    add_prefix,
    centre_keys,
    channel_copies,
    channel_peaks,
    check_folded,
    find_prefix,
    fold_norms,
    identity_diagonal,
    key_centres,
    limit_peaks,
    random_rotation,
    rotate,
    scale_channels,
    smoothquant,
    split_channels,
    with_double_norms,
)


@dataclass(frozen=True)
class Quantized:
    """A quantized model, and how it was made.

    Attributes:
      model: the frozen integers.
      params: float parameters that were frozen: rotated, with the prefix's K/V and all that was
        learned (where weights or biases learned, no longer the float model).
      reference: parameters of the original float model: no prefix but its own BOS.
      prefixed: parameters of the float model after the prefix.
      prefix: how the prefix was chosen; None where none was searched.
      ranges: one row per calibrated tensor and layer.
      histories: record of each stage that learned.
      coverage: how calibration windows were chosen; None where they were not.
    """

    model: IntegerModel
    params: dict[str, Any]
    reference: dict[str, Any]
    prefixed: dict[str, Any]
    prefix: PrefixReport | None
    ranges: list[dict[str, object]]
    histories: list[History] = field(default_factory=list)
    coverage: Coverage | None = None


@dataclass(frozen=True)
class Prefixed:
    """A float model that is ready to calibrate.

    Attributes:
      config: with the double norms that the model needs, and the channels that were added.
      params: keys centred, with the prefix's K/V.
      original: parameters of the original float model: no prefix but its own BOS; with the channels
        that were added, which change nothing.
      tokens: the prefix.
      found: how it was chosen; None where none was searched.
    """

    config: ModelConfig
    params: Params
    original: Params
    tokens: tuple[int, ...]
    found: PrefixReport | None


def prepare(
    config: ModelConfig, params: Params, recipe: Recipe, *, consume: bool = False
) -> Params:
    """Folds norms into weights, and rotates them where the recipe says so.

    Args:
      params: a checkpoint's, as `fold_norms` takes them.
      consume: remove each tensor from `params`, a dict, once its result exists. Memory then never
        holds more than all parameters once and one of them a second time.

    Returns:
      Parameters of the float model that is quantized, float32 on the device.

    Raises:
      UserError: a parameter is missing or unknown.
    """
    made = fold_norms(config, params, consume=consume)
    if recipe.rotation == "hadamard":
        made = rotate(config, made, random_rotation(config, recipe.seed), consume=True)
    # One by one: transfers run in the background, and each would keep its source until it is done.
    # `jnp.asarray` would make a copy on the host first.
    return {name: jax.device_put(made.pop(name)).block_until_ready() for name in list(made)}


def check_model(config: ModelConfig, recipe: Recipe, asked: Mapping[str, int]) -> None:
    """Checks that a recipe can quantize a model at these lengths, before anything is computed.

    Args:
      asked: tokens of each signature and window, by the name of the setting that asks for them.

    Raises:
      UserError: more positions than the model has, a rule of the bit plan that matches no tensor,
        or bits that no kernel has.
    """
    longest = recipe.max_prefix if recipe.prefix == "auto" else 1
    for name, length in asked.items():
        if length + longest > config.max_positions:
            raise UserError(
                f"{name}: {length} tokens after a prefix of up to {longest}; expected at most the"
                f" model's {config.max_positions} positions; choose"
                f" {'another effort' if 'effort' in name else f'a shorter {name}'}"
            )
    check_bits(decoder(config, recipe.bits, next(iter(asked.values())), longest))


def quantize(
    config: ModelConfig,
    params: Params,
    recipe: Recipe,
    text: Windows,
    starts: Starts,
    *,
    effort: Effort = EFFORTS["none"],
    store: Store | None = None,
    watch: Observer | None = None,
) -> Quantized:
    """Calibrates, learns and freezes prepared parameters.

    Args:
      params: from `prepare`.
      text: windows of ids, without BOS.
      starts: how the model's sequences begin, and tokens that may do well as a prefix.
      effort: how much is learned; by default nothing is.
      store: of checkpoints; by default none are kept.
      watch: keeps the seconds of each stage, and hears of progress.

    Raises:
      UserError: parameters that are not prepared, an accumulator can overflow, non-finite values,
        learning diverged.
    """
    watch = watch or Observer()
    begun = with_prefix(config, params, recipe, text, starts, watch)
    clips = prefix_clips(begun.found, learns(recipe, effort))
    with watch.stage("calibrate"):
        dec = decoder(begun.config, recipe.bits, text.calibration.shape[1], len(begun.tokens))
        text, coverage = _chosen(dec, begun.params, recipe, text, watch)
        params, free, ranges = _calibrated(dec, begun.params, recipe, text, clips, watch)
        if learns(recipe, effort):  # whatever freezing refuses, it refuses before hours of learning
            freeze(dec, params, free, begun.tokens)
    with watch.stage("learn"):
        calibrated = Calibrated(dec, params, free, clips, begun.original)
        made = learn(calibrated, recipe, effort, text, store, watch)
    with watch.stage("freeze"):
        model = freeze(dec, made.params, made.free, begun.tokens)
    heap.trim()
    floats = (dict(made.params), dict(begun.original), dict(params))
    return Quantized(model, *floats, begun.found, ranges, made.histories, coverage)


def with_prefix(
    config: ModelConfig,
    params: Params,
    recipe: Recipe,
    text: Windows,
    starts: Starts,
    watch: Observer,
) -> Prefixed:
    """Centres keys, chooses and adds the prefix, and takes norms twice where that is needed.

    Args: as of `quantize`.
    """
    check_folded(config, params)
    if recipe.centre_keys:
        with watch.stage("centre keys"):
            centres = key_centres(config, recipe.bits, params, text.calibration)
            config, params = centre_keys(config, params, centres)
    original = add_prefix(config, recipe.bits, params, starts.bos)
    tokens, found = _prefix(config, params, recipe, text, starts, watch)
    params = add_prefix(config, recipe.bits, params, tokens)
    if recipe.double_norms:
        with watch.stage("calibrate"):
            config = with_double_norms(config, recipe.bits, params, text.calibration)
    if recipe.split_channels:
        with watch.stage("calibrate"):
            dec = decoder(config, recipe.bits, text.calibration.shape[1], len(tokens))
            loud = channel_peaks(dec, params, text.calibration).act
            copies = channel_copies(loud, recipe.split_channels)
            config, params = split_channels(config, params, copies)
            # Teacher and student share what they have in common.
            original = dict(original) | {n: params[n] for n in params if ".mlp." in n}
    return Prefixed(config, params, original, tokens, found)


def calibrated(begun: Prefixed, recipe: Recipe, text: Windows, watch: Observer) -> Calibrated:
    """Sets every range of a float model, as for learning.

    Args: as of `quantize`.
    """
    clips = prefix_clips(begun.found, learning=True)
    with watch.stage("calibrate"):
        dec = decoder(begun.config, recipe.bits, text.calibration.shape[1], len(begun.tokens))
        text, _ = _chosen(dec, begun.params, recipe, text, watch)
        params, free, _ = _calibrated(dec, begun.params, recipe, text, clips, watch)
    return Calibrated(dec, params, free, clips, begun.original)


def _chosen(
    dec: Decoder, params: Params, recipe: Recipe, text: Windows, watch: Observer
) -> tuple[Windows, Coverage | None]:
    """The windows, those of calibration chosen from the pool where the recipe says so, and first in
    it."""
    pool = text.pool[: recipe.calibration_pool // text.calibration.shape[1]]
    if len(pool) <= len(text.calibration):
        return text, None
    found = cover(window_peaks(dec, params, pool, track=watch.track), len(text.calibration))
    heap.trim()
    chosen, others = text.pool[sorted(found.windows)], np.delete(text.pool, found.windows, axis=0)
    return replace(text, calibration=chosen, pool=np.concatenate([chosen, others])), found


def _calibrated(
    dec: Decoder, params: Params, recipe: Recipe, text: Windows, clips: bool, watch: Observer
) -> tuple[Params, Scales, list[dict[str, object]]]:
    """Parameters, scaled by channel where the recipe says so; free scales; a row for each range."""
    params = smoothed(dec, params, recipe, text)
    stats = collect_statistics(dec, params, text.calibration, track=watch.track)
    activations, ranges = calibrate_activations(dec, stats, recipe.activation_init, clips)
    heap.trim()
    return params, activations | weight_scales(dec, params, recipe.weight_init), ranges


def smoothed(dec: Decoder, params: Params, recipe: Recipe, text: Windows) -> Params:
    """Parameters with the recipe's diagonal scales, where it has some."""
    inputs = 0.0 if dec.config.merges_r1 else recipe.smooth_stream
    if not (recipe.smooth or inputs or recipe.peak_limit):
        return params
    peaks, cfg = channel_peaks(dec, params, text.calibration), dec.config
    one = identity_diagonal(cfg)
    inner = smoothquant(cfg, params, peaks, recipe.smooth) if recipe.smooth else one
    outer = smoothquant(cfg, params, peaks, inputs) if inputs else one
    ends = ("attn_in", "mlp_in", "attn_out", "mlp_out")
    factors = replace(inner, **{end: getattr(outer, end) for end in ends})
    if recipe.peak_limit:
        limits = limit_peaks(peaks.act * inner.up_down, recipe.peak_limit)
        # 16 bits hold a loud channel beside the others; 8 of a weight do not hold its inverse.
        narrow = np.array([bits <= 8 for bits in dec.layer["mlp.act"].quant.bits])
        limits = np.where(narrow[:, None], limits, 1.0)
        factors = replace(factors, up_down=inner.up_down * limits)
    return scale_channels(cfg, params, factors)


def _prefix(
    config: ModelConfig,
    params: Params,
    recipe: Recipe,
    text: Windows,
    starts: Starts,
    watch: Observer,
) -> tuple[tuple[int, ...], PrefixReport | None]:
    """Chooses the tokens before every sequence, and tells how: the model's own BOS where no prefix
    is searched."""
    if recipe.prefix == "none":
        return starts.bos, None
    with watch.stage("prefix"):
        domains = (text.calibration, text.other)
        found = find_prefix(config, recipe.bits, params, domains, starts, recipe.max_prefix)
    heap.trim()
    return found.tokens, found


def prefix_clips(found: PrefixReport | None, learning: bool) -> bool:
    """Whether ranges clip: where outliers are tame if something learns, and else where clipping
    does less harm.

    Learning starts from more error where ranges clip, and ends with less
    (`prefix_search.LEEWAY`).
    """
    if found is None:
        return False
    return found.ok if learning else found.clip
