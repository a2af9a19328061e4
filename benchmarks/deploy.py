"""Latency, size and memory of exported models on this CPU, beside the same graph in float32 and
llama.cpp.

Protocol: SmolLM2-135M, quantized once per recipe (little calibration: speed does not depend on it),
exported with a KV cache. LiteRT's default kernels, XNNPACK where it takes an op, a number of
threads; everything runs in turn in one process and medians are compared. Inputs are prepared
before; what is timed is the call of a signature, with its copies of cache and results. Peak memory
is that of a process of its own that loads a file and runs both signatures once.

Goals: prefill and decode at least 3 times as fast as float32. Exit status: 0 they hold (always with
--quick), 1 they do not, 2 it could not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sim_speed import MODEL, quantize

from qnpu_jax import tflite
from qnpu_jax.config import UserError
from qnpu_jax.litert import open_interpreter
from qnpu_jax.models.checkpoint import resolve
from qnpu_jax.stored import Reals

FLOAT, LLAMA = "float32", "llama.cpp"
RECIPES = ["w8a8s8", "w4a8s8", "w8a8", "w4a8"]
GOAL = 3.0
"""Times as fast as float32, of each of RECIPES."""


@dataclass
class Row:
    """Seconds of one signature of one file, one per round."""

    reader: str
    signature: str
    tokens: int
    call: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="w8a8s8 and float32, 3 rounds")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.context = 3, 256
    return args


def calls(path: Path, threads: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Signature: its tokens, and a call of it with inputs prepared."""
    interpreter = open_interpreter(path, "xnn", threads=threads)
    made = {}
    for key in interpreter.get_signature_list():
        runner = interpreter.get_signature_runner(key)
        rng = np.random.default_rng(0)
        details = runner.get_input_details()
        inputs = {
            name: rng.integers(0, 64, d["shape"]).astype(d["dtype"]) for name, d in details.items()
        }
        inputs["mask"] = np.zeros_like(inputs["mask"])
        # The interpreter must outlive its runners.
        made[key] = (len(inputs["ids"]), lambda run=runner, x=inputs, _=interpreter: run(**x))
    return made


def llama(path: Path, args: argparse.Namespace) -> list[Row]:
    """llama.cpp on the GGUF that the models were made from; none where it is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        print(f"{LLAMA}: llama-cpp-python is not installed, so it is not in the table")
        return []
    made = Llama(
        str(path),
        n_ctx=args.context,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_batch=args.prefill,
        verbose=False,
    )
    prompt = list(range(100, 100 + args.prefill))

    def prefill() -> None:
        made.reset()
        made.eval(prompt)

    def decode() -> None:  # the cache holds the prompt, as after `prefill`
        made.n_tokens = args.prefill
        made.eval([7])

    prefill()
    return [
        Row(LLAMA, f"prefill_{args.prefill}", args.prefill, prefill),
        Row(LLAMA, "decode", 1, decode),
    ]


def peak_memory(path: Path, threads: int) -> float:
    """MiB at the peak of this process, which runs both signatures once; Linux only."""
    for _, call in calls(path, threads).values():
        call()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) / 1024


def measure(rows: list[Row], rounds: int) -> None:
    """Rounds in turn, after one that warms up."""
    for i in range(-1, rounds):
        for row in rows:
            start = time.perf_counter()
            row.call()
            if i >= 0:
                row.seconds.append(time.perf_counter() - start)


def report(rows: list[Row], files: dict[str, tuple[float, float]], quick: bool) -> int:
    """Prints the table, what falls short, and last the headline; the exit status."""
    floats = {r.signature: r.median for r in rows if r.reader == FLOAT}
    print(f"{'':10} {'signature':12} {'ms':>8} {'tokens/s':>9} {'/float32':>9}")
    for r in rows:
        print(
            f"{r.reader:10} {r.signature:12} {1000 * r.median:8.1f} {r.tokens / r.median:9.1f}"
            f" {floats[r.signature] / r.median:9.2f}"
        )
    for name, (size, peak) in files.items():
        print(f"{name:10} file {size:6.1f} MB, peak memory {peak:6.0f} MiB")
    times = {
        (r.reader, r.signature): floats[r.signature] / r.median for r in rows if r.reader in RECIPES
    }
    short = [] if quick else [f"{' '.join(k)}: {t:.2f}" for k, t in times.items() if t < GOAL]
    print(
        "".join(f"short of the goal: {s} times float32, expected {GOAL}\n" for s in short), end=""
    )
    print(
        f"prefill and decode run at {min(times.values()):.2f} to {max(times.values()):.2f} times"
        " the speed of float32"
    )
    return 1 if short else 0


def main() -> int:
    args = arguments()
    try:
        recipes = RECIPES[: 1 if args.quick else None]
        integers, _ = quantize(recipes, quick=True)
        with tempfile.TemporaryDirectory() as folder:
            paths = {}
            forms = {FLOAT: Reals.of(integers[RECIPES[0]])}
            for name in (FLOAT, *recipes):
                paths[name] = Path(folder) / f"{name}.tflite"
                model = integers.get(name, integers[RECIPES[0]])
                written = tflite.build_cached(
                    model, args.prefill, args.context, stored=forms.pop(name, None)
                )
                written.write(paths[name])
            rows = [
                Row(name, key, tokens, call)
                for name, path in paths.items()
                for key, (tokens, call) in calls(path, args.threads).items()
            ]
            measure(rows + (extra := llama(resolve(MODEL), args)), args.rounds)
            peak = partial(peak_memory, threads=args.threads)
            files = {}
            for name, path in paths.items():
                # A new process per file: a peak never falls.
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    files[name] = (path.stat().st_size / 1e6, pool.apply(peak, (path,)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception:  # an uncaught one would exit with 1, which says that a goal is missed
        traceback.print_exc()
        return 2
    return report(rows + extra, files, args.quick)


if __name__ == "__main__":
    sys.exit(main())
