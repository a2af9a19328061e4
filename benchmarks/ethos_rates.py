"""What vela estimates for a model's first layers: the reports that `latency.ethos_rates` fits.

    python benchmarks/ethos_rates.py --model FILE --layers 2 6

needs the extra `ethos`. Ranges are calibrated on random tokens, as vela's estimate depends on no
value but through its coder of weights. Prints one `Report` a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qnpu_jax import pipeline
from qnpu_jax.calibrate import calibrate_activations, collect_statistics, weight_scales
from qnpu_jax.compilers import ethos, ethos_form
from qnpu_jax.graph import decoder
from qnpu_jax.integer import IntegerModel, freeze
from qnpu_jax.latency import roofline
from qnpu_jax.latency.ethos_rates import Report
from qnpu_jax.models import Checkpoint, load
from qnpu_jax.recipes import RECIPES
from qnpu_jax.tflite import cached_decoder

RECIPE_NAMES = ("w8a8i8", "w4a8i8", "w8a8s8", "w8a8", "w4a8", "w8a16", "w4a16")
CONTEXT = 512


def model_of(checkpoint: Checkpoint, layers: int, name: str) -> IntegerModel:
    """Quantizes the first layers of a model without a prefix, and learns nothing."""
    kinds = checkpoint.config.kind_of_layer[:layers]
    config = dataclasses.replace(checkpoint.config, num_layers=layers, kind_of_layer=kinds)
    params = {n: x[:layers] if n.startswith("layers.") else x for n, x in checkpoint.params.items()}
    recipe = dataclasses.replace(RECIPES[name], prefix="none", split_channels=0)
    params = pipeline.prepare(config, params, recipe)
    dec = decoder(config, recipe.bits, 32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 32)).astype(np.int32)
    scales, _ = calibrate_activations(
        dec, collect_statistics(dec, params, ids), "class", tame=False
    )
    free = scales | weight_scales(dec, params, "mse")
    return freeze(dec, {n: jnp.asarray(x) for n, x in params.items()}, free, ())


def report(model: IntegerModel, accelerator: str, recipe: str, tokens: int, folder: Path) -> Report:
    """Compiles one signature, and counts what the planner counts."""
    source, target = folder / "source.tflite", folder / "compiled.tflite"
    key = "decode" if tokens == 1 else f"prefill_{tokens}"
    form = ethos_form.arm_form(model)
    ethos_form.build_signature(model, form, tokens, CONTEXT, key).write(source)
    made = ethos.compile_file(source, accelerator, target)
    target.unlink()
    if not made.placement.whole:
        raise SystemExit(f"{recipe}, {key}: {made.placement.on_cpu} are left to the CPU")
    dec = cached_decoder(model, tokens, CONTEXT)
    macs, layers = roofline.macs(dec), model.config.num_layers
    ops = sum(len(g.nodes) * g.layers for g in dec.graphs)
    return Report(
        accelerator, recipe, layers, tokens, ops, (macs.get(8, 0), macs.get(16, 0)),
        roofline.least_bytes(dec), made.estimate.seconds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--accelerators", nargs="+", default=["ethos-u85-256", "ethos-u85-2048"])
    args = parser.parse_args()
    checkpoint = load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        for layers in args.layers:
            for name in RECIPE_NAMES:
                model = model_of(checkpoint, layers, name)
                for tokens in (128, 1):
                    for accelerator in args.accelerators:
                        print(report(model, accelerator, name, tokens, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
