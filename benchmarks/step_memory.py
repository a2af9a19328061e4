"""Reads the memory of a step of learning from XLA's plan, as model and text grow.

No weights are needed: the step is compiled for shapes, and with --batches run on zeros, which take
as long as any numbers. Goal: at most three times the float32 weights (model, teacher, and what is
learned of them) plus the activations of one layer for all tokens of a batch, because layers are
computed again in the backward pass.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import Decoder, decoder
from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.qparams import QParams
from qnpu_jax.graph.scales import is_free
from qnpu_jax.learn.losses import Batch
from qnpu_jax.learn.parameters import Base, initial_theta, theta_units
from qnpu_jax.learn.train import compile_stage, initial_state, matmul_precision
from qnpu_jax.models import checkpoint
from qnpu_jax.recipes import EFFORTS, load_recipe

CASES = (
    # layers, batch, tokens of a sequence
    (30, 8, 512),
    (30, 4, 512),
    (30, 8, 256),
    (30, 2, 1024),
    (15, 8, 512),
    (60, 8, 512),
)
QUICK = ((2, 1, 32),)
PREFIX = 2


@dataclass(frozen=True)
class Row:
    """Bytes: of the parameters, of one layer's activations, of arguments and results that stay, of
    what the step needs besides."""

    weights: int
    layer: int
    arguments: int
    temporary: int

    @property
    def total(self) -> int:
        return self.arguments + self.temporary

    @property
    def bound(self) -> int:
        return 3 * self.weights + self.layer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="its dimensions are used")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--stage", type=int, default=0, help="of the recipe")
    parser.add_argument("--quick", action="store_true", help="two layers, 32 tokens")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[],
        help="instead: seconds of a step of the whole model, for so many windows of 512 tokens",
    )  # fmt: skip
    return parser.parse_args()


def parameters(dec: Decoder) -> dict[str, np.ndarray]:
    """Zeros of the shapes of the folded parameters; pages that nobody writes take no memory."""
    return {
        graph.prefix + spec.name: np.zeros(_stacked(graph, spec.shape), np.float32)
        for graph in dec.graphs
        for spec in graph.named("param")
    }


def free_scales(dec: Decoder) -> dict[str, QParams]:
    """Ones of the shapes of the free scales."""
    free = {}
    for graph in dec.graphs:
        for spec in graph.tensors:
            if is_free(graph, spec.name):
                channels = spec.shape[:1] if spec.quant.axis == 0 else ()
                scale = np.ones(_stacked(graph, channels), np.float32)
                found = QParams(scale=scale, zero_point=np.zeros_like(scale))
                free[graph.prefix + spec.name] = found
    return free


def _stacked(graph: Graph, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (graph.layers, *shape) if graph.layered else shape


class Compiled(NamedTuple):
    """A compiled step, the graphs it is of, and shapes of its arguments."""

    step: Any
    dec: Decoder
    arguments: tuple[Any, ...]


def compiled(config: ModelConfig, args: argparse.Namespace, batch: int, length: int) -> Compiled:
    recipe = load_recipe(args.recipe)
    stage = recipe.stages[args.stage]
    dec = decoder(config, recipe.bits, length, PREFIX)
    params, free = parameters(dec), free_scales(dec)
    theta = initial_theta(dec, free, [group for group, _ in stage.learn])
    state = initial_state(stage, theta, 100)
    state = replace(state, best=None, best_kl=None, stale=None, first_loss=None)
    base = Base(
        params=params,
        free=free,
        units=theta_units(dec, free),
        teacher=params,
        basis=np.eye(config.hidden_size, dtype=np.float32),
    )
    effort = replace(EFFORTS["full"], batch=batch, length=length)
    ids: Any = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    arguments = (state, base, Batch(ids), jax.ShapeDtypeStruct((), jnp.float32))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with matmul_precision(effort):
        step: Any = compile_stage(dec, stage, effort, 100).step.lower(*shapes).compile()
    return Compiled(step, dec, shapes)


def seconds(config: ModelConfig, args: argparse.Namespace, batch: int, length: int) -> float:
    """Median of six steps, after two."""
    step, _, shapes = compiled(config, args, batch, length)
    state, *rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        state, loss, _ = step(state, *rest)
        loss.block_until_ready()
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:]))


def measure(config: ModelConfig, args: argparse.Namespace, batch: int, length: int) -> Row:
    step, dec, _ = compiled(config, args, batch, length)
    plan = step.memory_analysis()
    activations = sum(math.prod(t.shape) for t in dec.layer.tensors if t.kind not in ("param",))
    return Row(
        weights=4 * sum(x.size for x in parameters(dec).values()),
        layer=4 * batch * activations,
        arguments=plan.argument_size_in_bytes,
        temporary=plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes,
    )


def main() -> int:
    args = arguments()
    try:
        config = checkpoint.load(args.model).config
        for batch in args.batches:
            took = seconds(config, args, batch, 64 if args.quick else 512)
            print(f"{batch} windows: {took:.4f} s a step of {args.recipe}", flush=True)
        if args.batches:
            return 0
        rows = []
        print(
            f"{'layers':>6} {'batch':>5} {'tokens':>6} {'weights':>9} {'one layer':>10}"
            f" {'arguments':>10} {'temporary':>10} {'total':>9} {'bound':>9}  MiB"
        )
        for layers, batch, length in QUICK if args.quick else CASES:
            row = measure(replace(config, num_layers=layers), args, batch, length)
            cells = (row.weights, row.layer, row.arguments, row.temporary, row.total, row.bound)
            print(
                f"{layers:6} {batch:5} {length:6}" + "".join(f"{c / 2**20:10.0f}" for c in cells),
                flush=True,
            )
            rows.append(row)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    worst = max(row.total / row.bound for row in rows)
    print(f"a step of {args.recipe} takes at most {worst:.2f} of the bound")
    return 0 if worst <= 1 or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
