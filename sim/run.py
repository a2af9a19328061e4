"""The simulator: an `IntegerModel` executed on integers, every tensor by name.

One compiled layer serves all layers: what differs between them (weights, multipliers, tables) is an
argument. Bits are part of the compiled program, so a model of mixed precision compiles one layer
per pattern of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.accumulators import overflowing, proved_bounds
from qnpu_jax.config import UserError
from qnpu_jax.freeze import IntegerModel
from qnpu_jax.graph import Graph, Node, TensorSpec, is_identity
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
from sim import elementwise, kernels, prepare
from sim.numerics import Profile, Rules, rules_of

Codes = dict[str, jax.Array]
NO_INPUTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Program:
    """A model made ready for one profile and one length.

    Attributes:
      decoder: the staged graphs (`IntegerModel.decoder`).
      codes: per graph and layer, codes of parameters and shared inputs by local name.
      constants: per graph and layer, the kernels' constants by output name.
    """

    decoder: Any
    profile: Profile
    codes: list[list[Codes]]
    constants: list[list[dict[str, Any]]]


def compile_model(model: IntegerModel, dec: Any, profile: Profile = "litert_ref") -> Program:
    """Makes the constants of every op and puts them and the weights on the device.

    Args:
      dec: `model.decoder(tokens, ...)`.
      profile: a name of `sim.numerics.PROFILES`, or an `Npu`.

    Raises:
      UserError: the profile cannot represent an op, or its accumulators may overflow.
    """
    rules = rules_of(profile)
    tight = _tight(model, dec, rules)
    shared = model.inputs(dec)
    with jax.enable_x64():
        codes, constants = [], []
        for graph in dec.graphs:
            layers = range(graph.layers)
            own = [_codes_of(model, graph, i, shared) for i in layers]
            codes.append([jax.tree.map(jnp.asarray, c) for c in own])
            made = [_constants_of(model, graph, i, own[i], rules, tight) for i in layers]
            constants.append([jax.tree.map(jnp.asarray, c) for c in made])
    return Program(dec, profile, codes, constants)


def run(
    program: Program,
    ids: Any,
    keep: Callable[[str], bool] = lambda _: False,
    inputs: Mapping[str, Any] = NO_INPUTS,
) -> Codes:
    """Codes of the logits, and of every tensor whose global name `keep` accepts.

    Args:
      ids: (T,) or (B, T) token ids.
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
                global_name(graph, layer, n): x
                for n, x in env.items()
                if n in graph.outputs or keep(global_name(graph, layer, n))
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
    with jax.enable_x64():
        values: Codes = {"ids": jnp.asarray(ids, jnp.int32)}
        x = None
        for graph, codes, constants in zip(
            program.decoder.graphs, program.codes, program.constants, strict=True
        ):
            for layer in range(graph.layers):
                kept = tuple(
                    t.name
                    for t in graph.tensors
                    if t.kind == "activation"
                    and (t.name in graph.outputs[:1] or keep(global_name(graph, layer, t.name)))
                )
                like = _same_bits(graph, layer)
                own = {t.name: global_name(graph, layer, t.name) for t in graph.named("input")}
                given = {n: inputs.get(g, inputs.get(n)) for n, g in own.items()}
                values |= {n: jnp.asarray(x) for n, x in given.items() if x is not None}
                env = _compiled_layer()(graph, like, kept, codes[layer], constants[layer], values)
                yield graph, layer, env
                x = env[graph.outputs[0]]
                values = {"input.residual": x}


def global_name(graph: Graph, layer: int, name: str) -> str:
    """`layers.3.attn.q` for the layer graph, `embed.out`, `head.logits` elsewhere."""
    return f"layers.{layer}.{name}" if graph.prefix == "layers." else graph.prefix + name


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
def _compiled_layer() -> Callable[..., Codes]:
    options = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
    return jax.jit(_run_layer, static_argnums=(0, 1, 2), compiler_options=options)


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
            return kernels.fully_connected(x[0], x[1], constants)
        case BatchMatmul(adj_y=adj_y):
            tight = constants.limit is not None
            narrow = [_operand(graph, n, layer, tight) for n in node.inputs]
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


def dtype_of(spec: TensorSpec, layer: int) -> np.dtype:
    """int8 for codes of up to 8 bits, int16 above."""
    assert spec.quant is not None
    return np.dtype(np.int8 if spec.quant.bits[layer] <= 8 else np.int16)


