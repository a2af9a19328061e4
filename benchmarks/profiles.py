"""Measures how far rounding profiles lie apart: which choice of a kernel set, or NPU, matters.

Three distances to `litert_ref`: op by op on equal inputs (codes that differ, by op), the final
logits (where every early code that differs has spread), and the perplexity of the whole model. The
last is what a user sees; the noise that the others show is of the size of rounding itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import outcome
from bitexact import integers, real_text

from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.measure.perplexity import divergence, integer_logits, perplexity
from qnpu_sim.program import Program, compile_model, run
from qnpu_sim.rounding import Npu, Profile
from qnpu_sim.run_graph import run_op

PLAIN = Npu()
PROFILES: dict[str, Profile] = {
    "litert_ref": "litert_ref",
    "litert_opt": "litert_opt",
    "litert_xnn": "litert_xnn",
    "npu": PLAIN,
    "npu single": replace(PLAIN, rounding="single"),
    "npu single even": replace(PLAIN, rounding="single", ties="even"),
    "npu 15 bits": replace(PLAIN, multiplier_bits=15),
    "npu 65 entries": replace(PLAIN, table_entries=65),
    "npu 257 entries": replace(PLAIN, table_entries=257),
}
JUDGED = ("litert_opt", "litert_xnn", "npu", "npu single")
EVERY = 3
"""Of the layers, one in three is compared op by op: the ops are the same."""
LIMIT = 0.01
"""Relative distance of perplexities that a profile of 31-bit multipliers and LiteRT's tables may
have: half of what an emulated NPU is allowed."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["w8a8", "w4a8"], help="recipes, or `qnpu quantize` folders"
    )
    parser.add_argument("--text", type=Path, help="real text; default: pydoc_data.topics")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, for perplexity")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="w8a8, four profiles, 2 x 64 tokens")
    args = parser.parse_args()
    if args.quick:
        args.models, args.windows, args.length = ["w8a8"], 2, 64
    return args


@dataclass(frozen=True)
class Row:
    """A profile's distances to `litert_ref`.

    Attributes:
      ops: by op, share of codes that differ on equal inputs, and the largest difference.
      logits, largest: of the final ones.
      kl, top1: KL(litert_ref || profile) in nats per token; share of equal first choices.
    """

    model: str
    profile: str
    ops: dict[str, tuple[float, int]]
    logits: float
    largest: int
    perplexity: float
    kl: float
    top1: float
    seconds: float

    def __str__(self) -> str:
        worst = sorted(self.ops.items(), key=lambda item: -item[1][0])
        ops = ", ".join(f"{op} {s:.3%} ({n})" for op, (s, n) in worst if s) or "none"
        return (
            f"{self.model:16}{self.profile:18}{self.perplexity:10.4f}{self.kl:10.5f}"
            f"{self.top1:8.2%}{self.logits:9.2%}{self.largest:7}{self.seconds:7.0f}  {ops}"
        )


def op_by_op(program: Program, tensors: dict[str, np.ndarray]) -> dict[str, tuple[float, int]]:
    """Compares the program's ops on given inputs with the given outputs, by kind of op."""
    count: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3, np.int64))
    kernel = jax.jit(run_op, static_argnums=(0, 1, 2))
    residual: dict[str, Any] = {}
    with jax.enable_x64():
        for graph, codes, constants in zip(
            program.decoder.graphs, program.codes, program.constants, strict=True
        ):
            for layer in range(graph.layers):
                made = {n.output: graph.global_name(layer, n.output) for n in graph.nodes}
                held = codes[layer] | residual | {n: tensors[g] for n, g in made.items()}
                residual = {"input.residual": held[graph.outputs[0]]}
                for node in graph.nodes:
                    if node.output in constants[layer] and layer % EVERY == 0:
                        x = [jnp.asarray(held[n]) for n in node.inputs]
                        # Layer 0: all layers of these models have the same bits.
                        y = kernel(graph, node, 0, x, constants[layer][node.output])
                        distance = np.abs(np.asarray(y, np.int64) - held[node.output])
                        row = count[f"{type(node.op).__name__} {y.dtype}"]
                        row += np.asarray([np.count_nonzero(distance), distance.size, 0])
                        row[2] = max(row[2], distance.max())
    return {op: (differ / size, int(largest)) for op, (differ, size, largest) in count.items()}


def measure(
    name: str, model: IntegerModel, windows: np.ndarray, profiles: dict[str, Profile]
) -> Iterator[Row]:
    """Every profile of one model; `litert_ref` comes first."""
    dec = model.decoder(windows.shape[1])
    first = compile_model(model, dec, "litert_ref")
    short = model.decoder(min(64, windows.shape[1]))
    ids = windows[0, : short.tokens]
    small = compile_model(model, short, "litert_ref")
    tensors = {n: np.asarray(x) for n, x in run(small, ids, lambda _: True).items()}

    def logits_of(program: Program) -> Any:
        return integer_logits(model, lambda ids: run(program, ids)["head.logits"])

    some = windows[:4]
    expected = {ids.tobytes(): np.asarray(logits_of(first)(ids)) for ids in some}

    for label, profile in profiles.items():
        start = time.perf_counter()
        got = np.asarray(run(compile_model(model, short, profile), ids)["head.logits"])
        distance = np.abs(got.astype(np.int64) - tensors["head.logits"])
        reading = logits_of(compile_model(model, dec, profile))
        apart = divergence(lambda ids: expected[ids.tobytes()], reading, some)
        yield Row(
            name,
            label,
            op_by_op(compile_model(model, short, profile), tensors),
            float((distance > 0).mean()),
            int(distance.max()),
            perplexity(reading, windows),
            apart.kl,
            apart.top1,
            time.perf_counter() - start,
        )


def short_of(rows: list[Row], quick: bool) -> list[str]:
    """Returns where profiles of LiteRT or of a plain NPU pass one code op by op, or `LIMIT`.

    A quick run's model has outliers and its text 128 tokens: its perplexity is chance.
    """
    base = {r.model: r.perplexity for r in rows if r.profile == "litert_ref"}
    short = []
    for r in (r for r in rows if r.profile in JUDGED):
        largest = max((n for _, n in r.ops.values()), default=0)
        if largest > 1:
            short.append(f"{r.model} {r.profile}: {largest} codes in one op")
        if not quick and abs(r.perplexity / base[r.model] - 1) > LIMIT:
            short.append(f"{r.model} {r.profile}: {r.perplexity / base[r.model] - 1:+.2%}")
    return short


def measured(args: argparse.Namespace) -> int:
    chosen = dict(list(PROFILES.items())[:4]) if args.quick else PROFILES
    ids = real_text(args.text, args.windows * args.length)
    windows = ids.reshape(args.windows, args.length)
    print(
        f"{'model':16}{'profile':18}{'perplexity':>10}{'KL':>10}{'top-1':>8}{'logits':>9}"
        f"{'most':>7}{'s':>7}  codes that differ, op by op (by at most)"
    )
    rows: list[Row] = []
    for name, model in integers(args.models, args.quick):
        for row in measure(name, model, windows, chosen):
            rows.append(row)
            print(row, flush=True)
    short = short_of(rows, args.quick)
    print("".join(f"short of the goal: {s}\n" for s in short), end="")
    far = max(rows, key=lambda r: r.kl)
    print(f"furthest from litert_ref: {far.model} under {far.profile}, KL {far.kl:.5f}")
    return 1 if short else 0


def main() -> int:
    args = arguments()
    return outcome.status(lambda: measured(args))


if __name__ == "__main__":
    sys.exit(main())
