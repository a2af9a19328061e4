"""Errors of every activation tensor of a simulated model: SQNR against float, clipping, use of
codes.

The float reference of a tensor is the float pass: the same graph on the integer model's own
constants (weights, biases, prefix and tables, dequantized), with no activation rounded. An output
folder keeps no float parameters, and learning has changed them, so only this reference has the same
names in the same basis. It does not show what rounding the weights lost; logits compared with the
original model do (`attribution`).

A tensor is compared twice. Its `sqnr` is against the float pass, so it includes all errors of
earlier ops. Its `own_sqnr` is against the op in real numbers on the simulator's inputs: only what
this op loses by rounding, clipping or a table.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qnpu_jax.fakequant import evaluate
from qnpu_jax.graph import (
    LAYERS,
    AddMask,
    Bounds,
    Decoder,
    Fixed,
    Graph,
    Narrowed,
    Node,
    Op,
    QParams,
    Reader,
    Same,
    Tensors,
    constraint,
    eval_op,
    is_identity,
    local,
    ranges_of,
    select_shared,
    shared_names,
)
from qnpu_jax.integer import IntegerModel, activation_scales, dequantize

Quant = dict[str, tuple[QParams, Any, Any]]
"""QParams, qmin and qmax of activations, by local name."""


def rounds(graph: Graph, node: Node, layer: int) -> bool:
    """Whether an op rounds. Ops that copy or widen codes lose nothing."""
    match constraint(node.op):
        case Same():
            return False
        case Narrowed():
            source, target = graph[node.inputs[0]].quant, graph[node.output].quant
            assert source is not None and target is not None
            widens = source.bits[layer] < target.bits[layer]
            return not (widens or is_identity(graph, node, layer))
        case _:
            return True


def by_design(op: Op) -> str | None:
    """Returns why codes at the ends of the range are no sign of a bad scale; None where they are.

    Masked scores are no exception, because only keys that are not masked are counted.
    """
    match constraint(op):
        case Fixed():
            return "the kernel fixes the range to [0, 1): 1 is the code above the highest"
        case _:
            return None


def rounding_tensors(dec: Decoder) -> dict[str, tuple[str, int]]:
    """Returns the tensors that round, by global name: the name without the layer, and the layer."""
    return {
        graph.global_name(layer, node.output): (graph.prefix + node.output, layer)
        for graph in dec.graphs
        for layer in range(graph.layers)
        for node in graph.nodes
        if rounds(graph, node, layer)
    }


@dataclass(frozen=True, eq=False)
class Constants:
    """Constants of an integer model in real numbers, for windows of one length.

    Attributes:
      decoder: graphs for this length.
      params: dequantized parameters, by global name without the layer, stacked over layers.
      tables: dequantized RoPE tables, mask and eps, by shared name (`graph.shared_names`).
      scales: scale and zero point of activations, by global name without the layer.
      ranges: qmin and qmax of activations, by global name without the layer.
    """

    decoder: Decoder
    params: dict[str, jax.Array]
    tables: Tensors
    scales: dict[str, QParams]
    ranges: dict[str, Bounds]

    @classmethod
    def of(cls, model: IntegerModel, tokens: int) -> Constants:
        """Returns the constants of a model for windows of this many tokens."""
        dec = model.decoder(tokens)
        readers = shared_names(dec)
        scales = activation_scales(model)
        tables = {
            n: jnp.asarray(codes.astype(np.float32) * _scale_of(model, readers[n]))
            for n, codes in model.inputs(dec).items()
        }
        ranges = {
            g.prefix + n: bounds
            for g in dec.graphs
            for n, bounds in ranges_of(g, {t.name: t for t in g.named("activation")}).items()
        }
        params = {n: jnp.asarray(x) for n, x in dequantize(model).items()}
        return cls(dec, params, tables, scales, ranges)

    def whole(self, graph: Graph, ids: Int[np.ndarray, " t"]) -> Tensors:
        """Returns the parameters of a graph by local name, stacked where it is that of layers.

        For the embedding it returns only the rows that are read, in their order, and the ids 0, 1,
        ... of these.
        """
        values: Tensors = dict(local(self.params, graph.prefix))
        if graph is self.decoder.embed:
            return {"weight": values["weight"][ids], "ids": jnp.arange(len(ids))}
        return values

    def quant(self, graph: Graph) -> Quant:
        """Returns quantization of a graph's activations, stacked where it is that of layers."""
        scales, ranges = local(self.scales, graph.prefix), local(self.ranges, graph.prefix)
        return {n: (scales[n], *ranges[n]) for n in ranges}

    def layers(self, ids: Int[np.ndarray, " t"]) -> Iterator[tuple[Graph, int, Tensors, Quant]]:
        """Yields each graph and layer, what it reads beside the residual stream, and the
        quantization of its activations."""
        for graph in self.decoder.graphs:
            whole = (self.whole(graph, ids), self.quant(graph))
            for layer in range(graph.layers):
                own, quant = graph.at(whole, layer)
                shared = select_shared(self.decoder, graph, self.tables, layer)
                yield graph, layer, {**own, **shared}, quant


def _scale_of(model: IntegerModel, reader: Reader) -> np.float32:
    """Returns the scale of an input that layers share."""
    graph, name, layer = reader
    return graph.at(model.tensors[graph.prefix + name], layer).scale


