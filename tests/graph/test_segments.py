"""Parts of a graph, run one after the other, are the graph: every tensor once, to the same bits."""

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import pytest

from qnpu_jax.calibrate.gptq import linears_by_input
from qnpu_jax.fakequant.forward import shared_inputs
from qnpu_jax.fakequant.passes import graph_tensors
from qnpu_jax.graph.layered import local, ranges_of
from qnpu_jax.graph.scales import resolve
from qnpu_jax.graph.segments import STREAM, segments
from qnpu_jax.graph.shared_names import select_shared


@pytest.mark.parametrize("plan", ["w8a8", "mixed"])
def test_parts_compute_what_the_graph_does(plan):
    dec, params, free = learnable.made(plan)
    graph = dec.layer
    inputs = tuple(group.input for group in linears_by_input(graph, lambda _: True))
    assert len(inputs) == 4
    q = local(resolve(dec, free), "layers.")
    own, quant = graph.at((local(params, "layers."), (q, ranges_of(graph, q))), 1)
    given = jax.tree.map(jnp.asarray, {**own, **select_shared(dec, graph, shared_inputs(dec), 1)})
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, *graph[STREAM].shape)).astype(np.float32))
    out = graph.outputs[:1]
    names = (*inputs, *out)
    whole = graph_tensors(graph, names, {STREAM: x}, given, quant)
    parts = segments(graph, inputs, out)
    assert [n for part in parts for n in part.nodes] == [*graph.nodes]
    values = {STREAM: x}
    for part, name in zip(parts, (*inputs, *out), strict=True):
        names = {t.name for t in part.tensors}
        params_of = {n: v for n, v in given.items() if n in names}
        values = graph_tensors(part, part.outputs, values, params_of, quant)
        assert name in values
        assert not values.keys() & given.keys(), "tables are not carried along"
        np.testing.assert_array_equal(values[name], whole[name], err_msg=name)
    assert parts[-1].outputs == out


def test_what_later_parts_do_not_read_is_let_go():
    dec, _, _ = learnable.made()
    inputs = tuple(group.input for group in linears_by_input(dec.layer, lambda _: True))
    first, *_, last = segments(dec.layer, inputs, dec.layer.outputs[:1])
    assert set(first.outputs) == {STREAM, inputs[0]}
    assert {t.name for t in last.named("input")} == {inputs[-1], "attn.residual"}


def test_a_graph_without_cuts_is_one_part():
    dec, _, _ = learnable.made()
    for graph in dec.graphs:
        (only,) = segments(graph, (), graph.outputs)
        assert (only.nodes, only.ids) == (graph.nodes, graph.ids)
        assert set(only.outputs) == set(graph.outputs)
