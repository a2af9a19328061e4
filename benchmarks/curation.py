"""Calibration windows chosen by coverage against the first ones and random ones, by KL.

The w8a8 model as calibrated, nothing learned, fake-quantized: KL to the original float model on
every judged text. Parameters, keys' centres, the prefix and the channel scales are made once, on
the first windows of the calibration text; rows differ in the windows that set ranges, and in
nothing else. Biases stay in float, which int32 biases nearly are.

A larger set of one order holds the smaller ones (the greedy order, or one random permutation), so
its statistics go on from theirs: an order costs as many windows as its largest set has. No pool
holds a judged text.

`python benchmarks/curation.py --text wikitext2-test.txt --others code.txt essays.txt
--calibration wikipedia-passages.txt --own 131072 --json curation.json --figure curation.svg`

Exit status: 0; 2 if it could not run.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import curation_figure
import jax
import jax.numpy as jnp
import numpy as np
import outcome
from protocol import MAIN, Bench, add_arguments, count_from, in_turn, load, quick, settings_of
from rows import Job, Row, kept_rows, table

from qnpu_jax import pipeline
from qnpu_jax.calibrate import (
    Peaks,
    calibrate_activations,
    collect_statistics,
    cover,
    coverage_of,
    weight_scales,
    window_peaks,
)
from qnpu_jax.calibrate.statistics import Statistics
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import forward
from qnpu_jax.graph import Decoder, Params, Scales, decoder, resolve
from qnpu_jax.measure.perplexity import Logits, divergence, float_logits
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import Recipe, load_recipe
from qnpu_jax.text import excerpts, files, self_written
from qnpu_jax.text.starts import starts_of
from qnpu_jax.text.windows import Windows

FILES, OWN = "files", "files and own"
"""Pools: of the calibration texts alone, and in turn with the model's own."""
CHOSEN, FIRST, RANDOM = "chosen", "first", "random"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.set_defaults(effort="none", no_simulator=True)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument(
        "--sizes", type=count_from(1), nargs="+", default=[32, 64, 128, 256, 512],
        help="windows that set ranges, in each row",
    )  # fmt: skip
    parser.add_argument(
        "--pool", type=count_from(1), default=262_144, metavar="TOKENS",
        help="of each pool, at most",
    )  # fmt: skip
    parser.add_argument("--seeds", type=count_from(0), nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--quantile", type=float, default=1.0, help="of peaks over the pool: what counts as covered"
    )
    parser.add_argument("--figure", type=Path, help="KL against the number of windows, to draw")
    parser.add_argument(
        "--quick", action="store_true",
        help="2 windows judged, 4 and 8 of a pool of 16 to choose, no prefix: does it work?",
    )  # fmt: skip
    args = parser.parse_args()
    args.sizes = sorted(set(args.sizes))
    if args.quick:
        args.windows, args.sizes, args.pool, args.seeds = 2, [4, 8], 4096, [0]
    return args


@dataclass(frozen=True)
class Model:
    """A float model that is ready to calibrate, and what it is judged by.

    Attributes:
      params: rotated, smoothed, with the prefix's K/V.
      weights: scales of the weights, which no window changes.
      tame: ranges may clip.
      original: the reading of the original float model.
    """

    recipe: Recipe
    dec: Decoder
    params: Params
    weights: Scales
    tame: bool
    original: Logits


class Pool(NamedTuple):
    """Windows to choose from, and their peaks."""

    windows: np.ndarray
    peaks: Peaks


@dataclass
class Order:
    """An order of a pool's windows, and the ranges that its first ones set.

    Attributes:
      windows: (N, T) token ids, in this order.
      taken: windows in the statistics.
    """

    windows: np.ndarray
    taken: int = 0
    stats: Statistics | None = field(default=None, repr=False)

    def scales(self, model: Model, size: int) -> Scales:
        """Resolved scales from the first `size` windows; sizes must grow from call to call."""
        if size > self.taken:
            more = self.windows[self.taken : size]
            self.stats = collect_statistics(model.dec, model.params, more, onto=self.stats)
            self.taken = size
        assert self.taken == size and self.stats is not None
        method = model.recipe.activation_init
        found, _ = calibrate_activations(model.dec, self.stats, method, model.tame)
        return resolve(model.dec, found | model.weights)


