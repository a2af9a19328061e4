"""Measures speed and memory of the simulator beside the float model and LiteRT's interpreter.

Protocol: SmolLM2-135M is quantized once per recipe (or read: --folder, or made up: --random), then
everything runs in turn in one process, prefill with the logits of all positions, and the medians
are compared: the float model under jit, the simulator in every profile, and on a CPU LiteRT's
reference kernels (BUILTIN_REF) on the .tflite of the same integers. Float is float32 on a CPU; on a
GPU bfloat16, at 8 x 512 tokens, because that is what a GPU is for. Peak memory is that of a process
of its own that loads a model and runs it once at the longest length: of the GPU where there is
one.

How speed changes with length and depth is `sim_scaling.py`.

Exit code: 0 the goals hold, 1 they do not, 2 it could not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import outcome
from random_model import random_model

from qnpu_jax import pipeline
from qnpu_jax.fakequant.evaluate import evaluate
from qnpu_jax.fakequant.forward import forward, scanned_inputs, shared_inputs
from qnpu_jax.graph.graph import TensorSpec
from qnpu_jax.graph.layered import Params, local
from qnpu_jax.integer.model import IntegerModel, dequantize
from qnpu_jax.models.checkpoint import load
from qnpu_jax.output import OutputFolder
from qnpu_jax.recipes import RECIPES, load_recipe
from qnpu_jax.text.files import default_text, tokenize
from qnpu_jax.text.starts import starts_of
from qnpu_jax.text.windows import Windows, cut
from qnpu_jax.tflite import writer
from qnpu_jax.tflite.interpreter import LiteRT
from qnpu_sim.program import compile_model, run, sequences_at_once
from qnpu_sim.rounding import PROFILES

MODEL = "smollm2-135m"
MIN_TIMES_REFERENCE, MIN_TIMES_FLOAT, MAX_MEMORY = 20.0, 1.0, 1.5
"""Goals of `litert_ref` for the recipes below: tokens/s against BUILTIN_REF and the float model,
and peak memory against float32."""
GOALS = ("w8a8", "w4a8")
REFERENCE = "BUILTIN_REF"


@dataclass
class Row:
    """Measurements of one reader at one length and batch; `seconds` grows by one per round."""

    recipe: str
    reader: str
    tokens: int
    batch: int
    call: Callable[[], Any]
    seconds: list[float]

    @property
    def rate(self) -> float:
        """Median tokens per second."""
        return self.tokens * self.batch / float(np.median(self.seconds))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = float_name() == "bfloat16"
    parser.add_argument("--recipe", nargs="+", default=list(GOALS), choices=list(RECIPES))
    parser.add_argument(
        "--folder", nargs="+", type=Path, help="of `qnpu quantize`, in place of --recipe"
    )
    parser.add_argument(
        "--random",
        action="store_true",
        help=f"random integers of --recipe's shapes, no {REFERENCE}",
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[512] if gpu else [128, 512])
    parser.add_argument("--batch", nargs="+", type=int, default=[8] if gpu else [1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="w8a8, 128 tokens: below a minute")
    args = parser.parse_args()
    if args.quick:
        args.recipe, args.tokens, args.batch, args.repeats = ["w8a8"], [128], [1], 3
        args.folder = args.folder and args.folder[:1]
    return args


def float_name() -> str:
    """The float model that the simulator is compared with, by JAX's backend."""
    return "bfloat16" if jax.default_backend() == "gpu" else "float32"


def models_of(args: argparse.Namespace) -> tuple[dict[str, IntegerModel], Params]:
    """The integers by recipe, and float parameters of their shapes."""
    if args.random:
        loaded = {name: random_model(name) for name in args.recipe}
    elif args.folder:
        folders = [OutputFolder.open(path) for path in args.folder]
        loaded = {folder.report["recipe"]: folder.model for folder in folders}
    else:
        return quantize(args.recipe, args.quick)
    params = dequantize(next(iter(loaded.values())))
    return loaded, {name: jnp.asarray(x) for name, x in params.items()}


