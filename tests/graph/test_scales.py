"""Scale ties: what is tied, fixed, widened or derived, and that gradients pass through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax.fakequant.forward import forward, token_nll
from qnpu_jax.graph.graph import is_identity
from qnpu_jax.graph.ops import Requantize
from qnpu_jax.graph.scales import is_free, resolve

plans = pytest.mark.parametrize("plan", tiny.OFTEN)


def resolved(plan: str):
    dec, _, free = tiny.calibrated("gqa_llama3", plan)
    return dec, free, jax.tree.map(np.asarray, resolve(dec, free))


def nodes(dec, op):
    """Every node of an op: graph, layer, node."""
    for graph in dec.graphs:
        for layer in range(graph.layers):
            yield from ((graph, layer, n) for n in graph.nodes if isinstance(n.op, op))


def at(scales, graph, layer, name) -> tuple[float, float]:
    q = scales[graph.prefix + name]
    pair = (q.scale, q.zero_point)
    return tuple(x[layer] for x in pair) if graph.layered else pair


@plans
def test_every_quantized_tensor_but_biases_is_resolved_in_its_shape(plan):
    dec, _, scales = resolved(plan)
    expected = {}
    for graph in dec.graphs:
        layers = (graph.layers,) if graph.layered else ()
        for t in graph.tensors:
            if not t.name.endswith("bias"):
                channels = () if t.quant.axis is None else (t.shape[t.quant.axis],)
                expected[graph.prefix + t.name] = layers + channels
    assert {n: q.scale.shape for n, q in scales.items()} == expected
    assert all(q.zero_point.shape == q.scale.shape for q in scales.values())
    assert all(np.isfinite(q.scale).all() and (q.scale > 0).all() for q in scales.values())


@plans
def test_free_scales_are_taken_as_they_are(plan):
    dec, free, scales = resolved(plan)
    names = {g.prefix + t.name for g in dec.graphs for t in g.tensors if is_free(g, t.name)}
    assert names == free.keys()
    for graph in dec.graphs:
        producer = {n.output: n for n in graph.nodes}
        for name in (t.name for t in graph.tensors if is_free(graph, t.name)):
            for layer in range(graph.layers):
                node = producer.get(name)
                if node is not None and isinstance(node.op, Requantize):
                    source, target = (tiny.bits_of(graph, n, layer) for n in (node.inputs[0], name))
                    if source <= target and (source < target or is_identity(graph, node, layer)):
                        continue  # this layer's follows from its input, whatever was chosen
                for a, b in zip(
                    at(scales, graph, layer, name), at(free, graph, layer, name), strict=True
                ):
                    np.testing.assert_array_equal(a, b)


@plans
def test_ties_share_values(plan):
    dec, _, scales = resolved(plan)
    shared = 0
    for graph in dec.graphs:
        for name, root in graph.ties.items():
            if name != root:
                for layer in range(graph.layers):
                    assert at(scales, graph, layer, name) == at(scales, graph, layer, root)
                    shared += 1
    assert shared > 50


@plans
def test_widening_fills_the_upper_byte_and_removes_the_zero_point(plan):
    dec, _, scales = resolved(plan)
    widened = moved = 0
    for graph, layer, node in nodes(dec, Requantize):
        source, target = (tiny.bits_of(graph, n, layer) for n in (node.inputs[0], node.output))
        if source < target:
            old, new = (at(scales, graph, layer, n) for n in (node.inputs[0], node.output))
            assert new == (old[0] / np.float32(128), 0)
            widened, moved = widened + 1, moved + (old[1] != 0)
    assert (widened > 0) == (not plan.endswith("i8")), "nothing is wider than 8 bits"
    assert (moved > 0) == (not plan.endswith(("a16", "i8"))), "no zero point to remove at 16 bits"


@plans
def test_an_identity_keeps_scale_and_zero_point(plan):
    dec, _, scales = resolved(plan)
    kept = 0
    for graph, layer, node in nodes(dec, Requantize):
        if is_identity(graph, node, layer):
            old, new = (at(scales, graph, layer, n) for n in (node.inputs[0], node.output))
            assert new == old
            kept += 1
    assert kept > 0


@plans
def test_fixed_outputs_and_masked_scores(plan):
    _, _, scales = resolved(plan)
    eight, narrow = plan not in ("w8a16", "w4a16"), plan.endswith(("s8", "i8"))
    for i in range(2):
        scores, masked, softmax = (
            scales[f"layers.attn.kv{i}.{n}"] for n in ("scores", "masked", "softmax")
        )
        np.testing.assert_array_equal(
            masked.scale, scores.scale + np.float32(10 / (127 if narrow else 32767))
        )
        np.testing.assert_array_equal(masked.zero_point, 0)
        np.testing.assert_array_equal(softmax.scale, np.float32(1 / 256 if narrow else 1 / 32768))
        np.testing.assert_array_equal(softmax.zero_point, -128 if narrow else 0)
    sigmoid = scales["layers.mlp.sigmoid"]
    np.testing.assert_array_equal(sigmoid.scale, np.float32(1 / 256 if eight else 1 / 32768))
    np.testing.assert_array_equal(sigmoid.zero_point, -128 if eight else 0)
    cos = 1 / (127 if plan.endswith("i8") else 32767)
    for name, scale in (("rope.cos", cos), ("mask", 2.0 if narrow else 1 / 16)):
        np.testing.assert_array_equal(scales[f"layers.{name}"].scale, np.float32(scale))


@plans
def test_the_residual_goes_from_graph_to_graph_at_one_scale(plan):
    _, _, scales = resolved(plan)
    for field in ("scale", "zero_point"):
        into, out = (
            getattr(scales[f"layers.{n}"], field) for n in ("input.residual", "mlp.residual")
        )
        np.testing.assert_array_equal(into[0], getattr(scales["embed.residual"], field))
        np.testing.assert_array_equal(into[1:], out[:-1])
        np.testing.assert_array_equal(out[-1], getattr(scales["head.input.residual"], field))


def test_mixed_bits_follow_their_layer():
    _, _, scales = resolved("mixed")
    widened = scales["layers.mlp.silu.i16"]
    silu = scales["layers.mlp.silu"]
    np.testing.assert_array_equal(widened.scale, silu.scale / np.asarray([1, 128], np.float32))
    # Layer 0 stays at 8 bits, where the widening is an identity; layer 1 is widened.
    assert silu.zero_point[0] != 0 and silu.zero_point[1] != 0
    np.testing.assert_array_equal(widened.zero_point, [silu.zero_point[0], 0])
    act = scales["layers.mlp.act"]
    assert act.zero_point[1] == 0 and act.scale[1] < act.scale[0] / 16


@plans
def test_resolve_traces_under_jit(plan):
    dec, free, scales = resolved(plan)
    jitted = jax.jit(lambda free: resolve(dec, free))(free)
    jax.tree.map(np.testing.assert_array_equal, jitted, scales)


@pytest.mark.nightly
def test_the_loss_reaches_every_free_scale():
    dec, params, free = tiny.calibrated("gqa_llama3", "mixed")
    free = jax.tree.map(jnp.asarray, free)
    ids = jnp.asarray(tiny.random_ids((tiny.TOKENS,), 1))

    @jax.jit
    @jax.grad
    def gradient(free):
        return token_nll(forward(dec, params, ids, resolve(dec, free)), ids).sum()

    got = jax.tree.map(np.asarray, gradient(free))
    assert got.keys() == free.keys()
    for name, q in got.items():
        assert np.isfinite(q.scale).all() and np.isfinite(q.zero_point).all(), name
        for i, row in enumerate(q.scale.reshape(2 if name.startswith("layers.") else 1, -1)):
            assert np.abs(row).max() > 0, f"{name}, layer {i}"
