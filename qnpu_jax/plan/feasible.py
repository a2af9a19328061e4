"""Widths that a target has kernels for: what it lacks of a plan, and two plans between which it
lacks nothing.

A kernel runs at the width of what it gives: operands that are narrower are widened before it. A
group whose high bits a target lacks keeps its low ones, and the other way round; so does all that
must follow it. What the target lacks in either plan is refused. Where a norm is one op and its
product is not there, as on Hexagon v68, rows and norm keep their low bits if both are a choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph import (
    BatchMatmul,
    Concat,
    Decoder,
    Embedding,
    FullyConnected,
    Graph,
    Node,
    Reshape,
    Slice,
    Softmax,
    Transpose,
    decoder,
)
from qnpu_jax.plan.groups import Choices, Member, choices, unwidened
from qnpu_jax.plan.targets import Kernel, Target
from qnpu_jax.recipes import RECIPES, Recipe

_WORDS: Mapping[Kernel, str] = {
    "embedding": "embedding tables",
    "linear": "linears",
    "product": "products of two activations",
    "norm": "RMS norms",
    "softmax": "softmax",
    "elementwise": "elementwise ops",
}


class Lack(NamedTuple):
    """A tensor of a width that a target has no kernel for.

    Attributes:
      member: the tensor: what a kernel gives, or a linear's weights.
      bits: its bits.
      kernels: what the target would need, in words.
      has: bits that the target has it for.
    """

    member: Member
    bits: int
    kernels: str
    has: frozenset[int]


def lacks(its: Target, dec: Decoder) -> Iterator[Lack]:
    """Finds the tensors of a decoder that a target has no kernel for, in the order of the graph."""
    for graph in dec.graphs:
        for node in graph.nodes:
            # What is widened is read by one kernel, which is judged itself.
            if _copies(node) or unwidened(graph, node.output) != node.output:
                continue
            kind = _kernel(graph, node)
            for layer in range(graph.layers):
                if kind == "norm":
                    yield from _norm(its, graph, node, layer)
                    continue
                yield from _lack(graph, node.output, layer, _WORDS[kind], its.of(kind))
                if kind == "linear":
                    yield from _lack(
                        graph, node.inputs[1], layer, "weights of linears", its.weights
                    )


def _lack(graph: Graph, name: str, layer: int, kernels: str, has: frozenset[int]) -> Iterator[Lack]:
    bits = graph[name].quant.bits[layer]
    if bits not in has:
        yield Lack(Member(graph.prefix, name, layer), bits, kernels, has)


def _copies(node: Node) -> bool:
    return isinstance(node.op, Reshape | Transpose | Slice | Concat)


def _kernel(graph: Graph, node: Node) -> Kernel:
    match node.op:
        case Embedding():
            return "embedding"
        case FullyConnected():
            return "linear"
        case BatchMatmul():
            return "norm" if _squares_of_a_norm(graph, node) else "product"
        case Softmax():
            return "softmax"
        case _:
            return "elementwise"


def _squares_of_a_norm(graph: Graph, node: Node) -> bool:
    """Whether a product sums the squares of a norm that an NPU may have as one op: one that has no
    gamma of its own (`tflite.named_forms.NormsTogether`)."""
    scope = re.match(r"(?:.*\.)?norm\.", node.output)
    if scope is None:
        return False
    inside = [n for n in graph.nodes if n.output.startswith(scope[0])]
    return not any(graph[x].kind == "param" for n in inside for x in n.inputs)


def _norm(its: Target, graph: Graph, node: Node, layer: int) -> Iterator[Lack]:
    """Finds what a target lacks of a norm: as one op its input has its width; else it is a product
    too."""
    rows = unwidened(graph, node.inputs[0])
    own, bits = (graph[x].quant.bits[layer] for x in (rows, node.output))
    if bits in its.of("product"):
        return
    if own == bits or bits not in its.of("norm"):
        yield from _lack(graph, node.output, layer, _WORDS["norm"], its.of("norm"))
    else:
        member = Member(graph.prefix, rows, layer)
        yield Lack(member, own, "RMS norms with an input", frozenset({bits}))


def narrowed(its: Target, found: Choices, names: tuple[str, str]) -> tuple[BitPlan, BitPlan]:
    """Moves the ends of a choice to where a target has kernels for all that lies between.

    Args:
      names: of the low and of the high plan, for messages.

    Returns:
      The low and the high plan; the same where the target has kernels for both.

    Raises:
      UserError: neither width of a tensor, or no combination, is one that the target has.
    """
    low, high = (
        {_decides(found, dec, x.member): x for x in reversed([*lacks(its, dec)])}
        for dec in (found.low, found.high)
    )
    up = _closed({i for i in low if i is not None}, found.above)
    lower = {i for i in high if i is not None} | {*_split_norms(its, found)}
    down = _closed(lower, [(j, i) for i, j in found.above])
    beyond = low.get(None) or high.get(None)
    if beyond is None and up & down:
        beyond = next(x for i, x in low.items() if i in up)
    if beyond is not None:
        raise UserError(_refusal(its, found, beyond, names))
    every = range(len(found.groups))
    ends = ([i in up for i in every], [i not in down for i in every])
    plans = (found.low.plan, found.high.plan)
    return (
        found.plan(ends[0]) if up else plans[0],
        found.plan(ends[1]) if down else plans[1],
    )


def _split_norms(its: Target, found: Choices) -> Iterator[int]:
    """Groups of squares of norms that could have more bits than their rows, which only a product
    takes. They stay low, and with them the rows, whose high bits they must follow."""
    for graph in found.high.graphs:
        for node in graph.nodes:
            if _copies(node) or _kernel(graph, node) != "norm":
                continue
            for layer in range(graph.layers):
                names = (node.output, unwidened(graph, node.inputs[0]))
                i, rows = (found.index.get(Member(graph.prefix, n, layer)) for n in names)
                if i is None or rows is None or i == rows:
                    continue
                if found.groups[i].high not in its.of("product"):
                    yield i


def _decides(found: Choices, dec: Decoder, m: Member) -> int | None:
    """The group whose width gives a tensor its own; None where both plans give it the same. What
    stands in one of the plans alone (`kept`, after a softmax of 16 bits) goes by what it reads."""
    graph = next(g for g in dec.graphs if g.prefix == m.prefix)
    both = [{t.name for t in g.tensors} for d in (found.low, found.high) for g in d.graphs
            if g.prefix == m.prefix]  # fmt: skip
    while m not in found.index and not all(m.name in names for names in both):
        node = next(n for n in graph.nodes if n.output == m.name)
        m = m._replace(name=node.inputs[0])
    return found.index.get(m)


def _closed(some: set[int], pairs: Iterable[tuple[int, int]]) -> set[int]:
    """Adds j of every pair (i, j) whose i is in, until none is left."""
    closed, pairs = set(some), [*pairs]
    while more := {j for i, j in pairs if i in closed} - closed:
        closed |= more
    return closed


def _refusal(its: Target, found: Choices, lack: Lack, names: tuple[str, str]) -> str:
    m = lack.member
    graph = next(g for g in found.low.graphs if g.prefix == m.prefix)
    other = next(g for g in found.high.graphs if g.prefix == m.prefix)
    bits = [g[m.name].quant.bits[m.layer] for g in (graph, other)]
    has = " or ".join(map(str, sorted(lack.has)))
    return (
        f"{graph.global_name(m.layer, m.name)}: {bits[0]} bits in {names[0]} and {bits[1]} in"
        f" {names[1]}; {its.name} has {lack.kernels} of {has} bits only"
    )


def fits(its: Target, dec: Decoder) -> bool:
    """Whether a target has kernels for all of a decoder."""
    return next(lacks(its, dec), None) is None


def recipes(its: Target, config: ModelConfig, low: Recipe, high: Recipe) -> tuple[Recipe, Recipe]:
    """Narrows two recipes to what a target has kernels for (`narrowed`).

    Returns:
      The recipes; one whose bits change is named after the target too.

    Raises:
      UserError: they give every tensor the same bits, or as `narrowed`.
    """
    found = choices(*(decoder(config, r.bits, 1) for r in (low, high)))
    if not found.groups:
        raise UserError(
            f"plan: {low.name} and {high.name} give every tensor the same bits; expected two that"
            " differ; choose another --low or --high"
        )
    try:
        plans = narrowed(its, found, (low.name, high.name))
    except UserError as error:
        ours = {n: r.bits for n, r in RECIPES.items() if "-" not in n}
        whole = [n for n, bits in ours.items() if fits(its, decoder(config, bits, 1))]
        raise UserError(f"{error}; choose --low and --high of {whole}") from None
    first, second = (
        r if bits == r.bits else replace(r, name=f"{r.name} on {its.name}", bits=bits)
        for r, bits in zip((low, high), plans, strict=True)
    )
    return first, second