def quantize(recipes: list[str], quick: bool) -> tuple[dict[str, IntegerModel], Params]:
    """The integers of each recipe, and the float parameters that the first was made from.

    Little calibration and no rounding by GPTQ, and in a quick run no rotation and prefix: they
    change codes, not speed.
    """
    saved = {"rotation": "none", "prefix": "none"} if quick else {}
    chosen = [
        replace(load_recipe(name), weight_init="minmax", stages=(), **saved) for name in recipes
    ]
    checkpoint = load(MODEL)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    ids = tokenize([default_text()], tokenizer, config.vocab_size, "default text")
    windows = cut(ids, 128, 4, "default text")
    params = pipeline.prepare(config, checkpoint.params, chosen[0])
    made = [
        pipeline.quantize(config, params, r, Windows.of(windows), starts_of(tokenizer))
        for r in chosen
    ]
    return {r.name: q.model for r, q in zip(chosen, made, strict=True)}, made[0].params


@partial(jax.jit, static_argnums=0)
def float_logits(dec: Any, params: Params, ids: jax.Array) -> jax.Array:
    """Logits of the float model in its parameters' type, as many sequences at once as in the
    simulator."""
    half = params["head.weight"].dtype == jnp.bfloat16
    one = partial(half_forward if half else forward, dec, params)
    if ids.ndim == 1:
        return one(ids)
    return jax.lax.map(one, ids, batch_size=sequences_at_once(*ids.shape))


