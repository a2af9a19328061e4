"""Parts of a graph that are run one after the other, with something done in between."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from qnpu_jax.graph.graph import Graph

STREAM = "input.residual"
"""The input of the layer and the head graph that differs from text to text."""


@lru_cache(maxsize=64)
def segments(graph: Graph, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> tuple[Graph, ...]:
    """Cuts a graph behind each of some tensors, and at its end: run one after the other, the parts
    compute every tensor once, and each starts from what those before it left.

    Args:
      inputs: local names, in execution order.
      outputs: local names of what is wanted in the end.

    Returns:
      One graph more than there are names. Its outputs are the tensors that later parts read and
      that no table gives (STREAM, and what nodes made); of the last one `outputs`.
    """
    made = {node.output: i for i, node in enumerate(graph.nodes, start=1)}
    cuts = [0, *(made.get(name, 0) for name in inputs), len(graph.nodes)]
    return tuple(_part(graph, first, end, outputs) for first, end in pairwise(cuts))


def _part(graph: Graph, first: int, end: int, wanted: tuple[str, ...]) -> Graph:
    """The nodes from `first` up to `end`; what earlier ones made and later ones read passes."""
    nodes = graph.nodes[first:end]
    made = [node.output for node in nodes]
    before = {STREAM} | {node.output for node in graph.nodes[:first]}
    later = {name for node in graph.nodes[end:] for name in node.inputs} | {*wanted}
    read = {name for node in nodes for name in node.inputs} | (before & later)
    tensors = tuple(
        replace(t, kind="input") if t.name in before else t
        for t in graph.tensors
        if t.name in read or t.name in made
    )
    outputs = tuple(t.name for t in tensors if t.name in later and t.name in before | {*made})
    ids = graph.ids if graph.ids and graph.ids.name in read else None
    return Graph(graph.prefix, tensors, nodes, outputs, ids)
