"""How wide the accumulators of a model must be: proved from its weights, channel by channel, beside
what a text brings them to.

What a run reached comes in as a function (`Observe`): this package never imports the simulator.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.integer import (
    NO_SUM,
    ChannelBounds,
    IntegerModel,
    Intermediate,
    channel_bounds,
    check_accumulators,
    check_intermediates,
    needed_bits,
    proved_intermediates,
)
from qnpu_jax.output import OutputFolder
from qnpu_jax.progress import Clock
from qnpu_jax.text import excerpts

FORMAT = 1
"""Version of accumulators.json."""
WIDTHS = (16, 20, 24, 32)
"""Bits of accumulators that hardware has."""

Observe = Callable[[IntegerModel, np.ndarray], Mapping[str, tuple[np.ndarray, np.ndarray]]]
"""Smallest and largest accumulator of each channel over sequences of ids (B, T), by global name."""


@dataclass(frozen=True)
class AccumulatorRow:
    """One op of one layer.

    Attributes:
      proved: what its accumulator can reach.
      low, high: what it reached, one per channel of `proved`.
    """

    proved: ChannelBounds
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def tensor(self) -> str:
        return self.proved.tensor

    @property
    def kind(self) -> str:
        """The tensor's name without its layer and KV head: `attn.kv*.scores`."""
        return re.sub(r"\bkv\d+\b", "kv*", re.sub(r"^layers\.\d+\.", "", self.tensor))

    @property
    def needed(self) -> int:
        """Bits that the proof asks for."""
        return max(self.proved.needed)

    @property
    def seen(self) -> int:
        """Bits that the run used."""
        return max(self.used)

    @cached_property
    def used(self) -> tuple[int, ...]:
        """Bits that the run used, of each channel."""
        return tuple(map(needed_bits, self.low, self.high))

    @property
    def reach(self) -> int:
        """Largest |accumulator| that is proved possible."""
        return max(-self.proved.bound.low, self.proved.bound.high)

    @property
    def reached(self) -> int:
        """Largest |accumulator| of the run."""
        return max(-min(self.low), max(self.high))

    @property
    def holds(self) -> bool:
        """Whether no channel passed what was proved."""
        p = self.proved
        ends = zip(p.low, self.low, self.high, p.high, strict=True)
        return all(a <= b <= c <= d for a, b, c, d in ends)

    def fitting(self, bits: int) -> int:
        """How many channels provably fit an accumulator of so many bits."""
        return sum(n <= bits for n in self.proved.needed)

    def to_json(self) -> dict[str, Any]:
        p = self.proved
        return {
            "tensor": self.tensor,
            "op": p.op,
            "input_bits": p.input_bits,
            "available": p.available,
            "channels": len(p.low),
            "needed": self.needed,
            "seen": self.seen,
            "fitting": {str(bits): self.fitting(bits) for bits in WIDTHS},
            "histogram": {str(bits): n for bits, n in histogram(p.needed).items()},
            "proved": {"low": p.low, "high": p.high},
            "observed": {"low": self.low, "high": self.high},
        }


@dataclass(frozen=True)
class OpKind:
    """The rows of one op in all layers.

    Attributes:
      channels: of all rows together.
      needed, typical: bits of the widest channel, and of the median one.
      seen: bits of the widest channel of the run.
      fitting: channels that provably fit, by bits of `WIDTHS`.
    """

    name: str
    op: str
    channels: int
    needed: int
    typical: int
    seen: int
    fitting: Mapping[int, int]


@dataclass(frozen=True)
class Widths:
    """What `measure_widths` found.

    Attributes:
      rows: every FULLY_CONNECTED and BATCH_MATMUL of every layer.
      intermediates: what the other ops hold before they round.
      text: what the run read.
      prefill: tokens of a sequence, on which sums over keys depend.
      sha256: of the model's integers.
    """

    rows: tuple[AccumulatorRow, ...]
    intermediates: tuple[Intermediate, ...]
    text: excerpts.Excerpt
    prefill: int
    sha256: str

    @property
    def linears(self) -> tuple[AccumulatorRow, ...]:
        return tuple(r for r in self.rows if r.proved.op == "FULLY_CONNECTED")

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "integer_model": self.sha256,
            "prefill": self.prefill,
            "text": self.text.to_json(),
            "widths": WIDTHS,
            "intermediates": artifacts.columns(
                asdict(i) | {"needed": i.needed} for i in self.intermediates
            ),
            "no_sum": dict(NO_SUM),
            "rows": [row.to_json() for row in self.rows],
        }


