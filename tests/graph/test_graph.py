"""The graph as data: what it prints, what the builder inserts, ties, and what it refuses."""

import dataclasses
import functools

import jax
import pytest
import tiny

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph.builder import Builder
from qnpu_jax.graph.decoder import decoder, planned_names
from qnpu_jax.graph.graph import Graph, Node, is_identity
from qnpu_jax.graph.ops import Add, Concat, FullyConnected, Mul, Requantize, Reshape, Softmax
from qnpu_jax.graph.shared_names import select_shared, shared_names
from qnpu_jax.recipes import RECIPES

W8A8 = RECIPES["w8a8"].bits
CONFIG = dataclasses.replace(tiny.SMOLLM2, num_layers=2)


def builder(bits: dict[str, tuple[int, ...]]) -> Builder:
    return Builder("layers.", lambda name: bits[name])


def test_printed_graphs_are_the_golden_ones():
    """After an intended change of the graph: cd tests && PYTHONPATH=.. python -c 'import tiny;
    print(tiny.printed_graphs(), end="")' > golden/layer_w8a8.txt; then read the diff."""
    golden = (tiny.GOLDEN / "layer_w8a8.txt").read_text()
    assert tiny.printed_graphs() == golden, "see this test's docstring if the change is intended"


def test_equal_decoders_are_one_static_argument_of_jit():
    make = functools.partial(decoder.__wrapped__, CONFIG, W8A8, 16, 2)
    a, b = make(), make()
    assert a is not b and a == b and hash(a) == hash(b)
    assert {a.layer: 1}[b.layer] == 1 and hash(a.layer) != hash(a.head)
    traced = []
    f = jax.jit(lambda graph: traced.append(graph) or len(graph.nodes), static_argnums=0)
    assert f(a.layer) == f(b.layer) == len(a.layer.nodes)
    assert len(traced) == 1
    other = dataclasses.replace(a.layer, outputs=a.layer.outputs[:1])
    assert other != a.layer


# What the builder inserts and refuses.


def test_ops_that_are_wide_in_other_layers_have_wide_operands_of_their_own():
    bits = {"q": (16, 8), "k": (8, 16), "v": (16, 8)}
    g = builder(bits)
    x = g.input("x", (4, 3), bits=(8, 8))
    outputs = [g.add(name, Mul(), x, x) for name in bits]
    graph = g.finish(*outputs)
    reads = {n.output: n.inputs[0] for n in graph.nodes if isinstance(n.op, Mul)}
    assert reads == {"q": "x.i16", "k": "x.k.i16", "v": "x.i16"}
    assert graph["x.i16"].quant.bits == (16, 8) and graph["x.k.i16"].quant.bits == (8, 16)


def test_operands_are_widened_once_and_keep_their_symmetry():
    bits = {"x": (8, 8), "z": (8, 8), "y": (8, 16), "sum": (8, 16), "product": (8, 16)}
    g = builder(bits)
    x = g.input("x", (4, 3))
    z = g.add("z", Mul(), g.input("y", (4, 3), bits=(8, 8)), x)
    total = g.add("sum", Add(), x, z)
    g.add("product", Mul(), z, total)
    graph = g.finish(total)
    assert [n.output for n in graph.nodes] == ["z", "x.i16", "z.i16", "sum", "product"]
    assert graph.nodes[3].inputs == ("x.i16", "z.i16") and graph.nodes[4].inputs[0] == "z.i16"
    for name, symmetric in (("x.i16", True), ("z.i16", False)):
        quant = graph[name].quant
        assert quant.bits == (8, 16) and quant.symmetric == symmetric


def test_equal_widths_and_parameters_are_not_widened():
    g = builder({"x": (16,), "y": (16,), "y.weight": (4,), "y.bias": (64,)})
    y = g.fully_connected("y", g.input("x", (4, 3)), 5)
    assert y.shape == (4, 5)
    assert g.finish(y).nodes == (Node(FullyConnected(), ("x", "y.weight", "y.bias"), "y"),)


def test_movement_takes_its_inputs_bits_whatever_the_plan_says():
    g = builder({"x": (16,)})
    y = g.add("y", Reshape((12,)), g.input("x", (4, 3)))
    assert y.shape == (12,) and y.quant.bits == (16,) and y.quant.symmetric


