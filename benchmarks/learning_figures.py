"""Two figures: what rotation and prefix do to activations, and how learning went.

`python benchmarks/learning_figures.py --text F --rows accuracy.json --out benchmarks/figures`
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rows import Row, read_rows

from qnpu_jax import pipeline
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.passes import passes
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.models.checkpoint import load
from qnpu_jax.recipes import Recipe, load_recipe
from qnpu_jax.text import files
from qnpu_jax.text.windows import cut
from qnpu_jax.transform.prefix import add_prefix

TENSORS = {
    "attn.input": "input of q, k, v (rotated)",
    "attn.v": "values (rotated)",
    "mlp.residual": "residual stream (rotated)",
    "mlp.act": "input of down (not rotated)",
}
WAYS = {"as trained": ("none", ()), "rotated": ("hadamard", ()), "rotated, prefix": ("hadamard", 1)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="by default Python's documentation")
    parser.add_argument("--prefix", type=int, nargs="+", default=[1, 216])
    parser.add_argument("--rows", type=Path, help="rows that accuracy.py --json wrote")
    parser.add_argument("--out", type=Path, help="by default benchmarks/figures")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two windows of 64 tokens, kept only with --out: does it work?",
    )
    args = parser.parse_args()
    if args.out is None and not args.quick:
        args.out = Path("benchmarks/figures")
    return args


def activations(args: argparse.Namespace) -> dict[str, dict[str, np.ndarray]]:
    """Values of each tensor in all layers over their layer's root mean square, by way."""
    checkpoint = load(args.model)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    texts = files.read_text(args.text) if args.text else [files.default_text()]
    ids = files.tokenize(texts, tokenizer, config.vocab_size, str(args.text))
    count, length = (2, 64) if args.quick else (8, 128)
    windows = jnp.asarray(cut(ids, length, count, str(args.text)), jnp.int32)
    found: dict[str, dict[str, np.ndarray]] = {}
    for way, (rotation, prefix) in WAYS.items():
        recipe = Recipe("figure", load_recipe("w8a8").bits, rotation=rotation)
        params = pipeline.prepare(config, checkpoint.params, recipe)
        tokens = tuple(args.prefix) if prefix else ()
        if tokens:
            params = add_prefix(config, recipe.bits, params, tokens)
        dec = decoder(config, recipe.bits, length, len(tokens))
        kept: dict[str, list[np.ndarray]] = {name: [] for name in TENSORS}
        for graph, _, env in passes(
            dec, params, windows, lambda g, dec=dec: tuple(TENSORS) if g is dec.layer else ()
        ):
            for name in TENSORS if graph is dec.layer else ():
                x = np.asarray(env[name]).ravel()
                kept[name].append(x / np.sqrt(np.mean(x.astype(np.float64) ** 2)))
        found[way] = {name: np.concatenate(parts) for name, parts in kept.items()}
    return found


def draw_activations(found: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(TENSORS), figsize=(14, 3.4), sharey=True)
    edges = np.concatenate([[0], np.geomspace(0.05, 2000, 60)])
    for axis, (name, title) in zip(axes, TENSORS.items(), strict=True):
        for way, values in found.items():
            size = np.abs(values[name])
            above = np.searchsorted(np.sort(size), edges)
            axis.plot(edges[1:], 1 - above[1:] / size.size, label=f"{way}: max {size.max():.0f}")
        axis.set(xscale="log", yscale="log", title=title, xlabel="|x| / rms of its layer")
        axis.set_ylim(3e-8, 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("share of values above")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_losses(rows: list[Row], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9, 4))
    for index, row in enumerate(rows):
        start, color = 0, f"C{index}"  # one color for all stages of a row
        for stage, (loss, held_out) in enumerate(
            zip(row.get("loss", []), row.get("held_out_kl", []), strict=True)
        ):
            span = min(10, len(loss))
            smooth = np.convolve(loss, np.ones(span) / span, mode="valid")
            label = f"{row['name']}: learning text" if stage == 0 else None
            at = start + span + np.arange(len(smooth))
            axis.plot(at, smooth, lw=1, c=color, label=label)
            steps, values = zip(*held_out, strict=True)
            label = f"{row['name']}: held out" if stage == 0 else None
            axis.plot(start + np.asarray(steps), values, "o--", ms=3, c=color, label=label)
            start += len(loss)
    axis.set(yscale="log", xlabel="step", ylabel="KL to the float model, nats per token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw(args: argparse.Namespace, out: Path) -> dict[str, dict[str, np.ndarray]]:
    """Both figures into a folder; what `activations` found."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [r for r in read_rows(args.rows) if r.get("loss")] if args.rows else []
    if args.rows and not rows:
        raise UserError(f"{args.rows}: no row of it learned; give one of --effort fast or full")
    found = activations(args)
    draw_activations(found, out / "activations.svg")
    if rows:
        draw_losses(rows, out / "losses.svg")
    return found


def main() -> int:
    args = arguments()
    try:
        # What --quick draws must not replace measured figures.
        with nullcontext(args.out) if args.out else tempfile.TemporaryDirectory() as folder:
            found = draw(args, Path(folder))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for way, values in found.items():
        peaks = ", ".join(f"{name} {np.abs(x).max():.0f}" for name, x in values.items())
        print(f"{way:16} largest over rms: {peaks}")
    first, last = (
        np.abs(found[w]["mlp.residual"]).max() for w in ("as trained", "rotated, prefix")
    )
    print(f"largest residual value over the rms of its layer: {first:.0f} -> {last:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
