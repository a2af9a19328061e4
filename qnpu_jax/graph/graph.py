"""The decoder as data: tensors, nodes and graphs.

A graph holds no arrays and is hashable, so it is a static argument of `jax.jit`. Tensor names are
the one vocabulary shared by parameters, quantization parameters, the simulator, the .tflite file
and every report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import jax
import numpy as np

from qnpu_jax.config import QuantSpec
from qnpu_jax.graph.ops import (
    Keep,
    Narrowed,
    Op,
    Same,
    constraint,
    tied_inputs,
)

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """A named quantized tensor.

    Attributes:
      name: local to its graph.
      shape: of one layer's value.
      quant: bits of every layer, symmetry and channel axis.
      fixed: scale in every layer of an input that arrives quantized, with a zero point of 0 (RoPE
        tables, eps); None where it is calibrated, tied or derived.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["input", "param", "activation"]
    quant: QuantSpec
    fixed: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TokenIds:
    """The graph input of token ids, int32: the one tensor that is not quantized."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One operation: names in, one name out."""

    op: Op
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order, with the tensors they read and write.

    The layer graph is evaluated once per layer, each time with another set of values: those values
    are stacked, with a leading layer axis. Embed and head graph have one set, without that axis.
    `at` and `stack` hide the difference.

    Attributes:
      prefix: precedes local names in global ones: `embed.`, `layers.` or `head.`.
      tensors: every quantized tensor.
      outputs: local names.
      ids: the input of token ids, of the embed graph only.
    """

    prefix: str
    tensors: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    ids: TokenIds | None = None

    def __post_init__(self) -> None:
        ids = {self.ids.name} if self.ids else set()
        ready = ids | {t.name for t in self.tensors if t.kind != "activation"}
        for node in self.nodes:
            missing = set(node.inputs) - ready
            assert not missing and node.output not in ready, f"{node}: {missing} not ready"
            ready.add(node.output)
        assert ready == self._index.keys() | ids and set(self.outputs) <= ready

    @cached_property
    def _index(self) -> dict[str, TensorSpec]:
        return {t.name: t for t in self.tensors}

    def __hash__(self) -> int:
        return self._hash  # every jitted call asks for it

    @cached_property
    def _hash(self) -> int:
        return hash((self.prefix, self.tensors, self.nodes, self.outputs, self.ids))

    def __getitem__(self, name: str) -> TensorSpec:
        return self._index[name]

    def named(self, kind: str) -> tuple[TensorSpec, ...]:
        """Tensors of one kind (`input`, `param`, `activation`), in order of appearance."""
        return tuple(t for t in self.tensors if t.kind == kind)

    def global_name(self, layer: int, name: str) -> str:
        """`layers.3.attn.q` in the layer graph, `head.logits` elsewhere."""
        return global_name(self.prefix, layer, name)

    @property
    def layered(self) -> bool:
        """True for the layer graph, whose values carry a leading layer axis."""
        return self.prefix == LAYERS

    @cached_property
    def layers(self) -> int:
        """Sets of values that the graph is evaluated with: L for the layer graph, else 1."""
        return max(len(t.quant.bits) for t in self.tensors)

    def at(self, values: T, layer: int) -> T:
        """One layer's values: every array of a pytree without its leading layer axis; the values
        themselves where the graph has no layers.

        Device arrays are sliced in one program: one by one, each is half a millisecond of a GPU's
        time, and there are hundreds.
        """
        if not self.layered:
            return values
        leaves, tree = jax.tree.flatten(values)
        on_device = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
        rows = _rows(on_device, layer) if on_device else {}
        return tree.unflatten(rows[i] if i in rows else x[layer] for i, x in enumerate(leaves))

    def stack(self, rows: Sequence[T]) -> T:
        """One layer's values for each layer, as one pytree of NumPy arrays with a leading layer
        axis: the inverse of `at`."""
        return jax.tree.map(lambda *x: np.stack(x), *rows) if self.layered else rows[0]

    @cached_property
    def ties(self) -> dict[str, str]:
        """Root of every tensor, by local names: tensors of one root share scale and zero point,
        because movement ops copy codes.

        The root is the first member whose value is no copy, so it can be calibrated or derived.
        """
        parent = {t.name: t.name for t in self.tensors}

        def find(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        producer = {n.output: n for n in self.nodes}
        order = {t.name: i for i, t in enumerate(self.tensors)}

        def rank(name: str) -> tuple[bool, bool, int]:
            node = producer.get(name)
            copies = node is not None and (
                isinstance(constraint(node.op), Same) or self._unchanged(node)
            )
            return (copies, self[name].kind == "param", order[name])

        for node in self.nodes:
            # What is multiplied by `keep` copies the codes of one of its inputs, even unchanged.
            tied = tied_inputs(node.op, node.inputs)
            tied = tied or (node.inputs if self._unchanged(node) else ())
            for name in tied:
                a, b = sorted((find(name), find(node.output)), key=rank)
                parent[b] = a
        return {name: find(name) for name in parent}

    def _unchanged(self, node: Node) -> bool:
        return all(is_identity(self, node, i) for i in range(self.layers))

    def __str__(self) -> str:
        return "\n".join(_print(self))


@jax.jit
def _rows(stacks: dict[int, jax.Array], layer: int | jax.Array) -> dict[int, jax.Array]:
    return {i: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for i, x in stacks.items()}


def is_identity(graph: Graph, node: Node, layer: int = 0) -> bool:
    """Tells whether an op changes nothing in this layer: a requantize between equal widths without
    a zero point to remove, or `Keep` of 8-bit probabilities, of which masked keys have 0."""
    if isinstance(node.op, Keep):
        return graph[node.output].quant.bits[layer] == 8
    if not isinstance(constraint(node.op), Narrowed):
        return False
    source, target = graph[node.inputs[0]].quant, graph[node.output].quant
    same_width = source.bits[layer] == target.bits[layer]
    no_shift = source.symmetric or not target.symmetric or target.bits[layer] == 16
    return same_width and no_shift


LAYERS = "layers."
"""Prefix of the layer graph."""


def global_name(prefix: str, layer: int, name: str) -> str:
    """`layers.3.attn.q` for the prefix `layers.`; the prefix and the name for others."""
    return f"{prefix}{layer}.{name}" if prefix == LAYERS else prefix + name


def is_widened(name: str) -> bool:
    """Tells whether a tensor holds another one's codes in more bits, for an op that reads them so.

    >>> is_widened("attn.kv0.masked.i16"), is_widened("attn.kv0.masked")
    (True, False)
    """
    return re.search(r"\.i\d+$", name) is not None


def split_name(name: str) -> tuple[str, int | None]:
    """The name of the stacked tensor, and the layer, of a global name.

    >>> split_name("layers.3.attn.q")
    ('layers.attn.q', 3)
    >>> split_name("head.logits")
    ('head.logits', None)
    """
    parts = name.split(".", 2)
    if parts[0] + "." != LAYERS or not parts[1].isdecimal():
        return name, None
    return LAYERS + parts[2], int(parts[1])


def _print(graph: Graph) -> Iterator[str]:
    """Yields one line per node; the scopes kv1, kv2, .. repeat kv0 and become one line.

    Names are those that a bit plan takes, of all layers: `layers.*.attn.q`.
    """
    rows: list[tuple[str, str, str]] = []
    inputs = [graph.ids] if graph.ids else []
    for t in (*inputs, *graph.named("input")):
        rows.append((_shown(graph, t.name), _type(t), "input"))
    for node in graph.nodes:
        name = _shown(graph, node.output)
        if not re.search(r"\bkv[1-9]\d*\.", node.output):
            rows.append((name, _type(graph[node.output]), _call(graph, node)))
        elif (row := (name.split(".kv")[0] + ".kv1...", "", "as kv0")) not in rows:
            rows.append(row)
    wide = [max(len(r[i]) for r in rows) for i in (0, 1)]
    outputs = ", ".join(_shown(graph, n) for n in graph.outputs)
    yield f"graph {graph.prefix}*  ({len(graph.nodes)} nodes) -> {outputs}"
    for name, kind, call in rows:
        yield f"  {name:<{wide[0]}}  {kind:<{wide[1]}}  {call}"


def _shown(graph: Graph, name: str) -> str:
    return f"{LAYERS}*.{name}" if graph.layered else graph.prefix + name


def _type(t: TensorSpec | TokenIds) -> str:
    shape = ",".join(map(str, t.shape))
    if isinstance(t, TokenIds):
        return f"i32[{shape}]"
    return "|".join(f"i{b}" for b in sorted(set(t.quant.bits))) + f"[{shape}]"


def _call(graph: Graph, node: Node) -> str:
    attrs = [f"{k}={v}" for k, v in vars(node.op).items() if v is not False]
    params = {t.name: t for t in graph.named("param")}
    names = {n: _shown(graph, n) for n in node.inputs}
    args = [f"{names[n]}:{_type(params[n])}" if n in params else names[n] for n in node.inputs]
    verb = re.sub(r"(?<!^)(?=[A-Z])", "_", type(node.op).__name__).lower()
    return f"{verb}({', '.join([*args, *attrs])})"
