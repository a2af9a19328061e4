"""An int8 cache of keys and values, with centred keys and without: ranges, SQNR, perplexity.

The model is float but for its cache: what is lost is lost there. A constant that all keys of a head
share reaches no softmax, so the signal of SQNR is what keys have beside it: sum |k - mean k|^2 over
sum |k_q - k|^2, by layer. Calibrated as the recipe does, nothing learned.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from protocol import Bench, add_arguments, in_turn, load

from qnpu_jax import pipeline
from qnpu_jax.calibrate import calibrate_activations, collect_statistics
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant import forward, passes
from qnpu_jax.graph import QParams, decoder
from qnpu_jax.measure import perplexity
from qnpu_jax.recipes import load_recipe
from qnpu_jax.text.starts import starts_of
from qnpu_jax.transform import add_prefix, centre_keys, key_centres

CACHES = ("layers.attn.k_cache", "layers.attn.v_cache", "layers.attn.v")
"""Values are cached as their linear makes them."""


def sqnr(keys: np.ndarray, scale: QParams, layer: int) -> float:
    """Decibels of keys (B, T, N, K) against their rounding."""
    s, z = (float(np.asarray(x)[layer]) for x in (scale.scale, scale.zero_point))
    codes = np.clip(np.round(keys / s) + z, -128, 127)
    noise = np.sum(np.square((codes - z) * s - keys))
    signal = np.sum(np.square(keys - keys.mean(axis=(0, 1), keepdims=True)))
    return float(10 * np.log10(signal / noise))


def measure(bench: Bench, args: argparse.Namespace, centred: bool) -> dict[str, Any]:
    """Ranges, SQNR and perplexity of one kind of cache."""
    recipe = load_recipe("w8a8")
    config = bench.checkpoint.config
    params = pipeline.prepare(config, dict(bench.checkpoint.params), recipe)
    text = in_turn(bench.calibration, recipe.calibration_length, recipe.calibration_tokens)
    if centred:
        config, params = centre_keys(config, params, key_centres(config, recipe.bits, params, text))
    bos = starts_of(bench.checkpoint.tokenizer).bos
    params = add_prefix(config, recipe.bits, params, bos)
    params = {n: jnp.asarray(x) for n, x in params.items()}
    dec = decoder(config, recipe.bits, text.shape[1], len(bos))
    found, _ = calibrate_activations(
        dec, collect_statistics(dec, params, text), recipe.activation_init, True
    )
    scales = {name: found[name] for name in CACHES if name in found}

    dec = decoder(config, recipe.bits, args.length, len(bos))
    windows = jnp.asarray(bench.held_out[: args.batch], jnp.int32)
    rows = []
    key = CACHES[0].removeprefix("layers.")
    for graph, layer, env in passes(dec, params, windows, lambda g: (key,) if g.layered else ()):
        if graph.layered:
            keys = np.asarray(env[key], np.float64)
            rows.append(
                {"peak": float(np.abs(keys).max()), "sqnr": sqnr(keys, scales[CACHES[0]], layer)}
            )
    run = jax.jit(jax.vmap(lambda ids, p, q: forward(dec, p, ids, q), in_axes=(0, None, None)))

    def scored(quant: dict[str, QParams]) -> float:
        return perplexity.perplexity(
            lambda ids: run(jnp.asarray(ids, jnp.int32), params, quant), bench.held_out, args.batch
        )

    return {"layers": rows, "float": scored({}), "int8": scored(scales)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    args = parser.parse_args()
    try:
        bench = load(args)
        names = ("as they are", "centred")
        found = {name: measure(bench, args, name == "centred") for name in names}
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'layer':>5}" + "".join(f"{name + ': largest, dB':>28}" for name in found))
    columns = [f["layers"] for f in found.values()]
    for layer, row in enumerate(zip(*columns, strict=True)):
        print(f"{layer:>5}" + "".join(f"{r['peak']:>19.1f},{r['sqnr']:>8.1f}" for r in row))
    for name, f in found.items():
        print(f"{name}: perplexity {f['int8']:.2f} with an int8 cache, {f['float']:.2f} in float")
    if args.json:
        Path(args.json).write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