class Study:
    """Everything that rows share, made when the first of them is measured."""

    def __init__(self, args: argparse.Namespace, bench: Bench) -> None:
        self.args, self.bench = args, bench
        recipe = load_recipe(args.recipe)
        self.recipe = quick(recipe) if args.quick else recipe

    @functools.cached_property
    def prepared(self) -> Params:
        checkpoint = self.bench.checkpoint
        return pipeline.prepare(checkpoint.config, checkpoint.params, self.recipe)

    @functools.cached_property
    def model(self) -> Model:
        checkpoint, recipe = self.bench.checkpoint, self.recipe
        length = recipe.calibration_length
        first = in_turn(self.bench.calibration, length, recipe.calibration_tokens)
        text = Windows.of(first, excerpts.judged(checkpoint, None).other.windows)
        starts = starts_of(checkpoint.tokenizer)
        begun = pipeline.with_prefix(
            checkpoint.config, self.prepared, recipe, text, starts, Observer()
        )
        dec = decoder(begun.config, recipe.bits, length, len(begun.tokens))
        params = pipeline.smoothed(dec, begun.params, recipe, text)
        params = {name: jnp.asarray(x) for name, x in params.items()}
        print(f"prefix {list(begun.tokens)}", flush=True)
        return Model(
            recipe,
            dec,
            params,
            weight_scales(dec, params, recipe.weight_init),
            pipeline.prefix_clips(begun.found, learning=False),
            float_logits(begun.config, recipe.bits, begun.original),
        )

    @functools.cache  # noqa: B019 - one study lives as long as the command
    def pool(self, name: str) -> Pool:
        """Windows of a pool with their peaks, measured once."""
        texts, length = dict(self.bench.calibration), self.recipe.calibration_length
        if name == OWN:
            checkpoint = self.bench.checkpoint
            writer = self_written.Writer(checkpoint.config, self.recipe.bits, self.prepared)
            rows = self_written.calibration_windows(
                writer, checkpoint.tokenizer, self.args.own, length, self.recipe.seed
            )
            texts["--own"] = rows.reshape(-1).tolist()
        windows = in_turn(texts, length, self.args.pool)
        print(f"pool {name}: {len(windows)} windows of {length}", flush=True)
        return Pool(windows, window_peaks(self.model.dec, self.model.params, windows))

    @functools.cache  # noqa: B019
    def order(self, name: str, choice: str, seed: int) -> Order:
        """Windows of a pool in the order in which a choice takes them."""
        pool, most = self.pool(name), max(self.args.sizes)
        if choice == CHOSEN:
            order = list(cover(pool.peaks, most, quantile=self.args.quantile).windows)
        elif choice == RANDOM:
            order = np.random.default_rng(seed).permutation(len(pool.windows))[:most]
        else:
            order = range(most)
        return Order(pool.windows[np.asarray(order)])

    def measure(self, name: str, choice: str, seed: int, size: int) -> Row:
        """KL on every judged text, and its mean and worst."""
        order, model = self.order(name, choice, seed), self.model
        read = fake_quant_reading(model, order.scales(model, size))
        texts = {MAIN: self.bench.held_out, **self.bench.others}
        with jax.default_matmul_precision("highest"):
            found = {
                text: divergence(model.original, read, windows, self.args.batch)
                for text, windows in texts.items()
            }
        kls = {text: x.kl for text, x in found.items()}
        worst = max(kls, key=lambda text: kls[text])
        return {
            "kl": float(np.mean(list(kls.values()))),
            "worst": kls[worst],
            "worst_of": worst,
            "top1": float(np.mean([x.top1 for x in found.values()])),
            "kls": kls,
            "coverage": self.coverage(name, order.windows[:size]),
        }

    def coverage(self, name: str, windows: np.ndarray) -> float:
        """F of a set of the pool's windows, against the pool's maximum whatever chose them."""
        pool = self.pool(name)
        among = (pool.windows[:, None] == windows[None]).all(axis=2).any(axis=1)
        return coverage_of(pool.peaks, np.nonzero(among)[0].tolist())


