"""The simulator: an `IntegerModel` executed on integers, every tensor by name.

One compiled layer serves all layers: what differs between them (weights, multipliers, tables) is an
argument. Bits are part of the compiled program, so a model of mixed precision compiles one layer
per pattern of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qnpu_jax.freeze import IntegerModel
from qnpu_jax.graph import Graph, Node, is_identity
from qnpu_jax.ops import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    Embedding,
    FullyConnected,
    Keep,
    Logistic,
    Mul,
    Requantize,
    Reshape,
    Rsqrt,
    Slice,
    Softmax,
    Sqrt,
    Transpose,
)
from sim import elementwise, kernels, parallel
from sim.blocks import by_channels
from sim.constants import constants_of, dtype_of, operand, tight_sums
from sim.numerics import Profile, rules_of

Codes = dict[str, jax.Array]
NO_INPUTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Program:
    """A model made ready for one profile and one length.

    Attributes:
      decoder: the staged graphs (`IntegerModel.decoder`).
      codes: per graph and layer, codes of parameters and shared inputs by local name.
      constants: per graph and layer, the kernels' constants by output name.
      mesh: the devices that share a batch's sequences; None for one.
    """

    decoder: Any
    profile: Profile
    codes: list[list[Codes]]
    constants: list[list[dict[str, Any]]]
    mesh: Mesh | None = None


def compile_model(
    model: IntegerModel,
    dec: Any,
    profile: Profile = "litert_ref",
    devices: Sequence[Any] | None = None,
) -> Program:
    """Makes the constants of every op and puts them and the weights on the device.

    Args:
      dec: `model.decoder(tokens, ...)`.
      profile: a name of `sim.numerics.PROFILES`, or an `Npu`.
      devices: of JAX; each gets all weights, and its share of the sequences of a batch;
        None for JAX's default device. The bits do not depend on them.

    Raises:
      UserError: the profile cannot represent an op, or its accumulators may overflow.
    """
    rules = rules_of(profile)
    tight = tight_sums(model, dec, rules)
    shared = model.inputs(dec)
    mesh = None if devices is None else parallel.mesh_of(devices)
    put = partial(jax.tree.map, jnp.asarray) if mesh is None else partial(parallel.replicate, mesh)
    with jax.enable_x64():
        codes, constants = [], []
        for graph in dec.graphs:
            layers = range(graph.layers)
            own = [_codes_of(model, graph, i, shared) for i in layers]
            codes.append([put(c) for c in own])
            made = [constants_of(model, graph, i, own[i], rules, tight) for i in layers]
            constants.append([put(c) for c in made])
    return Program(dec, profile, codes, constants, mesh)


def run(
    program: Program,
    ids: Any,
    keep: Callable[[str], bool] = lambda _: False,
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Codes:
    """Codes of the logits, and of every tensor whose global name `keep` accepts.

    Args:
      ids: (T,) or (B, T) token ids. Of a program on several devices each takes B / devices
        sequences, rounded up; one sequence (T,) alone is run by all of them alike.
      keep: chooses tensors by global name (`layers.3.attn.q`).
      inputs: of the layers; cached keys and values `layers.3.attn.cache_k` (N, C, K) where the
        program has a cache, and in place of the program's own what all layers share (`mask`,
        `rope.cos`, `rope.sin`). Takes one sequence, ids (T,).

    Returns:
      By global name: `head.logits` (.., T, V) and what was kept, with the batch axis of `ids`.
    """
    out: Codes = {}
    for graph, layer, env in steps(program, ids, keep, inputs):
        out.update(
            {
                graph.global_name(layer, n): x
                for n, x in env.items()
                if n in graph.outputs or keep(graph.global_name(layer, n))
            }
        )
    return {n: x for n, x in out.items() if n == "head.logits" or keep(n)}


def steps(
    program: Program,
    ids: Any,
    keep: Callable[[str], bool],
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Iterator[tuple[Graph, int, Codes]]:
    """Graph by graph and layer by layer: its output and the kept tensors, by local name."""
    mesh, ids = program.mesh, jnp.asarray(ids, jnp.int32)
    values: Codes = {"ids": ids if mesh is None else parallel.spread(mesh, ids)}
    run_layer = _compiled_layer(mesh)
    for graph, codes, constants in zip(
        program.decoder.graphs, program.codes, program.constants, strict=True
    ):
        for layer in range(graph.layers):
            kept = tuple(
                t.name
                for t in graph.tensors
                if t.kind == "activation"
                and (t.name in graph.outputs[:1] or keep(graph.global_name(layer, t.name)))
            )
            like = _same_bits(graph, layer)
            own = {t.name: graph.global_name(layer, t.name) for t in graph.named("input")}
            given = {n: inputs.get(g, inputs.get(n)) for n, g in own.items()}
            values |= {n: jnp.asarray(x) for n, x in given.items() if x is not None}
            with jax.enable_x64():  # not while the caller has what is yielded
                env = run_layer(graph, like, kept, codes[layer], constants[layer], values)
            filled = mesh is not None and ids.ndim == 2 and ids.shape[0] % mesh.size
            yield graph, layer, {n: x[: len(ids)] for n, x in env.items()} if filled else env
            values = {"input.residual": env[graph.outputs[0]]}


def _same_bits(graph: Graph, layer: int) -> int:
    """The first layer with the same bits everywhere, which has the same compiled program."""
    bits = [t.quant.bits for t in graph.tensors if t.quant is not None]
    return next(i for i in range(layer + 1) if all(b[i] == b[layer] for b in bits))


_CPU_OPTIONS = {
    "xla_disable_hlo_passes": "cse_barrier_expander,tree_reduction_rewriter",
    "xla_cpu_prefer_vector_width": 512,
}
"""Two passes of XLA's CPU compiler cost half of the speed, and bits depend on none of this. One
removes the barriers of `run_graph` before fusion, which then computes a tensor anew for each of its
readers; the other cuts integer reductions into windows that it does not vectorize."""

_TOKENS = 512
"""Of a batch, so many tokens are computed at a time: enough for the dots, few enough for caches."""


@cache
def _compiled_layer(mesh: Mesh | None) -> Callable[..., Codes]:
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    options = _CPU_OPTIONS if platform == "cpu" else None
    function = _run_layer if mesh is None else partial(_run_layer_on, mesh)
    return jax.jit(function, static_argnums=(0, 1, 2), compiler_options=options)


def _run_layer(
    graph: Graph,
    layer: int,
    kept: tuple[str, ...],
    codes: Codes,
    constants: dict[str, Any],
    values: Codes,
) -> Codes:
    def one(values: Codes) -> Codes:
        env = run_graph(graph, layer, {**codes, **values}, constants)
        return {n: env[n] for n in kept}

    name, first = next(iter(values.items()))
    shape = graph[name].shape
    if first.ndim == len(shape):
        return one(values)
    return jax.lax.map(one, values, batch_size=max(1, _TOKENS // shape[0]))


def _run_layer_on(
    mesh: Mesh,
    graph: Graph,
    layer: int,
    kept: tuple[str, ...],
    codes: Codes,
    constants: dict[str, Any],
    values: Codes,
) -> Codes:
    name, first = next(iter(values.items()))
    batched = first.ndim > len(graph[name].shape)
    function = partial(_run_layer, graph, layer, kept)
    return parallel.shards(mesh, function, batched=batched)(codes, constants, values)


def run_graph(graph: Graph, layer: int, values: Codes, constants: Mapping[str, Any]) -> Codes:
    """Every tensor of one sequence by local name, from codes of inputs and parameters.

    A barrier after every op keeps XLA from computing it again in each op that reads it.
    """
    env = dict(values)
    for node in graph.nodes:
        x = [env[n] for n in node.inputs]
        if is_identity(graph, node, layer):
            env[node.output] = x[0]
        else:
            y = run_op(graph, node, layer, x, constants.get(node.output))
            env[node.output] = jax.lax.optimization_barrier(y)
    return env


def run_op(graph: Graph, node: Node, layer: int, x: list[jax.Array], constants: Any) -> jax.Array:
    """The op's meaning on integer codes."""
    match node.op:
        case Embedding():
            return kernels.gather(x[0], x[1])
        case FullyConnected():
            return by_channels(kernels.fully_connected, x[0], x[1], constants)
        case BatchMatmul(adj_y=adj_y):
            tight = constants.limit is not None
            narrow = [operand(graph, n, layer, tight) for n in node.inputs]
            y = graph[narrow[1]].quant
            return kernels.batch_matmul(
                x[0],
                x[1],
                constants,
                adj_y=adj_y,
                x_is_byte=narrow[0] != node.inputs[0],
                y_is_byte=narrow[1] != node.inputs[1],
                y_is_symmetric=y is not None and y.symmetric,
            )
        case Add() | AddMask():
            return elementwise.add(x[0], x[1], constants)
        case Mul() | Keep():
            return elementwise.mul(x[0], x[1], constants)
        case Requantize():
            return elementwise.quantize(x[0], constants, dtype=dtype_of(graph[node.output], layer))
        case Softmax():
            softmax = kernels.softmax_int8 if x[0].dtype == jnp.int8 else kernels.softmax_int16
            return softmax(x[0], constants)
        case Logistic() | Sqrt() | Rsqrt():
            return kernels.unary(x[0], constants)
        case Reshape(shape=shape):
            return kernels.reshape(x[0], shape=shape)
        case Transpose(perm=perm):
            return kernels.transpose(x[0], perm=perm)
        case Slice(begin=begin, size=size):
            return kernels.slice_(x[0], begin=begin, size=size)
        case Concat(axis=axis):
            return kernels.concatenation(*x, axis=axis)
        case _:
            assert_never(node.op)


def _codes_of(
    model: IntegerModel, graph: Graph, layer: int, shared: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    own = model.constants(graph, layer)
    return own | {t.name: shared[t.name] for t in graph.named("input") if t.name in shared}
