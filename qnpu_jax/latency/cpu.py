"""Latency of an exported model on this machine's CPU, beside the same graph in float32.

Timed is one call of a signature, with the copies of cache and results that an application makes
(`litert_backend`). The inputs are made before. All calls run in turn, so that other work of the
machine slows all of them alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qnpu_jax.errors import UserError
from qnpu_jax.tflite import Integers, Reals, build_cached, open_interpreter

INTEGERS, FLOAT = "integers", "float32"


@dataclass(frozen=True)
class TimedCall:
    """Call to time.

    Attributes:
      reader: name of the file or program in tables: a recipe, `float32`, ...
      signature: name of the signature.
      tokens: tokens of one call.
      call: runs the signature on prepared inputs. Its result is ignored.
    """

    reader: str
    signature: str
    tokens: int
    call: Callable[[], Any]


@dataclass(frozen=True)
class CpuTiming:
    """Measured times of a call.

    Attributes:
      reader, signature, tokens: as `TimedCall`.
      seconds: of each round.
    """

    reader: str
    signature: str
    tokens: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the seconds of a call."""
        return float(np.median(self.seconds))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a call divided by its median seconds."""
        return self.tokens / self.median

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, `median` and `tokens_per_second`."""
        rate = self.tokens_per_second
        return {**vars(self), "median": self.median, "tokens_per_second": rate}


def calls(path: Path, threads: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Returns tokens and a call of every signature of a file with a KV cache, by name.

    The calls have prepared inputs, as at the end of the context: the last positions, and a mask
    that hides nothing. Values do not change the time, but ids must be rows of every table.

    Args:
      path: a .tflite of `cached.build_cached`, or with the same signatures.
      threads: threads of the interpreter.

    Raises:
      UserError: the file is missing, damaged, or has no cache; fewer than one thread.
    """
    check_count("threads", threads)
    interpreter = open_interpreter(path, "xnn", threads=threads)
    made = {}
    for key in interpreter.get_signature_list():
        runner = interpreter.get_signature_runner(key)
        inputs = _inputs(path, key, runner.get_input_details())
        # The interpreter must outlive its runners.
        made[key] = (len(inputs["ids"]), lambda run=runner, x=inputs, _=interpreter: run(**x))
    return made


def _inputs(path: Path, key: str, details: Mapping[str, Any]) -> dict[str, np.ndarray]:
    masks = [name for name in details if name.startswith("mask")]
    missing = {"ids", "positions", "kv_cache_k_0", *(masks or ["mask"])} - details.keys()
    if missing:
        raise UserError(
            f"{path}: {key} lacks the inputs {sorted(missing)}; expected a model with a KV cache;"
            " write it with `qnpu export --context`"
        )
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.integers(0, 64, d["shape"]).astype(d["dtype"])  # ids in any vocabulary
        for name, d in details.items()
    }
    slots, tokens = inputs["kv_cache_k_0"].shape[1], len(inputs["ids"])
    inputs["positions"] = np.arange(slots, slots + tokens, dtype=np.int32)
    inputs |= {name: np.zeros_like(inputs[name]) for name in masks}
    keeps = [name for name in inputs if name.startswith("keep")]
    return inputs | {name: np.full_like(inputs[name], 32767) for name in keeps}


def time_calls(
    work: Sequence[TimedCall],
    rounds: int,
    track: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, _: steps,
    clock: Callable[[], float] = time.perf_counter,
) -> list[CpuTiming]:
    """Runs all calls in turn, once to warm up and then `rounds` times, and returns their times.

    Args:
      track: shows progress: wraps the iteration over all rounds, given their number.
      clock: returns seconds.

    Raises:
      UserError: no rounds.
    """
    check_count("rounds", rounds)
    seconds: list[list[float]] = [[] for _ in work]
    for i in track(range(rounds + 1), rounds + 1):
        for item, taken in zip(work, seconds, strict=True):
            start = clock()
            item.call()
            if i > 0:  # the first packs weights and touches pages
                taken.append(clock() - start)
    return [
        CpuTiming(w.reader, w.signature, w.tokens, tuple(s))
        for w, s in zip(work, seconds, strict=True)
    ]


def named(reader: str, path: Path, threads: int) -> list[TimedCall]:
    """Returns the calls of a file (`calls`) under a reader's name."""
    return [TimedCall(reader, key, n, call) for key, (n, call) in calls(path, threads).items()]


def time_against_float(
    integers: Integers,
    prefill: int,
    context: int,
    threads: int,
    rounds: int,
    track: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, _: steps,
) -> list[CpuTiming]:
    """Times `prefill_<N>` and `decode` of a model in integers and in float32, side by side.

    Both files are written to a temporary folder. At the peak both models are in memory, the float32
    one with 4 bytes a weight.

    Args:
      integers: the model, and how its file holds it.
      prefill, context: as `cached.build_cached`.
      threads: threads of LiteRT.
      rounds: timed rounds, whose median is the number to report.
      track: as `time_calls`.

    Returns:
      Four timings: integers, then float32, each with the prefill first.

    Raises:
      UserError: as `cached.build_cached`; fewer than one thread or round.
    """
    check_count("threads", threads)
    check_count("rounds", rounds)
    with tempfile.TemporaryDirectory() as folder:
        work = []
        for name, form in ((INTEGERS, integers), (FLOAT, Reals.of(integers.model))):
            path = Path(folder) / f"{name}.tflite"
            build_cached(integers.model, prefill, context, form=form).write(path)
            work += named(name, path, threads)
        return time_calls(work, rounds, track)


def speedups(
    rows: Sequence[CpuTiming], reader: str = INTEGERS, base: str = FLOAT
) -> dict[str, float]:
    """Returns median seconds of `base` over those of `reader`, by signature: above 1 is faster."""
    medians = {(r.reader, r.signature): r.median for r in rows}
    return {key: medians[base, key] / s for (who, key), s in medians.items() if who == reader}


def check_count(name: str, count: int) -> None:
    """Raises UserError for a number of threads or rounds below 1."""
    if count < 1:
        raise UserError(f"{name}: {count}; expected at least 1; raise --{name}")