def kinds(rows: Iterable[AccumulatorRow]) -> list[OpKind]:
    """Rows by kind of op, FULLY_CONNECTED first, in the order of the graph."""
    groups: dict[tuple[bool, str], list[AccumulatorRow]] = defaultdict(list)
    for row in rows:
        groups[row.proved.op != "FULLY_CONNECTED", row.kind].append(row)
    found = []
    for (_, name), group in sorted(groups.items(), key=lambda item: item[0][0]):
        bits = [n for row in group for n in row.proved.needed]
        found.append(
            OpKind(
                name,
                group[0].proved.op,
                len(bits),
                max(bits),
                statistics.median_high(bits),
                max(row.seen for row in group),
                {width: sum(row.fitting(width) for row in group) for width in WIDTHS},
            )
        )
    return found


def widest(rows: Iterable[AccumulatorRow], count: int) -> list[AccumulatorRow]:
    """The rows whose accumulators reach farthest, by proof."""
    return sorted(rows, key=lambda row: -row.reach)[:count]


def histogram(bits: Iterable[int]) -> dict[int, int]:
    """How often each number of bits occurs, in rising order."""
    return dict(sorted(Counter(bits).items()))


def join(
    bounds: Sequence[ChannelBounds], observed: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[AccumulatorRow, ...]:
    """Rows of proved bounds and observed ranges, by name."""
    return tuple(
        AccumulatorRow(b, *(tuple(end.tolist()) for end in observed[b.tensor])) for b in bounds
    )


def check_lengths(tokens: int, prefill: int) -> None:
    """Raises UserError where there is no sequence to run, or not one whole."""
    if prefill < 1:
        raise UserError(f"prefill: {prefill} is too short; expected at least 1; raise --prefill")
    if tokens < prefill:
        raise UserError(
            f"tokens: {tokens} are too few; expected at least the {prefill} of one sequence; raise"
            " --tokens, or lower --prefill"
        )


def measure_widths(
    folder: OutputFolder,
    text: Path | None,
    tokens: int,
    prefill: int,
    observe: Observe,
    clock: Clock,
) -> Widths:
    """Proves the accumulators of a folder of `qnpu quantize`, and runs it on a text.

    Args:
      text: held-out, by default Python's documentation.
      tokens: of the text that are read, in sequences of `prefill`.

    Raises:
      UserError: the folder cannot be written to, the text is too short, more positions than the
        model has, or an accumulator can overflow at this length.
    """
    check_lengths(tokens, prefill)
    artifacts.check_can_create(folder.path)
    with clock.stage("load"):
        model = folder.model
        ids = excerpts.tokenized(text, folder.tokenizer, model.config.vocab_size)
        read = ids.first(prefill, tokens)
    with clock.stage("prove"):
        dec = model.decoder(prefill)
        bounds = channel_bounds(dec, model.tensors)
        check_accumulators([b.bound for b in bounds])
        between = proved_intermediates(dec, model.tensors)
        check_intermediates(between)
    with clock.stage("observe"):
        rows = join(bounds, observe(model, read.windows))
    sha256 = folder.report["sha256"].get("integer_model.safetensors", "")
    return Widths(rows, tuple(between), read, prefill, sha256)


def write_widths(found: Widths, out: Path) -> Path:
    """Writes `accumulators.json` into the folder, in place of an older one."""
    path = out / artifacts.ACCUMULATORS
    with artifacts.new_file(path, replace=True) as partial:
        artifacts.write_json(partial, found.to_json())
    return path