def fake_quant_reading(model: Model, scales: Scales) -> Logits:
    dec, on_device = model.dec, jax.tree.map(jnp.asarray, scales)

    def logits(ids: np.ndarray) -> jax.Array:
        staged = decoder(dec.config, dec.plan, ids.shape[-1], dec.prefix)
        return _read(staged, model.params, jnp.asarray(ids, jnp.int32), on_device)

    return logits


@partial(jax.jit, static_argnums=0)
def _read(dec: Decoder, params: Params, ids: jax.Array, scales: Scales) -> jax.Array:
    """Logits of windows (B, T); scales are arguments, so that all rows share one program."""
    return jax.vmap(lambda one: forward(dec, params, one, scales))(ids)


def jobs(args: argparse.Namespace, bench: Bench) -> Iterator[Job]:
    """Every choice of every pool, from the smallest set to the largest."""
    study = Study(args, bench)
    choices = [(CHOSEN, 0), (FIRST, 0), *((RANDOM, seed) for seed in args.seeds)]
    shared = {
        **settings_of(args, bench),
        "others_of": " ".join(files.digest(path)[:12] for path in args.others),
        "recipe": study.recipe.name,
        "pool_tokens": args.pool,
        "window": study.recipe.calibration_length,
        "quick": args.quick,
    }
    for pool in (FILES, OWN) if args.own else (FILES,):
        for choice, seed in choices:
            for size in args.sizes:
                name = f"{pool}: {choice} {size}" + (f" seed {seed}" if choice == RANDOM else "")
                here = {"pool": pool, "choice": choice, "seed": seed, "size": size}
                if choice == CHOSEN:
                    here["quantile"] = args.quantile
                    name += f" quantile {args.quantile}" if args.quantile != 1 else ""
                yield Job(
                    name, {**shared, **here}, partial(study.measure, pool, choice, seed, size)
                )


def check(args: argparse.Namespace, bench: Bench) -> None:
    """Refuses what would be of no use, before an hour of work."""
    if not 0 <= args.quantile <= 1:
        raise UserError(f"--quantile: expected 0 to 1; got {args.quantile}; change it")
    judged = {files.digest(path): path for path in (args.text, *args.others)}
    for path in args.calibration:
        if same := judged.get(files.digest(path)):
            raise UserError(
                f"{path}: the same text as {same}, which is judged; expected another one, as judged"
                " texts choose nothing; name another file"
            )
    length, most = load_recipe(args.recipe).calibration_length, max(args.sizes)
    windows = min(
        sum(len(ids) // length for ids in bench.calibration.values()), args.pool // length
    )
    if windows < most:
        raise UserError(
            f"--sizes: {most} windows of {length} tokens; expected at most the {windows} that the"
            " pool of files has; give smaller sizes, a larger --pool or a longer --calibration"
        )
    if args.figure:
        curation_figure.check(args.figure)


def measured(args: argparse.Namespace) -> int:
    bench = load(args)
    check(args, bench)
    found = kept_rows(args.json, list(jobs(args, bench)))
    table(found, ("kl", "worst", "top1", "coverage"))
    if args.figure:
        curation_figure.draw(found, args.figure)
        print(f"wrote {args.figure}")
    return 0


if __name__ == "__main__":
    given = arguments()
    sys.exit(outcome.status(lambda: measured(given)))
