"""The decoder as data: tensors, nodes, and a `Builder` that stages a forward function into a
`Graph`.

A graph holds no arrays and is hashable, so it is a static argument of `jax.jit`. Tensor names are
the one vocabulary shared by parameters, quantization parameters, the simulator, the .tflite file
and every report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import jax
import jax.numpy as jnp

from qnpu_jax.config import QuantSpec, UserError
from qnpu_jax.ops import (
    Add,
    AddMask,
    BatchMatmul,
    FullyConnected,
    Logistic,
    Mul,
    Narrowed,
    Op,
    Requantize,
    Rsqrt,
    Same,
    Softmax,
    Sqrt,
    constraint,
    eval_op,
    tied_inputs,
)


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor. `quant` is None for token ids only; `fixed` is the (scale, zero_point) of an
    input that arrives quantized (RoPE tables, mask), None where it is calibrated, tied or
    derived."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["input", "param", "activation"]
    quant: QuantSpec | None
    fixed: tuple[float, int] | None = None


@dataclass(frozen=True)
class Node:
    """One operation: names in, one name out."""

    op: Op
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order. `prefix` is what precedes the names globally (`layers.` for the
    layer graph)."""

    prefix: str
    tensors: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        ready = {t.name for t in self.tensors if t.kind != "activation"}
        for node in self.nodes:
            missing = set(node.inputs) - ready
            assert not missing and node.output not in ready, f"{node}: {missing} not ready"
            ready.add(node.output)
        assert ready == set(self._index) and set(self.outputs) <= ready

    @cached_property
    def _index(self) -> dict[str, TensorSpec]:
        return {t.name: t for t in self.tensors}

    def __hash__(self) -> int:
        return self._hash  # every jitted call asks for it

    @cached_property
    def _hash(self) -> int:
        return hash((self.prefix, self.tensors, self.nodes, self.outputs))

    def __getitem__(self, name: str) -> TensorSpec:
        return self._index[name]

    def named(self, kind: str) -> tuple[TensorSpec, ...]:
        """The tensors of one kind, in order of appearance."""
        return tuple(t for t in self.tensors if t.kind == kind)

    def global_name(self, layer: int, name: str) -> str:
        """`layers.3.attn.q` in the layer graph, `head.logits` elsewhere."""
        return f"{self.prefix}{layer}.{name}" if self.prefix == "layers." else self.prefix + name

    @cached_property
    def layers(self) -> int:
        """How many sets of values the graph is evaluated with."""
        return max(len(t.quant.bits) for t in self.tensors if t.quant is not None)

    @cached_property
    def ties(self) -> dict[str, str]:
        """Root of every tensor: tensors of one root share scale and zero point (movement ops copy
        codes).

        The root is the first member whose value is not itself a copy, so that it can be calibrated
        or derived.
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
            tied = node.inputs if self._unchanged(node) else tied_inputs(node.op, node.inputs)
            for name in tied:
                a, b = sorted((find(name), find(node.output)), key=rank)
                parent[b] = a
        return {name: find(name) for name in parent}

    def _unchanged(self, node: Node) -> bool:
        return all(is_identity(self, node, i) for i in range(self.layers))

    def __str__(self) -> str:
        return "\n".join(_print(self))


_UNIFORM = (FullyConnected, BatchMatmul, Add, AddMask, Mul, Softmax, Logistic, Sqrt, Rsqrt)
"""Ops whose kernels take activations of one type and give the same type (litert.md, section 2)."""


@dataclass
class Builder:
    """Stages a graph: `add` appends a node and returns the spec of its output.

    Args:
      prefix: what precedes the names globally.
      bits: the bits of a tensor by local name, one per layer (`BitPlan` behind it).
    """

    prefix: str
    bits: Callable[[str], tuple[int, ...]]
    _tensors: dict[str, TensorSpec] = field(default_factory=dict)
    _nodes: list[Node] = field(default_factory=list)
    _scopes: list[str] = field(default_factory=list)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        self._scopes.append(name)
        yield
        self._scopes.pop()

    def _named(self, name: str) -> str:
        return ".".join([*self._scopes, name])

    def _register(self, spec: TensorSpec) -> TensorSpec:
        assert spec.name not in self._tensors, spec.name
        self._tensors[spec.name] = spec
        return spec

    def input(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        bits: tuple[int, ...] | None = None,
        fixed: tuple[float, int] | None = None,
    ) -> TensorSpec:
        """A symmetric graph input, at the plan's bits or those given."""
        name = self._named(name)
        quant = QuantSpec(self.bits(name) if bits is None else bits, symmetric=True)
        return self._register(TensorSpec(name, shape, "input", quant, fixed))

    def ids(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """An input of token ids, the only tensor that is not quantized."""
        return self._register(TensorSpec(self._named(name), shape, "input", None))

    def param(
        self,
        name: str,
        shape: tuple[int, ...],
        axis: int | None = None,
        bits: tuple[int, ...] | None = None,
    ) -> TensorSpec:
        """A constant (weight, bias, prefix K/V): symmetric, per channel along `axis`."""
        name = self._named(name)
        quant = QuantSpec(self.bits(name) if bits is None else bits, True, axis)
        return self._register(TensorSpec(name, shape, "param", quant))

    def add(self, name: str, op: Op, *inputs: TensorSpec, symmetric: bool = False) -> TensorSpec:
        """Appends `name = op(inputs)`; operands narrower than the output are widened first
        (exactly).

        Raises:
          UserError: the plan makes the output narrower than an operand, which only a requantize may
          do.
        """
        name = self._named(name)
        tied = tied_inputs(op, tuple(t.name for t in inputs))
        if tied:
            source = self._tensors[tied[0]].quant
            assert source is not None
            quant = QuantSpec(source.bits, source.symmetric)
        else:
            quant = QuantSpec(self.bits(name), symmetric)
        if isinstance(op, _UNIFORM):
            inputs = tuple(self._widen(t, quant.bits, name) for t in inputs)
        if isinstance(op, FullyConnected):
            self._check_bias(inputs[0], inputs[2])
        shapes = (
            jax.ShapeDtypeStruct(t.shape, jnp.int32 if t.quant is None else jnp.float32)
            for t in inputs
        )
        shape = jax.eval_shape(partial(eval_op, op), *shapes).shape
        self._nodes.append(Node(op, tuple(t.name for t in inputs), name))
        return self._register(TensorSpec(name, shape, "activation", quant))

    def fully_connected(
        self, name: str, x: TensorSpec, features: int, *, symmetric: bool = False
    ) -> TensorSpec:
        """A linear layer; stages its parameters `<name>.weight` (features, K) and `<name>.bias`."""
        weight = self.param(f"{name}.weight", (features, x.shape[-1]), axis=0)
        bias = self.param(f"{name}.bias", (features,), axis=0)
        return self.add(name, FullyConnected(), x, weight, bias, symmetric=symmetric)

    def _check_bias(self, x: TensorSpec, bias: TensorSpec) -> None:
        """Raises UserError for a 64-bit bias of an 8-bit input: LiteRT would read it as 32 bits."""
        assert x.quant is not None and bias.quant is not None
        for i, (bits, wide) in enumerate(zip(x.quant.bits, bias.quant.bits, strict=True)):
            if bits <= 8 and wide > 32:
                where = f"layers.{i}." if self.prefix == "layers." else self.prefix
                raise UserError(
                    f"{where}{bias.name}: the plan gives it {wide} bits; expected 32 beside an"
                    f" input of {bits}; correct the rule that matches it"
                )

    def _widen(self, x: TensorSpec, bits: tuple[int, ...], consumer: str) -> TensorSpec:
        assert x.quant is not None
        if x.kind == "param" or x.quant.bits == bits:
            return x
        if any(have > want for have, want in zip(x.quant.bits, bits, strict=True)):
            raise UserError(
                f"{self.prefix}{consumer}: the plan gives it fewer bits than its input"
                f" {self.prefix}{x.name}"
                f" ({max(x.quant.bits)}); expected at least as many; raise the one or lower the"
                " other"
            )
        name = f"{x.name}.i{max(bits)}"
        if name not in self._tensors:
            self._nodes.append(Node(Requantize(), (x.name,), name))
            self._register(
                TensorSpec(name, x.shape, "activation", QuantSpec(bits, x.quant.symmetric))
            )
        return self._tensors[name]

    def finish(self, *outputs: TensorSpec) -> Graph:
        return Graph(
            self.prefix,
            tuple(self._tensors.values()),
            tuple(self._nodes),
            tuple(t.name for t in outputs),
        )


def is_identity(graph: Graph, node: Node, layer: int = 0) -> bool:
    """True where a requantize changes nothing in this layer: equal widths, and no zero point to
    remove."""
    if not isinstance(constraint(node.op), Narrowed):
        return False
    source, target = graph[node.inputs[0]].quant, graph[node.output].quant
    assert source is not None and target is not None
    same_width = source.bits[layer] == target.bits[layer]
    no_shift = source.symmetric or not target.symmetric or target.bits[layer] == 16
    return same_width and no_shift


def _print(graph: Graph) -> Iterator[str]:
    """One line per node; the scopes kv1, kv2, ... repeat kv0 and are folded into one line."""
    rows: list[tuple[str, str, str]] = []
    for t in graph.tensors:
        if t.kind == "input":
            rows.append((t.name, _type(t), "input"))
    for node in graph.nodes:
        if not re.search(r"\bkv[1-9]\d*\.", node.output):
            rows.append((node.output, _type(graph[node.output]), _call(graph, node)))
        elif (row := (node.output.split(".kv")[0] + ".kv1...", "", "as kv0")) not in rows:
            rows.append(row)
    wide = [max(len(r[i]) for r in rows) for i in (0, 1)]
    yield f"graph {graph.prefix}*  ({len(graph.nodes)} nodes) -> {', '.join(graph.outputs)}"
    for name, kind, call in rows:
        yield f"  {name:<{wide[0]}}  {kind:<{wide[1]}}  {call}"


def _type(t: TensorSpec) -> str:
    shape = ",".join(map(str, t.shape))
    if t.quant is None:
        return f"i32[{shape}]"
    return "|".join(f"i{b}" for b in sorted(set(t.quant.bits))) + f"[{shape}]"


def _call(graph: Graph, node: Node) -> str:
    attrs = [f"{k}={v}" for k, v in vars(node.op).items() if v is not False]
    args = [f"{n}:{_type(graph[n])}" if graph[n].kind == "param" else n for n in node.inputs]
    verb = re.sub(r"(?<!^)(?=[A-Z])", "_", type(node.op).__name__).lower()
    return f"{verb}({', '.join([*args, *attrs])})"