def test_an_output_narrower_than_its_input_is_refused_with_both_names():
    g = builder({"x": (8, 16), "y": (8, 8)})
    x = g.input("x", (4, 3))
    expected = r"layers\.1\.y: the plan gives it fewer bits than its input layers\.1\.x \(16\);"
    with pytest.raises(UserError, match=expected):
        g.add("y", Softmax(), x)
    assert g.add("y", Requantize(), x).quant is not None  # the one op that may narrow


def test_a_plan_that_narrows_inside_the_decoder_names_the_layers_tensor():
    plan = BitPlan((("layers.1.mlp.act", 16), *W8A8.rules))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down: .* layers\.1\.mlp\.act \(16\)"):
        decoder(CONFIG, plan, 16)


@pytest.mark.parametrize("name", ["layers.1.mlp.down.bias", "head.bias"])
def test_a_64_bit_bias_of_an_8_bit_input_is_refused(name):
    """LiteRT reads it as 32 bits: 2,194 of 2,304 logits were wrong."""
    plan = BitPlan(((name, 64), *W8A8.rules))
    with pytest.raises(UserError, match=rf"{name}: the plan gives it 64 bits; expected 32 beside"):
        decoder(CONFIG, plan, 16)
    sixteen = (("head.input", 16), ("head.logits", 16), ("layers.1.mlp.act", 16))
    decoder(CONFIG, BitPlan((*sixteen, ("layers.1.mlp.down", 16), *plan.rules)), 16)


def test_a_rule_that_matches_nothing_is_refused():
    plan = BitPlan((("layers.7.mlp.gate", 16), *W8A8.rules))
    with pytest.raises(UserError, match=r"rule 'layers\.7\.mlp\.gate': 16: matches no tensor"):
        decoder(CONFIG, plan, 16)
    shadowed = BitPlan((*W8A8.rules, ("layers.*", 16)))
    with pytest.raises(UserError, match=r"rule 'layers\.\*': 16: matches no tensor"):
        decoder(CONFIG, shadowed, 16)


def test_a_tensor_without_a_rule_is_refused():
    with pytest.raises(UserError, match=r"^embed\.residual: no rule of the bit plan matches"):
        decoder(CONFIG, BitPlan((("*.weight", 8), ("*.bias", 32))), 16)


@pytest.mark.parametrize(("prefix", "cache", "tokens"), [(2, 0, 127), (0, 100, 29), (0, 0, 129)])
def test_more_positions_than_the_model_has_are_refused(prefix, cache, tokens):
    config = dataclasses.replace(CONFIG, max_positions=128)
    decoder(config, W8A8, tokens - 1, prefix, cache)
    with pytest.raises(UserError, match=r"= 129 positions; expected at most the model's 128"):
        decoder(config, W8A8, tokens, prefix, cache)


def test_a_node_before_its_input_is_refused():
    g = builder({"x": (8,), "y": (8,)})
    graph = g.finish(g.add("y", Requantize(), g.input("x", (2,))))
    late = Node(Requantize(), ("y",), "z")
    spec = dataclasses.replace(graph["y"], name="z")
    nodes = (late, *graph.nodes)
    with pytest.raises(AssertionError, match="not ready"):
        Graph(graph.prefix, (*graph.tensors, spec), nodes, graph.outputs)


# Ties.


def members(graph: Graph, name: str) -> set[str]:
    return {n for n, root in graph.ties.items() if root == graph.ties[name]}


def test_heads_share_one_scale_with_what_joins_them():
    layer = decoder(CONFIG, W8A8, 16, 2).layer
    heads = {f"attn.kv{i}.{n}" for i in range(3) for n in ("mixed", "out")}
    assert members(layer, "attn.mixed") == heads | {"attn.mixed"}
    assert layer.ties["attn.mixed"] == "attn.kv0.mixed"


