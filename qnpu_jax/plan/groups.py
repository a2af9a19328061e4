"""Groups of tensors that have one width in every plan, and what one group's width asks of others.

A plan lies between two bit plans of one graph, the low and the high one. What both give the same
bits is no choice. Of the others, tensors that movement ops tie have one width, and so has what
reads one shared input in a layer (RoPE tables, mask, eps). A kernel gives no fewer bits than it
takes, unless it is a requantize: where an activation is high, so is what is computed from it, up to
the next requantize.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    Add,
    Decoder,
    Graph,
    Mul,
    Narrowed,
    constraint,
    is_widened,
    local,
    planned_names,
    shared_widths,
    tied_inputs,
)

Kind = Literal["weight", "activation"]
STREAM = "input.residual"
"""What a graph reads of the one before it."""


class Member(NamedTuple):
    """A tensor of a layer: its graph's prefix, its local name, and the layer's number."""

    prefix: str
    name: str
    layer: int


@dataclass(frozen=True)
class Group:
    """Tensors of one width.

    Attributes:
      name: global name of the first of them in the order of the graph.
      members: all of them.
      low, high: bits in the low and in the high plan.
    """

    name: str
    kind: Kind
    members: tuple[Member, ...]
    low: int
    high: int


@dataclass(frozen=True)
class Choices:
    """Groups between two plans.

    Attributes:
      low, high: the decoder at either end, staged alike.
      groups: in the order of the graph.
      above: pairs (i, j) of groups: where i is high, j must be.
    """

    low: Decoder
    high: Decoder
    groups: tuple[Group, ...]
    above: tuple[tuple[int, int], ...]

    @cached_property
    def index(self) -> dict[Member, int]:
        """Number of the group of each tensor that is in one."""
        return {m: i for i, group in enumerate(self.groups) for m in group.members}

    def closed(self, raised: Sequence[bool], more: Iterable[int] = ()) -> list[bool]:
        """Raises more groups, and with all that are raised what must follow them."""
        up, todo = list(raised), [*more, *(i for i, x in enumerate(raised) if x)]
        while todo:
            i = todo.pop()
            up[i] = True
            todo += [j for j in self._followers[i] if not up[j]]
        return up

    @cached_property
    def _followers(self) -> list[list[int]]:
        """Groups that must be high where a group is, by the number of that group."""
        found: list[list[int]] = [[] for _ in self.groups]
        for i, j in self.above:
            found[i].append(j)
        return found

    def plan(self, raised: Sequence[bool]) -> BitPlan:
        """The low plan with the raised groups at their high bits, and biases to match.

        Raises:
          UserError: a group is raised and one that must follow is not.
        """
        for i, j in self.above:
            if raised[i] and not raised[j]:
                high, low = self.groups[i], self.groups[j]
                raise UserError(
                    f"{low.name}: {low.low} bits after {high.name} of {high.high}; expected"
                    f" {low.high}, as no kernel gives fewer bits than it takes; raise it too"
                )
        rules: dict[str, int] = {}
        for graph, name, follows in _decided(self.high):
            for layer, bits in enumerate(graph[name].quant.bits):
                i = self.index.get(Member(graph.prefix, follows, layer))
                if i is not None and raised[i]:
                    rules[graph.global_name(layer, name)] = bits
        asked = planned_names(self.low)
        rules = {n: rules[n] for n in asked if n in rules}
        return self.low.plan.replaced(rules, asked) if rules else self.low.plan


def choices(low: Decoder, high: Decoder) -> Choices:
    """Finds the groups between two plans of one model.

    Args:
      low, high: staged for the same lengths; no tensor has fewer bits in the high one.

    Raises:
      UserError: another model or length, or fewer bits in the high plan.
    """
    if (low.config, low.tokens, low.prefix) != (high.config, high.tokens, high.prefix):
        raise UserError("plan: the two recipes stage another model or length; give them one")
    members = [m for pair in zip(low.graphs, high.graphs, strict=True) for m in _free(*pair)]
    groups = tuple(_group(low, high, mine) for mine in connected(members, tied(low, high)))
    found = Choices(low, high, groups, ())
    pairs = {
        (found.index[a], found.index[b])
        for a, b in follows(low)
        if a in found.index and b in found.index
    }
    above = tuple(sorted((i, j) for i, j in pairs if i != j))
    return Choices(low, high, groups, above)


def connected(
    members: Iterable[Member], pairs: Iterable[tuple[Member, Member]]
) -> list[list[Member]]:
    """Lists the sets of members that pairs connect, each in the order of the members, and so the
    sets. Pairs with others are left out."""
    parent = {m: m for m in members}

    def find(m: Member) -> Member:
        while parent[m] != m:
            parent[m] = parent[parent[m]]
            m = parent[m]
        return m

    for a, b in pairs:
        if a in parent and b in parent:
            parent[find(b)] = find(a)
    found: dict[Member, list[Member]] = {}
    for m in parent:
        found.setdefault(find(m), []).append(m)
    return list(found.values())


def unwidened(graph: Graph, name: str) -> str:
    """The tensor that a widened one was made of; another's own name."""
    if not is_widened(name):
        return name
    return next(n.inputs[0] for n in graph.nodes if n.output == name)