def half_forward(dec: Any, params: Params, ids: jax.Array) -> jax.Array:
    """`forward.forward` with every tensor in bfloat16."""

    def half(_: TensorSpec, x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

    shared = shared_inputs(dec)
    kinds, tables = scanned_inputs(dec, shared)

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        own, kind = layer
        values = {"input.residual": x, **tables(kind), **own}
        return evaluate(dec.layer, values, half)["mlp.residual"], None

    embedded = evaluate(dec.embed, {"ids": ids, **local(params, "embed.")}, half)["residual"]
    x, _ = jax.lax.scan(step, embedded, (local(params, "layers."), kinds))
    values = {"input.residual": x, "norm.eps": shared["norm.eps"], **local(params, "head.")}
    return evaluate(dec.head, values, half)["logits"]


def rows_of(
    tokens: int,
    batches: list[int],
    integers: dict[str, IntegerModel],
    params: Params,
    folder: Path | None,
) -> Iterator[Row]:
    """Everything that runs at one length; the interpreter, given a folder for its files."""
    name_of_float = float_name()
    params = {n: x.astype(name_of_float) for n, x in params.items()}
    rng = np.random.default_rng(0)
    dec = next(iter(integers.values())).decoder(tokens)
    interpreters, programs = {}, {}
    for name, model in integers.items():
        if folder is not None:
            path = folder / f"{name}_{tokens}.tflite"
            writer.write_prefill(model, path, tokens)
            interpreters[name] = LiteRT(path)
        for profile in PROFILES:
            programs[name, profile] = compile_model(model, model.decoder(tokens), profile)
    for batch in batches:
        shape = (tokens,) if batch == 1 else (batch, tokens)
        ids = rng.integers(0, dec.config.vocab_size, shape, np.int32)
        call = partial(float_logits, dec, params, jnp.asarray(ids))
        yield Row("-", name_of_float, tokens, batch, call, [])
        for (name, profile), program in programs.items():
            yield Row(name, profile, tokens, batch, partial(run, program, ids), [])
        if batch == batches[0]:  # it takes one sequence at a time
            for name, interpreter in interpreters.items():
                one = partial(interpreter.run, ids.reshape(-1, tokens)[0])
                yield Row(name, REFERENCE, tokens, 1, one, [])


def measure(rows: list[Row], repeats: int) -> None:
    """Rounds in turn, after one that compiles; the interpreter, slow but steady, runs in three."""
    for repeat in range(-1, repeats):
        for row in rows:
            if row.reader == REFERENCE and not 0 <= repeat < 3:
                continue
            start = time.perf_counter()
            jax.block_until_ready(row.call())
            if repeat >= 0:
                row.seconds.append(time.perf_counter() - start)


def peak_memory(path: Path, tokens: int) -> float:
    """MiB at the peak of this process, which loads a model and runs it once: of the GPU, or else of
    the host (Linux only)."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the parent has its share
    ids = np.zeros(tokens, np.int32)
    with path.open("rb") as file:
        model = pickle.load(file)
    if isinstance(model, IntegerModel):
        logits: Any = run(compile_model(model, model.decoder(tokens)), ids)
    else:
        dec, stored = model
        params = {name: jnp.asarray(stored.pop(name)) for name in list(stored)}
        logits = float_logits(dec, params, jnp.asarray(ids))
    jax.block_until_ready(logits)
    if jax.default_backend() == "gpu":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) / 1024


def memory(
    integers: dict[str, IntegerModel], params: Params, folder: Path, tokens: int
) -> dict[str, float]:
    """Peak MiB of the float model and of each recipe."""
    dec = next(iter(integers.values())).decoder(tokens)
    stored: dict[str, Any] = {"float32": (dec, {n: np.asarray(x) for n, x in params.items()})}
    found = {}
    for name, model in (stored | integers).items():
        path = folder / f"{name}.pickle"
        with path.open("wb") as file:
            pickle.dump(model, file)
        # A new process per model: a peak never falls.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(peak_memory, (path, tokens))
    return found


def report(rows: list[Row], peaks: dict[str, float]) -> list[str]:
    """Prints the tables; returns what falls short. The headline comes last."""
    float_reader = next(r.reader for r in rows if r.recipe == "-")
    floats = {(r.tokens, r.batch): r.rate for r in rows if r.recipe == "-"}
    references = {(r.recipe, r.tokens): r.rate for r in rows if r.reader == REFERENCE}
    short, against_float, against_reference = [], [], []
    print(
        f"{'recipe':7} {'reader':12} {'T':>4} {'batch':>5} {'tokens/s':>9} {'/float':>7}"
        f" {'/REF':>7}"
    )
    for r in rows:
        times_float = r.rate / floats.get((r.tokens, r.batch), float("nan"))
        times = r.rate / references.get((r.recipe, r.tokens), float("nan"))
        print(
            f"{r.recipe:7} {r.reader:12} {r.tokens:4} {r.batch:5} {r.rate:9.0f} {times_float:7.2f}"
            f" {times:7.1f}"
        )
        if r.reader == "litert_ref" and r.recipe in GOALS:
            against_float.append(times_float)
            against_reference.append(times)
            where = f"{r.recipe} T={r.tokens} batch {r.batch}"
            if times_float < MIN_TIMES_FLOAT:
                short.append(f"{where}: {times_float:.2f}x {float_reader}")
            if times < MIN_TIMES_REFERENCE:
                short.append(f"{where}: {times:.1f}x {REFERENCE}")
    ratios = {name: peak / peaks["float32"] for name, peak in peaks.items()}
    for name, peak in peaks.items():
        print(f"peak memory {name:8} {peak:6.0f} MiB {ratios[name]:5.2f}x float32")
        if name in GOALS and ratios[name] > MAX_MEMORY:
            short.append(f"{name}: {ratios[name]:.2f}x the memory of float32")
    print(
        f"goals of litert_ref, {' and '.join(GOALS)}: at least {MIN_TIMES_FLOAT:g}x {float_reader}"
        f" and {MIN_TIMES_REFERENCE:g}x {REFERENCE}, at most {MAX_MEMORY:g}x the memory of float32"
    )
    print("".join(f"short of the goal: {s}\n" for s in short), end="")
    if against_float:
        beside = f"{min(against_float):.2f} to {max(against_float):.2f} times {float_reader} JAX"
        if references:
            low, high = min(against_reference), max(against_reference)
            beside += f" and {low:.1f} to {high:.1f} times {REFERENCE}"
        verdict = "missed" if short else "met"
        print(
            f"the simulator (litert_ref) runs at {beside}, bit for bit its results; goals {verdict}"
        )
    return short


def measured(args: argparse.Namespace) -> int:
    integers, params = models_of(args)
    rows: list[Row] = []
    # A GPU's time is too dear for it, and random scales are not those that it demands.
    interpreted = float_name() == "float32" and not args.random
    with tempfile.TemporaryDirectory() as name:
        for tokens in args.tokens:
            files = Path(name) if interpreted else None
            part = list(rows_of(tokens, args.batch, integers, params, files))
            measure(part, args.repeats)
            for r in part:  # a run that is stopped has measured something
                where = f"{r.recipe} {r.reader} T={r.tokens} batch {r.batch}"
                print(f"{where}: {r.rate:.0f} tokens/s", file=sys.stderr, flush=True)
            rows += [replace(r, call=lambda: None) for r in part]  # frees the models
        peaks = memory(integers, params, Path(name), max(args.tokens))
    return 1 if report(rows, peaks) else 0


def main() -> int:
    args = arguments()
    return outcome.status(lambda: measured(args))


if __name__ == "__main__":
    sys.exit(main())
