"""Tables of `qnpu bench`: latency measured on this CPU or on a phone, and estimated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from qnpu_jax.cli.tables import show, table
from qnpu_jax.integer import IntegerModel
from qnpu_jax.latency import CpuTiming, PhoneTiming, cpu, roofline
from qnpu_jax.tflite import cached_decoder

LEFT = ("model", "signature", "delegate", "SoC", "phase")
"""Columns that are not numbers."""


def print_cpu(rows: Sequence[CpuTiming], threads: int) -> None:
    """Prints medians measured on this CPU, and how many times float32's speed they are."""
    title = f"this CPU, {threads} thread{'s' * (threads > 1)}, LiteRT's default kernels, medians"
    made = table(title, ("model", "signature", "ms", "tokens/s", "times float32"), LEFT)
    faster = cpu.speedups(rows)
    for r in rows:
        ratio = f"{faster[r.signature]:.2f}" if r.reader == cpu.INTEGERS else ""
        speed = (f"{1000 * r.median:.2f}", f"{r.tokens_per_second:.1f}")
        made.add_row(r.reader, r.signature, *speed, ratio)
    show(made)


def print_phone(timings: Sequence[PhoneTiming]) -> None:
    """Prints what LiteRT's benchmark_model measured on a phone."""
    made = table("on the phone", ("delegate", "signature", "ms", "tokens/s", "delegated"), LEFT)
    for t in timings:
        speed = (f"{1000 * t.average:.2f}", f"{t.tokens_per_second:.1f}")
        made.add_row(t.delegate, t.signature, *speed, str(t.delegation))
    show(made)


def print_estimates(model: IntegerModel, prefill: int, context: int) -> None:
    """Prints the roofline's estimates for Snapdragons, and how far they are off published runs."""
    show(_estimates(model, prefill, context), _validation())


def _estimates(model: IntegerModel, prefill: int, context: int) -> Table:
    made = table(
        "estimates, not measurements: a start, and the larger of bytes / bandwidth and MACs / rate",
        ("SoC", "signature", "ms", "tokens/s", "bound by", "fit's error"),
        LEFT,
    )
    for name in roofline.SOCS:
        for key, tokens in ((f"prefill_{prefill}", prefill), ("decode", 1)):
            dec = cached_decoder(model, tokens, context)
            found = roofline.estimate(
                roofline.soc(name), roofline.least_bytes(dec), roofline.macs(dec)
            )
            speed = (f"{1000 * found.seconds:.2f}", f"{tokens / found.seconds:.0f}")
            made.add_row(name, key, *speed, found.limit, f"{100 * found.error:.0f}%")
    return made


def _validation() -> Table:
    made = table(
        "the same estimate of published runs, each left out of its fit: errors of tokens/s",
        ("SoC", "phase", "runs", "rms", "largest", "of"),
        (*LEFT, "of"),
    )
    rows: dict[tuple[str, str], list[roofline.Validation]] = {}
    for v in roofline.validation():
        rows.setdefault((v.soc, v.phase), []).append(v)
    for soc in roofline.SOCS:
        for phase in ("decode", "prefill"):
            mine = rows[soc, phase]
            worst = max(mine, key=lambda v: abs(v.error))
            mean = math.sqrt(sum(v.error**2 for v in mine) / len(mine))
            errors = (f"{100 * mean:.0f}%", f"{100 * worst.error:+.0f}%")
            made.add_row(soc, phase, str(len(mine)), *errors, worst.model)
    return made