def _graph(dec: Decoder, m: Member) -> Graph:
    return next(g for g in dec.graphs if g.prefix == m.prefix)


def _global(dec: Decoder, m: Member) -> str:
    return _graph(dec, m).global_name(m.layer, m.name)


def _free(low: Graph, high: Graph) -> Iterator[Member]:
    """Weights and activations whose bits differ, in the order of the graph."""
    known = {t.name for t in high.tensors}
    for layer in range(low.layers):
        for t in low.tensors:
            chosen = t.kind == "activation" or t.name.endswith("weight") or t.name == STREAM
            if not chosen or t.name not in known or is_widened(t.name):
                continue
            a, b = t.quant.bits[layer], high[t.name].quant.bits[layer]
            if a > b:
                raise UserError(
                    f"{low.global_name(layer, t.name)}: {a} bits in the low plan and {b} in the"
                    " high one; expected no fewer; exchange the two or choose others"
                )
            if a < b:
                yield Member(low.prefix, t.name, layer)


def _group(low: Decoder, high: Decoder, members: list[Member]) -> Group:
    root = members[0]
    kind: Kind = "weight" if root.name.endswith("weight") else "activation"
    before = {_graph(low, m)[m.name].quant.bits[m.layer] for m in members}
    after = {_graph(high, m)[m.name].quant.bits[m.layer] for m in members}
    assert len(before) == len(after) == 1, f"{members}: {before}, {after}"
    return Group(_global(low, root), kind, tuple(members), before.pop(), after.pop())


def tied(low: Decoder, high: Decoder) -> Iterator[tuple[Member, Member]]:
    """Pairs of tensors of one width."""
    for dec in (low, high):
        for graph in dec.graphs:
            for layer in range(graph.layers):
                for node in graph.nodes:
                    for source in tied_inputs(node.op, node.inputs):
                        yield (
                            Member(graph.prefix, source, layer),
                            Member(graph.prefix, node.output, layer),
                        )
    layers = low.layer.layers
    streams = [(low.layer.prefix, STREAM, i) for i in range(layers)] + [
        (low.head.prefix, STREAM, 0)
    ]
    made = [(low.embed.prefix, "residual", 0)]
    made += [(low.layer.prefix, low.layer.outputs[0], i) for i in range(layers)]
    for a, b in zip(made, streams, strict=True):  # what a graph makes, the next one reads
        yield Member(*a), Member(*b)
    for dec in (low, high):
        yield from _sharing(dec)
        yield from _beside_constants(dec)


def _sharing(dec: Decoder) -> Iterator[tuple[Member, Member]]:
    """Pairs of tensors of a layer, or of the head, that a shared input ties: the one whose bits it
    has, and what its kernels read beside it and give."""
    for graph in dec.graphs:
        for shared, like in local(shared_widths(dec.config), graph.prefix).items():
            names = {like}
            for node in graph.nodes:
                if shared in node.inputs:
                    names |= {node.output, *node.inputs} - {shared}
            for name in sorted(unwidened(graph, n) for n in names):
                for i in range(graph.layers):
                    yield Member(graph.prefix, like, i), Member(graph.prefix, name, i)


def _beside_constants(dec: Decoder) -> Iterator[tuple[Member, Member]]:
    """Pairs of an operand and the result of an op with a constant that has the operand's bits, and
    must have the result's."""
    planned = set(planned_names(dec))
    for graph in dec.graphs:
        for node in graph.nodes:
            if not isinstance(node.op, Add | Mul):
                continue
            constants = [x for x in node.inputs if graph[x].kind == "param"]
            if constants and graph.global_name(0, constants[0]) not in planned:
                for x in set(node.inputs) - set(constants):
                    for i in range(graph.layers):
                        yield Member(graph.prefix, x, i), Member(graph.prefix, node.output, i)


def follows(dec: Decoder) -> Iterator[tuple[Member, Member]]:
    """Pairs of an activation and what a kernel that is no requantize makes of it."""
    for graph in dec.graphs:
        shared = {t.name for t in graph.named("input")} - {STREAM}
        for layer in range(graph.layers):
            for node in graph.nodes:
                if isinstance(constraint(node.op), Narrowed):
                    continue
                out = Member(graph.prefix, node.output, layer)
                for x in node.inputs:
                    if x not in shared and not x.endswith("weight"):
                        yield Member(graph.prefix, unwidened(graph, x), layer), out


def _decided(dec: Decoder) -> Iterator[tuple[Graph, str, str]]:
    """Tensors with the one of theirs that a group has: itself, or, of a constant, what the op with
    it makes."""
    for graph in dec.graphs:
        for node in graph.nodes:
            yield graph, node.output, node.output
            for x in node.inputs:
                if x == STREAM:
                    yield graph, x, x
                known = graph.ids is None or x != graph.ids.name
                if known and graph[x].kind == "param":
                    yield graph, x, x if x.endswith("weight") else node.output
