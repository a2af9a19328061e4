"""Widths of a model's accumulators in bits: proved from its weights, channel by channel, and
reached on a text.
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
"""Version of the layout of accumulators.json."""
WIDTHS = (16, 20, 24, 32)
"""Widths of accumulators in hardware, in bits."""

Observe = Callable[[IntegerModel, np.ndarray], Mapping[str, tuple[np.ndarray, np.ndarray]]]
"""Runs sequences of ids (B, T) and returns the smallest and largest accumulator of each channel, by
global name of the op's output."""


@dataclass(frozen=True)
class AccumulatorRow:
    """Accumulator of one op in one layer.

    Attributes:
      proved: bounds of each channel, from the weights.
      low, high: smallest and largest value of each channel in the run.
    """

    proved: ChannelBounds
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def tensor(self) -> str:
        """Global name of the op's output."""
        return self.proved.tensor

    @property
    def kind(self) -> str:
        """Name of the tensor without its layer and KV head, such as `attn.kv*.scores`."""
        return re.sub(r"\bkv\d+\b", "kv*", re.sub(r"^layers\.\d+\.", "", self.tensor))

    @property
    def needed(self) -> int:
        """Bits of the widest channel, by proof."""
        return max(self.proved.needed)

    @property
    def seen(self) -> int:
        """Bits of the widest channel, in the run."""
        return max(self.used)

    @cached_property
    def used(self) -> tuple[int, ...]:
        """Bits of each channel, in the run."""
        return tuple(map(needed_bits, self.low, self.high))

    @property
    def reach(self) -> int:
        """Largest |accumulator| that the proof allows."""
        return max(-self.proved.bound.low, self.proved.bound.high)

    @property
    def reached(self) -> int:
        """Largest |accumulator| in the run."""
        return max(-min(self.low), max(self.high))

    @property
    def holds(self) -> bool:
        """Whether every channel stayed within its bounds."""
        p = self.proved
        ends = zip(p.low, self.low, self.high, p.high, strict=True)
        return all(a <= b <= c <= d for a, b, c, d in ends)

    def fitting(self, bits: int) -> int:
        """Counts the channels that provably fit an accumulator of this width in bits."""
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
    """One op in all layers.

    Attributes:
      name: name of its tensor without layer and KV head.
      op: LiteRT's name of the op.
      channels: number of channels, of all layers together.
      needed, typical: bits of the widest channel and of the median channel, by proof.
      seen: bits of the widest channel, in the run.
      fitting: number of channels that provably fit each of `WIDTHS`.
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
    """Result of `measure_widths`.

    Attributes:
      rows: every FULLY_CONNECTED and BATCH_MATMUL of every layer.
      intermediates: widest values of the other ops before they round.
      text: the text that was run.
      prefill: tokens of a sequence, on which sums over keys depend.
      sha256: digest of the model's integers; empty if the report lacks it.
    """

    rows: tuple[AccumulatorRow, ...]
    intermediates: tuple[Intermediate, ...]
    text: excerpts.Excerpt
    prefill: int
    sha256: str

    @property
    def linears(self) -> tuple[AccumulatorRow, ...]:
        """Rows of FULLY_CONNECTED ops."""
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
    """Groups rows by op over all layers: FULLY_CONNECTED first, then in the order of the graph."""
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
    """Returns the `count` rows whose accumulators reach farthest, by proof."""
    return sorted(rows, key=lambda row: -row.reach)[:count]


def histogram(bits: Iterable[int]) -> dict[int, int]:
    """Counts how often each number of bits occurs, in rising order.

    Example:
      >>> histogram([17, 16, 17])
      {16: 1, 17: 2}
    """
    return dict(sorted(Counter(bits).items()))


def join(
    bounds: Sequence[ChannelBounds], observed: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> tuple[AccumulatorRow, ...]:
    """Joins proved bounds and observed ranges into rows, by global name."""
    return tuple(
        AccumulatorRow(b, *(tuple(end.tolist()) for end in observed[b.tensor])) for b in bounds
    )


def check_lengths(tokens: int, prefill: int) -> None:
    """Raises UserError for a sequence without tokens, or a text shorter than one sequence."""
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
    """Proves the accumulators of a folder of `qnpu quantize`, and observes them on a text.

    Args:
      text: held-out text; None takes `pydoc_data.topics`.
      tokens: tokens of the text that are run, in sequences of `prefill`.
      observe: runs sequences, such as `observe_accumulators`.

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
    """Writes `accumulators.json` into a folder, in place of an older one, and returns its path."""
    path = out / artifacts.ACCUMULATORS
    with artifacts.new_file(path, replace=True) as partial:
        artifacts.write_json(partial, found.to_json())
    return path
