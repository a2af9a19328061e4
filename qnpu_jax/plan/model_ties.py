"""Ties of a model: which widths of its tensors ask for which others, for `BitPlan.set`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.graph import (
    Add,
    Decoder,
    FullyConnected,
    Mul,
    decoder,
    local,
    planned_names,
    shared_widths,
    with_additions,
)
from qnpu_jax.integer import allowed_bits
from qnpu_jax.plan.groups import Member, connected, follows, tied
from qnpu_jax.width_ties import Ties

_ENDS = tuple(
    BitPlan((("*.weight", 8), ("*.bias", bias), ("*", bits))) for bits, bias in ((8, 32), (16, 64))
)
"""One width everywhere: with 16 bits there are tensors that 8 do without."""


def ties(config: ModelConfig, prefix: int = 1) -> Ties:
    """Finds the ties of a model.

    Args:
      config: its shape (`Checkpoint.config`, `IntegerModel.config`).
      prefix: constant positions; 0 lets the KV cache of a model without them have 16 bits.

    Returns:
      What `BitPlan.set` takes.

    Raises:
      UserError: more constant positions than the model has.

    Example:
      >>> from qnpu_jax import RECIPES
      >>> shape = ModelConfig(
      ...     family="llama", vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=2,
      ...     num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128)
      >>> plan = RECIPES["w4a8"].bits.set("layers.1.mlp.act", 16, ties(shape), follow=True)
      >>> plan.rules[:3]
      (('layers.1.mlp.act', 16), ('layers.1.mlp.down', 16), ('layers.1.mlp.down.bias', 64))
    """
    low, high = (decoder(with_additions(config), plan, 1, prefix) for plan in _ENDS)
    names = dict.fromkeys(planned_names(low))
    called: dict[Member, str] = {}
    widths: dict[Member, set[int]] = {}
    for dec in (low, high):
        for graph in dec.graphs:
            for t in graph.tensors:
                for layer in range(graph.layers):
                    m = Member(graph.prefix, t.name, layer)
                    called[m] = graph.global_name(layer, t.name)
                    widths[m] = set(allowed_bits(graph.prefix, t))
    sets = connected(called, [*tied(low, high), *_beside(low), *_beside(high)])
    same, copies, allowed = [], {}, {}
    for members in sets:
        planned = [called[m] for m in members if called[m] in names]
        bits = tuple(sorted(set.intersection(*(widths[m] for m in members))))
        allowed |= dict.fromkeys(planned, bits)
        copies |= _sources(members, called, names)
        if len(planned) > 1:
            same.append(tuple(planned))
    biases = dict(_biases(low))
    pairs = (pair for dec in (low, high) for pair in follows(dec))
    named = ([copies.get(called[m], called[m]) for m in p] for p in pairs if p[0] in called)
    above = dict.fromkeys((a, b) for a, b in named if a != b and a not in biases)
    constant = {n: _bits(high, m) for m, n in called.items() if n not in names and n not in copies}
    return Ties(tuple(names), copies, tuple(same), tuple(above), allowed, biases, constant)


def _bits(dec: Decoder, m: Member) -> int:
    graph = next(g for g in dec.graphs if g.prefix == m.prefix)
    return graph[m.name].quant.bits[m.layer]


def _sources(
    members: Sequence[Member], called: dict[Member, str], names: dict[str, None]
) -> dict[str, str]:
    """The tensor that a plan decides for each that copies: the last one before it in its layer, or
    the first of all."""
    found, last = {}, {}
    first = next((called[m] for m in members if called[m] in names), None)
    for m in members:
        if called[m] in names:
            last[m.prefix, m.layer] = called[m]
        elif first is not None:
            found[called[m]] = last.get((m.prefix, m.layer), first)
    return found


def _beside(dec: Decoder) -> Iterator[tuple[Member, Member]]:
    """Pairs of a constant, or an input that layers share, and the tensor whose bits it has."""
    for graph in dec.graphs:
        for name, like in local(shared_widths(dec.config), graph.prefix).items():
            for i in range(graph.layers):
                yield Member(graph.prefix, name, i), Member(graph.prefix, like, i)
    for graph in dec.graphs:
        for node in graph.nodes:
            if isinstance(node.op, Add | Mul):
                for x in node.inputs:
                    if graph[x].kind == "param":
                        for i in range(graph.layers):
                            yield Member(graph.prefix, x, i), Member(graph.prefix, node.output, i)


def _biases(dec: Decoder) -> Iterator[tuple[str, str]]:
    """Pairs of a linear's bias and its output."""
    for graph in dec.graphs:
        for node in graph.nodes:
            if isinstance(node.op, FullyConnected):
                for i in range(graph.layers):
                    yield graph.global_name(i, node.inputs[2]), graph.global_name(i, node.output)
