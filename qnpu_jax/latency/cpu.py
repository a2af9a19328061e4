"""How fast this machine's CPU runs an exported model, beside the same graph in float32.

What is timed is one call of a signature with its copies of cache and results, as an application
makes it (`litert_backend`); the inputs are made before. Everything runs in turn, so that what else
the machine does slows all rows alike.
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
    """Something to time.

    Attributes:
      reader: who runs it, for the table: a recipe, `float32`, ...
      tokens: that one call takes.
      call: with its inputs prepared; what it returns is ignored.
    """

    reader: str
    signature: str
    tokens: int
    call: Callable[[], Any]


@dataclass(frozen=True)
class CpuTiming:
    """Seconds of a call, one per round."""

    reader: str
    signature: str
    tokens: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds per call."""
        return float(np.median(self.seconds))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.median

    def to_json(self) -> dict[str, Any]:
        """The fields, `median` and `tokens_per_second`."""
        rate = self.tokens_per_second
        return {**vars(self), "median": self.median, "tokens_per_second": rate}


def calls(path: Path, threads: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Every signature of a file with a cache: its tokens, and a call of it with inputs prepared.

    The calls are as at the end of the context: the last positions, and a mask that hides nothing.
    Values do not change the time; they need only be ones that every table has.

    Args:
      path: a .tflite that `cached.write_cached` wrote, or one of the same signatures.
      threads: of the interpreter.

    Raises:
      UserError: the file is missing, damaged, or has no cache.
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
    missing = {"ids", "positions", "mask", "kv_cache_k_0"} - details.keys()
    if missing:
        raise UserError(
            f"{path}: {key} lacks the inputs {sorted(missing)}; expected a model with a KV cache;"
            " write it with `qnpu export --context`"
        )
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.integers(0, 64, d["shape"]).astype(d["dtype"])  # ids that any vocabulary has
        for name, d in details.items()
    }
    slots, tokens = inputs["kv_cache_k_0"].shape[1], len(inputs["ids"])
    inputs["positions"] = np.arange(slots, slots + tokens, dtype=np.int32)
    inputs["mask"] = np.zeros_like(inputs["mask"])
    if "keep" in inputs:
        inputs["keep"] = np.full_like(inputs["keep"], 32767)
    return inputs


def time_calls(
    work: Sequence[TimedCall],
    rounds: int,
    track: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, _: steps,
    clock: Callable[[], float] = time.perf_counter,
) -> list[CpuTiming]:
    """Runs all calls in turn, `rounds` times after one that warms up; one row each.

    Args:
      track: wraps the iteration over all rounds, the first included: (steps, their number).
      clock: seconds.

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
    """`calls` of a file, each under the name of its reader."""
    return [TimedCall(reader, key, n, call) for key, (n, call) in calls(path, threads).items()]


def time_against_float(
    integers: Integers,
    prefill: int,
    context: int,
    threads: int,
    rounds: int,
    track: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, _: steps,
) -> list[CpuTiming]:
    """Times `prefill_<N>` and `decode` of a model as integers and in float32, side by side.

    Both files are written to a folder that is gone afterwards. In memory at the peak are both
    models, the float32 one at 4 bytes a weight.

    Args:
      integers: the model, and how its file holds it.
      prefill, context: as `cached.write_cached`.
      threads: of LiteRT.
      rounds: that are timed; medians over them are what to report.

    Returns:
      Four rows: integers, then float32, each prefill first.

    Raises:
      UserError: as `cached.write_cached`; fewer than one thread or round.
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
    """How many times as fast a reader is as `base`, by signature: ratios of medians."""
    medians = {(r.reader, r.signature): r.median for r in rows}
    return {key: medians[base, key] / s for (who, key), s in medians.items() if who == reader}


def check_count(name: str, count: int) -> None:
    """Raises UserError for a number of threads or rounds below 1."""
    if count < 1:
        raise UserError(f"{name}: {count}; expected at least 1; raise --{name}")