class Sums(NamedTuple):
    """Sums over the elements of a tensor, masked scores left out.

    Attributes:
      count: number of elements.
      signal: sum of squares of the float pass.
      noise: sum of squares of simulator less float pass.
      own_signal, own_noise: the same with the op in float on the simulator's inputs in place of the
        float pass.
      ends: number of codes at either end of the range.
      clipped: number of elements whose real value lies more than half a code outside the range.
      lowest, highest: extreme codes.
    """

    count: Any
    signal: Any
    noise: Any
    own_signal: Any
    own_noise: Any
    ends: Any
    clipped: Any
    lowest: Any
    highest: Any

    def merged(self, other: Sums) -> Sums:
        """Returns the sums over the elements of both."""
        added = Sums(*(a + b for a, b in zip(self, other, strict=True)))
        lowest, highest = min(self.lowest, other.lowest), max(self.highest, other.highest)
        return added._replace(lowest=lowest, highest=highest)


class Measured(NamedTuple):
    """Result of one window.

    Attributes:
      sums: by global name.
      errors: e_i of tensors that round, by global name without the layer, stacked over layers.
      float_logits, logits: real values (T, V) of the float pass and of the simulator.
    """

    sums: dict[str, Sums]
    errors: Tensors
    float_logits: jax.Array
    logits: jax.Array


def measure_window(
    constants: Constants, ids: Int[np.ndarray, " t"], tensors: Mapping[str, Any]
) -> Measured:
    """Compares the simulated tensors of one window with float.

    Args:
      ids: the window.
      tensors: codes of every activation, by global name (`Simulator.tensors`).
    """
    sums: dict[str, Sums] = {}
    errors: dict[str, list[jax.Array]] = defaultdict(list)
    x: tuple[Tensors, Tensors] = ({}, {})
    for graph, layer, own, quant in constants.layers(ids):
        codes = {n: jnp.asarray(tensors[graph.global_name(layer, n)]) for n in quant}
        found, error, *last = _read(graph, *x, own, codes, quant)
        x = ({"input.residual": last[0]}, {"input.residual": last[1]})
        each = zip(*(x.tolist() for x in jax.device_get(found)), strict=True)
        for node, values in zip(graph.nodes, each, strict=True):
            sums[graph.global_name(layer, node.output)] = Sums(*values)
        for name, e in error.items():
            errors[graph.prefix + name].append(e)
    stacked = {n: jnp.stack(e) if n.startswith(LAYERS) else e[0] for n, e in errors.items()}
    return Measured(sums, stacked, x[0]["input.residual"], x[1]["input.residual"])


@partial(jax.jit, static_argnums=0)
def _read(
    graph: Graph, x_ref: Tensors, x: Tensors, own: Tensors, codes: Tensors, quant: Quant
) -> tuple[Sums, Tensors, jax.Array, jax.Array]:
    """Compares the tensors of one graph in one layer.

    Args:
      x_ref, x: real values that the graph before gives, by local name: float pass and simulator.
      own: constants, and token ids.
      codes: simulated codes, by local name.

    Returns:
      `Sums` with an entry (N,) for each node; errors of tensors that round in any layer; and the
      graph's output, of the float pass and of the simulator.
    """
    ref = evaluate(graph, {**own, **x_ref})
    env: Tensors = {**own, **x}
    for name, (q, _, _) in quant.items():
        env[name] = (codes[name].astype(jnp.float32) - q.zero_point) * q.scale
    sums, errors = [], {}
    counted = _counted(graph, env)
    for node in graph.nodes:
        name = node.output
        real = eval_op(node.op, *(env[n] for n in node.inputs))
        # 1 / sqrt(0) has no real value to compare with, so the kernel's counts as exact.
        real = jnp.where(jnp.isfinite(real), real, env[name])
        seen = counted.get(name, True)
        sums.append(_sums(ref[name], env[name], real, codes[name], quant[name], seen))
        if any(rounds(graph, node, i) for i in range(graph.layers)):
            errors[name] = env[name] - real
    stacked = Sums(*map(jnp.stack, zip(*sums, strict=True)))
    return stacked, errors, ref[graph.outputs[0]], env[graph.outputs[0]]


def _counted(graph: Graph, env: Tensors) -> Tensors:
    """Returns for scores, before and after the mask, where a token may look. Other scores have no
    effect."""
    return {
        name: env[node.inputs[1]] == 0
        for node in graph.nodes
        if isinstance(node.op, AddMask)
        for name in (node.inputs[0], node.output)
    }


def _sums(
    ref: jax.Array, x: jax.Array, real: jax.Array, codes: jax.Array, quant: Any, counted: Any
) -> Sums:
    q, qmin, qmax = quant
    counted = jnp.broadcast_to(counted, x.shape)
    codes = codes.astype(jnp.float32)

    def total(of: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counted, of.astype(jnp.float32), 0.0))

    unclipped = real / q.scale + q.zero_point
    return Sums(
        count=total(jnp.ones_like(x)),
        signal=total(jnp.square(ref)),
        noise=total(jnp.square(x - ref)),
        own_signal=total(jnp.square(real)),
        own_noise=total(jnp.square(x - real)),
        ends=total((codes <= qmin) | (codes >= qmax)),
        clipped=total((unclipped < qmin - 0.5) | (unclipped > qmax + 0.5)),
        lowest=jnp.min(jnp.where(counted, codes, qmax)),
        highest=jnp.max(jnp.where(counted, codes, qmin)),
    )


def decibels(signal: float, noise: float) -> float | None:
    """Returns 10 log10(signal / noise), None without noise.

    Example:
      >>> decibels(100.0, 1.0)
      20.0
    """
    return 10 * math.log10(max(float(signal), 1e-30) / float(noise)) if noise > 0 else None