def narrow_source(graph: Graph, name: str, layer: int) -> str:
    """The 8-bit tensor that `name` was widened from (exactly), or `name`."""
    producer = next((n for n in graph.nodes if n.output == name), None)
    if producer is None or not isinstance(producer.op, Requantize):
        return name
    source, target = graph[producer.inputs[0]].quant, graph[name].quant
    assert source is not None and target is not None
    widens = source.bits[layer] == 8 and target.bits[layer] == 16
    return producer.inputs[0] if widens else name


def _codes_of(
    model: IntegerModel, graph: Graph, layer: int, shared: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    own = model.constants(graph, layer)
    return own | {t.name: shared[t.name] for t in graph.named("input") if t.name in shared}


def _at(array: np.ndarray, graph: Graph, layer: int) -> Any:
    return array[layer] if graph.prefix == "layers." else array[()]


def _tight(model: IntegerModel, dec: Any, rules: Rules) -> frozenset[str]:
    """Outputs of ops whose sums are not proved to fit the profile's accumulators, by global name.

    Raises:
      UserError: there are some, and the profile does not say what happens to them.
    """
    if rules.accumulator_bits is None:
        return frozenset()
    bounds = proved_bounds(dec, model.codes, model.zero_point)
    passing = overflowing(bounds, rules.accumulator_bits)
    if passing and rules.overflow == "error":
        worst = max(passing, key=lambda b: b.needed)
        raise UserError(
            f"{worst.tensor}: its accumulator ({worst.op}) can reach [{worst.low}, {worst.high}],"
            f" which needs {worst.needed} bits; got accumulator_bits={rules.accumulator_bits};"
            f" {len(passing)} ops are past it: widen it, or choose overflow='wrap' or 'saturate'"
        )
    return frozenset(b.tensor for b in passing)


def _constants_of(
    model: IntegerModel,
    graph: Graph,
    layer: int,
    codes: dict[str, np.ndarray],
    rules: Rules,
    tight: frozenset[str],
) -> dict[str, Any]:
    def scale(name: str) -> Any:
        return _at(model.scale[graph.prefix + name], graph, layer)

    def pair(name: str) -> tuple[Any, int]:
        return scale(name), int(_at(model.zero_point[graph.prefix + name], graph, layer))

    made = {}
    for node in graph.nodes:
        if not is_identity(graph, node, layer):
            name = global_name(graph, layer, node.output)
            try:
                constants = _prepare(graph, node, layer, codes, rules, name in tight, scale, pair)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            if constants is not None:
                made[node.output] = constants
    return made


def _prepare(
    graph: Graph,
    node: Node,
    layer: int,
    codes: dict[str, np.ndarray],
    rules: Rules,
    tight: bool,
    scale: Callable[[str], Any],
    pair: Callable[[str], tuple[Any, int]],
) -> Any:
    names, out = node.inputs, node.output
    if isinstance(node.op, Embedding | Reshape | Transpose | Slice | Concat):
        return None
    dtype = dtype_of(graph[names[0]], layer)
    match node.op:
        case FullyConnected():
            weights = graph[names[1]].quant
            assert weights is not None
            return prepare.prepare_fully_connected(
                rules,
                dtype,
                codes[names[1]],
                codes[names[2]],
                *pair(names[0]),
                scale(names[1]),
                *pair(out),
                weight_bits=weights.bits[layer],
                tight=tight,
            )
        case BatchMatmul():
            x, y = (pair(_operand(graph, n, layer, tight)) for n in names)
            return prepare.prepare_batch_matmul(rules, dtype, *x, *y, *pair(out), tight=tight)
        case Add() | AddMask():
            return prepare.prepare_add(rules, dtype, *pair(names[0]), *pair(names[1]), *pair(out))
        case Mul() | Keep():
            return prepare.prepare_mul(rules, dtype, *pair(names[0]), *pair(names[1]), *pair(out))
        case Requantize():
            output = dtype_of(graph[out], layer)
            return prepare.prepare_quantize(rules, dtype, output, *pair(names[0]), *pair(out))
        case Softmax() if dtype == np.int8:
            return prepare.prepare_softmax_int8(rules, scale(names[0]))
        case Softmax():
            return prepare.prepare_softmax_int16(rules, scale(names[0]))
        case Logistic() | Sqrt() | Rsqrt():
            kind: Any = type(node.op).__name__.lower()
            return prepare.prepare_unary(kind, rules, dtype, *pair(names[0]), *pair(out))
        case _:
            assert_never(node.op)


def _operand(graph: Graph, name: str, layer: int, tight: bool) -> str:
    """What a BATCH_MATMUL multiplies: the byte behind a widened operand (`narrow_source`), but
    where its sum is limited and so has to be the file's own."""
    return name if tight else narrow_source(graph, name, layer)
