"""Many layers in one compiled program, for a GPU, which runs a layer faster than the host can
launch one.

Consecutive layers of the same bits become steps of one `scan`. Their arrays are
stacked along a new layer axis. Scalars and vectors of one dtype are first joined into one array,
because every array that a step reads costs a GPU the same time, however small it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qnpu_jax.graph import Graph
from qnpu_sim.run_graph import run_graph, same_bits, sequence_input


class _Place(NamedTuple):
    """Where a leaf of one layer's tree lies: name of its array, first element, and shape."""

    array: str
    start: int
    shape: tuple[int, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("layer", "layers", "tree", "places"),
)
@dataclass(frozen=True)
class Stack:
    """Consecutive layers that one compiled program computes.

    Attributes:
      arrays: (layers, ...) by name: scalars and vectors joined by dtype, and each matrix.
      layer: the first layer of the graph with their bits.
      layers: number of layers.
      tree, places: structure of one layer's pytree, and where its leaves lie in `arrays`.
    """

    arrays: dict[str, Any]
    layer: int
    layers: int
    tree: Any
    places: tuple[_Place, ...]

    def key(self, graph: Graph) -> Any:
        """Stacks with the same key run the same compiled program."""
        shapes = ((name, x.shape, x.dtype) for name, x in sorted(self.arrays.items()))
        return graph, self.layer, self.layers, self.tree, self.places, tuple(shapes)


def stacks(graph: Graph, layers: Sequence[Any]) -> list[Stack]:
    """Stacks the layers of a graph: one stack for each run of consecutive layers that share a
    program, or one for each layer where that makes fewer programs to compile.

    Args:
      layers: a pytree of arrays per layer, its codes and constants.
    """

    def program(layer: int) -> Any:
        leaves, tree = jax.tree.flatten(layers[layer])
        return same_bits(graph, layer), tree, [(x.shape, x.dtype) for x in leaves]

    runs = [list(group) for _, group in groupby(range(len(layers)), program)]
    single = {same_bits(graph, layer) for layer in range(len(layers))}
    if len({(same_bits(graph, run[0]), len(run)) for run in runs}) > len(single):
        runs = [[layer] for layer in range(len(layers))]
    return [_stack(same_bits(graph, run[0]), [layers[i] for i in run]) for run in runs]


def _stack(layer: int, trees: list[Any]) -> Stack:
    flat = [jax.tree.flatten(t) for t in trees]
    parts: dict[str, list[Array]] = {}
    places, ends = [], {}
    for i, column in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        leaf = jnp.stack(column)
        shape = leaf.shape[1:]
        matrix = len(shape) > 1
        name = f"matrix {i}" if matrix else leaf.dtype.name
        start = ends.get(name, 0)
        ends[name] = start + int(np.prod(shape))
        places.append(_Place(name, start, shape))
        parts.setdefault(name, []).append(leaf if matrix else leaf.reshape(len(trees), -1))
    arrays = {name: jnp.concatenate(own, 1) if own[1:] else own[0] for name, own in parts.items()}
    return Stack(arrays, layer, len(trees), flat[0][1], tuple(places))


def _unstack(stack: Stack, arrays: dict[str, Array]) -> Any:
    """Rebuilds the pytree of one layer from its slice of the arrays."""

    def leaf(place: _Place) -> Array:
        if len(place.shape) > 1:
            return arrays[place.array]
        end = place.start + int(np.prod(place.shape))
        return arrays[place.array][place.start : end].reshape(place.shape)

    return jax.tree.unflatten(stack.tree, [leaf(p) for p in stack.places])


def run_stack(graph: Graph, stack: Stack, x: Array) -> Array:
    """Runs the layers of a stack one after the other.

    Args:
      stack: of the layers' (codes, constants).
      x: the sequence input of the first: token ids or codes of the residual stream, with or without
        a batch axis.

    Returns:
      Codes of the last layer's output, with the batch axis of `x`.
    """
    name, shape = sequence_input(graph)
    output = graph.outputs[0]

    def step(x: Array, arrays: dict[str, Array]) -> tuple[Array, None]:
        codes, constants = _unstack(stack, arrays)

        def one(x: Array) -> Array:
            env = run_graph(graph, stack.layer, {**codes, name: x}, constants, (output,))
            return env[output]

        return one(x) if x.ndim == len(shape) else jax.vmap(one)(x), None

    if stack.layers == 1:  # `scan` needs input and output of one type; embed and head have two
        return step(x, {n: a[0] for n, a in stack.arrays.items()})[0]
    return jax.lax.scan(step, x, stack.arrays)[0]