@pytest.mark.parametrize("letter", ["k", "v"])
def test_prefix_cache_and_new_rows_share_one_scale(letter):
    layer = decoder(CONFIG, W8A8, 16, 2, 8).layer
    name = {"k": "keys", "v": "values"}[letter]
    copies = {f"attn.kv{i}.{name}" for i in range(3)}
    stored = {f"attn.{n}_{letter}" for n in ("prefix", "cache")}
    rows = {f"attn.{letter}_cache", f"attn.{letter}_rows"}
    got = {n for n in members(layer, f"attn.{name}") if not n.endswith(".i16")}
    # V needs no change of scale between projection and cache, so v and its heads belong as well.
    extra = set() if letter == "k" else {"attn.v", "attn.v_heads"}
    assert got == copies | stored | rows | {f"attn.{name}"} | extra
    assert layer[layer.ties[f"attn.{name}"]].kind != "param", "a constant cannot be calibrated"


def test_a_requantize_that_changes_nothing_ties_its_ends():
    layer = decoder(CONFIG, RECIPES["w8a16"].bits, 16).layer
    node = next(n for n in layer.nodes if n.output == "attn.input")
    assert node.op == Requantize() and all(is_identity(layer, node, i) for i in range(2))
    assert layer.ties["attn.input"] == layer.ties["attn.norm.flat"]
    narrow = decoder(CONFIG, W8A8, 16).layer
    node = next(n for n in narrow.nodes if n.output == "attn.input")
    assert not is_identity(narrow, node)
    assert narrow.ties["attn.input"] == "attn.input"


def test_a_requantize_that_removes_a_zero_point_is_no_identity():
    g = builder({"x": (8,), "y": (8,), "z": (8,), "w": (8,)})
    x = g.add("x", Mul(), *(g.input(n, (2,), bits=(8,)) for n in "ab"))
    y = g.add("y", Requantize(), x, symmetric=True)
    z = g.add("z", Requantize(), y)
    w = g.add("w", Requantize(), x)
    graph = g.finish(z, w)
    identity = {n.output: is_identity(graph, n) for n in graph.nodes}
    assert identity == {"x": False, "y": False, "z": True, "w": True}
    assert graph.ties["y"] == graph.ties["z"] == "y" and graph.ties["w"] == "x"


def test_where_only_some_layers_widen_ends_are_not_tied():
    g = builder({"x": (8, 8), "y": (8, 16)})
    graph = g.finish(g.add("y", Requantize(), g.input("x", (2,))))
    assert [is_identity(graph, graph.nodes[0], i) for i in range(2)] == [True, False]
    assert graph.ties["y"] == "y"


def test_concat_ties_all_its_inputs():
    g = builder({})
    parts = [g.input(n, (1, 2), bits=(8,)) for n in "abc"]
    graph = g.finish(g.add("all", Concat(0), *parts))
    assert set(graph.ties.values()) == {"a"}


def test_a_head_has_an_eps_of_its_own_bits():
    narrow = RECIPES["w8a8i8"].bits
    wide = {"head.norm.sum": 16, "head.norm.squares": 16, "head.norm.root": 16}
    wide |= {f"head.norm.{n}": 16 for n in ("inv_root", "inv", "flat", "out")}
    names = planned_names(decoder(CONFIG, narrow, 4))
    plan = narrow.replaced({n: b for n, b in wide.items() if n in names}, names)
    readers = shared_names(decoder(CONFIG, plan, 4))
    assert [readers[n].bits for n in ("norm.eps", "norm.eps_i16")] == [8, 16]
    assert readers["norm.eps_i16"].graph.prefix == "head."


def test_layers_share_inputs_with_those_of_their_bits():
    dec = decoder(CONFIG, tiny.APART, 4)
    found = {n: r.bits for n, r in shared_names(dec).items() if n != "input.residual"}
    wide = dict.fromkeys(("rope.cos", "rope.sin", "mask", "keep", "norm.eps"), 16)
    assert found == wide | dict.fromkeys(("rope.cos_i8", "rope.sin_i8", "mask_i8"), 8)
    own = select_shared(dec, dec.layer, {n: n for n in found}, 1)
    assert own["mask"] == "mask_i8" and own["keep"] == "keep"


def test_rules_for_what_pipeline_may_add_are_no_misspelling():
    plan = RECIPES["w8a8"].bits
    for name, bits in (("layers.0.attn.rope.k_centred", 16), ("layers.1.mlp.norm.again.sum", 16)):
        decoder(CONFIG, plan.replaced({name: bits}, []), 4)
    with pytest.raises(UserError, match="k_centered': 16: matches no tensor"):
        decoder(CONFIG, plan.replaced({"layers.0.attn.rope.k_centered": 16}, []), 4)
