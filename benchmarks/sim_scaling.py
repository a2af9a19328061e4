"""Measures how the simulator's speed changes with length and depth, beside the float model.

Protocol: as `sim_speed.py`: readers in turn in one process, medians. Lengths with all layers, and
depths (the first layers of the same model) at one length. Prints a table and draws a figure.

Exit code: 0 measured, 2 it could not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import outcome
from matplotlib.figure import Figure
from random_model import random_model
from sim_speed import Row, float_logits, float_name, measure, quantize

from qnpu_jax.errors import UserError
from qnpu_jax.graph.graph import LAYERS
from qnpu_jax.graph.layered import Params
from qnpu_jax.integer.model import IntegerModel, dequantize
from qnpu_jax.output import OutputFolder
from qnpu_sim.program import compile_model, run
from qnpu_sim.rounding import PROFILES

FIGURE = Path("benchmarks/figures/sim_scaling.svg")


@dataclass(frozen=True)
class Point:
    """Median seconds of one reader at one length and depth."""

    reader: str
    tokens: int
    layers: int
    seconds: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="of `qnpu quantize`; without it, w8a8 anew")
    parser.add_argument(
        "--random", action="store_true", help="random integers of w8a8's shapes, as fast as learned"
    )
    lengths = [32, 64, 128, 256, 512, 1024]
    parser.add_argument("--tokens", nargs="+", type=int, default=lengths)
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 10, 20, 30])
    parser.add_argument("--depth-tokens", type=int, default=128, help="length of --layers' rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--quick", action="store_true", help="two lengths, two depths, no figure")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.layers, args.depth_tokens, args.repeats = [16, 32], [1, 2], 32, 2
    return args


def shallow(model: IntegerModel, params: Params, layers: int) -> tuple[IntegerModel, Params]:
    """The first layers of a model, and embedding and head."""

    def first(values: dict[str, Any]) -> dict[str, Any]:
        cut = jax.tree.map(lambda x: x[:layers], {n: values[n] for n in values if is_layer(n)})
        return values | cut

    def is_layer(name: str) -> bool:
        return name.startswith(LAYERS)

    config = replace(model.config, num_layers=layers)
    cut = replace(model, config=config, tensors=first(model.tensors))
    return cut, first(dict(params))


def rows_of(model: IntegerModel, params: Params, tokens: int) -> Iterator[Row]:
    """The float model and both profiles at one length."""
    dec = model.decoder(tokens)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens, np.int32)
    halves = {n: x.astype(float_name()) for n, x in params.items()}
    call = partial(float_logits, dec, halves, jnp.asarray(ids))
    yield Row("-", float_name(), tokens, 1, call, [])
    for profile in PROFILES:
        program = compile_model(model, dec, profile)
        yield Row("w8a8", profile, tokens, 1, partial(run, program, ids), [])


def points(args: argparse.Namespace, model: IntegerModel, params: Params) -> list[Point]:
    wanted = [(tokens, model.config.num_layers) for tokens in args.tokens]
    wanted += [(args.depth_tokens, layers) for layers in args.layers]
    found = []
    for tokens, layers in dict.fromkeys(wanted):
        rows = list(rows_of(*shallow(model, params, layers), tokens))
        measure(rows, args.repeats)
        found += [Point(r.reader, tokens, layers, float(np.median(r.seconds))) for r in rows]
        speeds = ", ".join(f"{r.reader} {r.rate:.0f}" for r in rows)
        print(f"{tokens} tokens, {layers} layers: {speeds} tokens/s", file=sys.stderr, flush=True)
    return found


def draw(found: list[Point], deepest: int, depth_tokens: int, path: Path) -> None:
    mpl.rcParams["svg.hashsalt"] = "qnpu"  # equal bytes for equal numbers
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    by_length, by_depth = figure.subplots(1, 2)
    for reader in dict.fromkeys(p.reader for p in found):
        own = [p for p in found if p.reader == reader]
        lengths = sorted((p.tokens, p.tokens / p.seconds) for p in own if p.layers == deepest)
        by_length.plot(*zip(*lengths, strict=True), "o-", ms=3, label=reader)
        depths = sorted((p.layers, 1000 * p.seconds) for p in own if p.tokens == depth_tokens)
        by_depth.plot(*zip(*depths, strict=True), "o-", ms=3, label=reader)
    by_length.set(xlabel="tokens", ylabel="tokens/s", title=f"{deepest} layers", xscale="log")
    ticks = sorted({p.tokens for p in found})
    by_length.set_xticks(ticks, labels=map(str, ticks))
    by_length.minorticks_off()
    by_depth.set(xlabel="layers", ylabel="ms", title=f"{depth_tokens} tokens")
    for axis in (by_length, by_depth):
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    by_length.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def report(found: list[Point], depth_tokens: int) -> None:
    """Prints the table, and last the time of a layer and of the rest."""
    names = list(dict.fromkeys(p.reader for p in found))
    print(f"{'T':>5} {'layers':>6} " + " ".join(f"{n + ' tokens/s':>20}" for n in names))
    for tokens, layers in dict.fromkeys((p.tokens, p.layers) for p in found):
        own = {p.reader: p.seconds for p in found if (p.tokens, p.layers) == (tokens, layers)}
        print(f"{tokens:5} {layers:6} " + " ".join(f"{tokens / own[n]:20.0f}" for n in names))
    said = []
    for name in names:
        own = [p for p in found if p.reader == name and p.tokens == depth_tokens]
        slope, rest = np.polyfit([p.layers for p in own], [1000 * p.seconds for p in own], 1)
        said.append(f"{name} {slope:.1f} ms a layer and {rest:.0f} ms for the rest")
    print(f"{depth_tokens} tokens: {'; '.join(said)}")


def measured(args: argparse.Namespace) -> int:
    if args.folder or args.random:
        model = OutputFolder.open(args.folder).model if args.folder else random_model("w8a8")
        params = {n: jnp.asarray(x) for n, x in dequantize(model).items()}
    else:
        integers, params = quantize(["w8a8"], quick=True)
        model = integers["w8a8"]
    if too_deep := [n for n in args.layers if not 1 <= n <= model.config.num_layers]:
        raise UserError(
            f"--layers {too_deep[0]}: expected 1 to {model.config.num_layers}; choose others"
        )
    found = points(args, model, params)
    if not args.quick:
        draw(found, model.config.num_layers, args.depth_tokens, args.figure)
    report(found, args.depth_tokens)
    return 0


def main() -> int:
    args = arguments()
    return outcome.status(lambda: measured(args))


if __name__ == "__main__":
    sys.exit(main())
