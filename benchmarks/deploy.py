"""Latency, size and memory of exported models on this CPU, beside the same graph in float32 and
llama.cpp.

Protocol: SmolLM2-135M, quantized once per recipe (little calibration: speed does not depend on it),
exported with a KV cache; 4-bit weights also unpacked, one to a byte for prefill (`qnpu export
--profile unpacked`), which is faster where XNNPACK has AMX kernels. LiteRT's default kernels,
XNNPACK where it takes an op, a number of threads; everything runs in turn and medians are compared
(`qnpu_jax.latency.cpu`), llama.cpp in a process of its own. Peak memory is that of a process of its
own that loads a file and runs both signatures once.

Goals, of the recipes that are for CPUs (GOALS): a file that prefills and decodes at least 3 times
as fast as float32. Exit status: 0 they hold (always with --quick), 1 they do not, 2 it could not
run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import llama
import outcome
from sim_speed import MODEL, quantize

from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.latency import cpu
from qnpu_jax.latency.cpu import FLOAT, CpuTiming
from qnpu_jax.models.checkpoint import resolve
from qnpu_jax.tflite import cached
from qnpu_jax.tflite.forms import FileForm, Integers, Reals, UnpackedPrefill

GOALS = ("w8a8i8", "w4a8i8")
RECIPES = [*GOALS, "w8a8s8", "w4a8s8", "w8a8", "w4a8", "w4a16"]
TIMES = 3.0
"""How many times as fast as float32 each of GOALS should be."""
UNPACKED = " unpacked"
"""Suffix of a recipe's name for its file with unpacked 4-bit weights."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="w8a8i8 and float32, 3 rounds")
    args = parser.parse_args()
    if args.quick:
        args.recipes, args.rounds, args.context = [GOALS[0]], 3, 256
    return args


def written(
    integers: Mapping[str, IntegerModel], folder: Path, args: argparse.Namespace
) -> dict[str, Path]:
    """A file or two per recipe, and one of the first recipe's graph in float32."""
    first = next(iter(integers.values()))
    forms: dict[str, tuple[IntegerModel, FileForm]] = {FLOAT: (first, Reals.of(first))}
    for name, model in integers.items():
        forms[name] = (model, Integers(model))
        if UnpackedPrefill.differs(model):
            forms[name + UNPACKED] = (model, UnpackedPrefill(model))
    paths = {}
    for name, (model, form) in forms.items():
        paths[name] = folder / f"{name}.tflite"
        cached.build_cached(model, args.prefill, args.context, form=form).write(paths[name])
    return paths


def peak_memory(path: Path, threads: int) -> float:
    """MiB at the peak of this process, which runs both signatures once; Linux only."""
    for _, call in cpu.calls(path, threads).values():
        call()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) / 1024


def report(
    rows: Sequence[CpuTiming], files: Mapping[str, tuple[float, float]], args: argparse.Namespace
) -> int:
    """Prints the table, missed goals, and last the headline; returns the exit status."""
    floats = {r.signature: r.median for r in rows if r.reader == FLOAT}
    print(f"{'':16} {'signature':12} {'ms':>8} {'tokens/s':>9} {'/float32':>9}")
    for r in rows:
        print(
            f"{r.reader:16} {r.signature:12} {1000 * r.median:8.1f} {r.tokens_per_second:9.1f}"
            f" {floats[r.signature] / r.median:9.2f}"
        )
    for name, (size, peak) in files.items():
        print(f"{name:16} file {size:6.1f} MB, peak memory {peak:6.0f} MiB")
    judged = [name for name in GOALS if name in args.recipes] or args.recipes
    best = dict(best_file(rows, name) for name in judged)
    slow = [(name, key, t) for name, times in best.items() for key, t in times.items() if t < TIMES]
    short = [] if args.quick else slow
    for name, key, t in short:
        print(f"short of the goal: {name} {key}: {t:.2f} times float32, expected {TIMES}")
    for key in floats:
        of_key = [times[key] for times in best.values()]
        print(f"{key}: {min(of_key):.2f} to {max(of_key):.2f} times the speed of float32", end="; ")
    print(f"{' and '.join(best)}, context {args.context}")
    return 1 if short else 0


def best_file(rows: Sequence[CpuTiming], recipe: str) -> tuple[str, dict[str, float]]:
    """Finds the file of a recipe whose slower signature is the fastest: its name, and how many
    times as fast as float32 it is, by signature."""
    files = dict.fromkeys(r.reader for r in rows if r.reader in (recipe, recipe + UNPACKED))
    times = {name: cpu.speedups(rows, reader=name) for name in files}
    best = max(times, key=lambda name: min(times[name].values()))
    return best, times[best]


def measured(args: argparse.Namespace) -> int:
    """Measures and prints everything; returns the exit status."""
    integers, _ = quantize(args.recipes, quick=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = written(integers, Path(folder), args)
        work = [call for n, path in paths.items() for call in cpu.named(n, path, args.threads)]
        peer = llama.Peer(resolve(MODEL), args.prefill, args.context, args.threads)
        with llama.started(peer) as calls:
            rows = cpu.time_calls(work + calls, args.rounds)
        peak = partial(peak_memory, threads=args.threads)
        files = {}
        for name, path in paths.items():
            # A new process per file: a peak never falls.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                files[name] = (path.stat().st_size / 1e6, pool.apply(peak, (path,)))
    return report(rows, files, args)


def main() -> int:
    args = arguments()
    return outcome.status(lambda: measured(args))


if __name__ == "__main__":
    sys.exit(main())
