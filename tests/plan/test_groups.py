"""Groups between two plans: what ties them, what follows from one, and the plan that comes out."""

import dataclasses
import functools

import numpy as np
import pytest
import tiny
from model_files import FAMILIES

from qnpu_jax.calibrate.ranges import calibrate_activations
from qnpu_jax.calibrate.statistics import collect_statistics
from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import decoder, planned_names
from qnpu_jax.graph.graph import global_name
from qnpu_jax.graph.ops import tied_inputs
from qnpu_jax.integer.freeze import check_bits, freeze
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.plan.groups import Choices, Member, choices
from qnpu_jax.proof.verified import verify_file
from qnpu_jax.tflite import writer

LOWS = ("w4a8", "w4a8s8", "w4a8i8")
MODELS = (*tiny.NAMES, *(f"{name}_tiny" for name in FAMILIES))


@functools.cache
def between(name: str, low: str, high: str = "w8a16") -> Choices:
    config, _ = load_params(tiny.GOLDEN / name)
    config = dataclasses.replace(config, max_positions=512)  # a chunk has 128
    return choices(*(decoder(config, tiny.PLANS[plan], 5, 2) for plan in (low, high)))


def closed(found: Choices, raised: np.ndarray) -> list[bool]:
    """The plan with what must follow."""
    up = raised.copy()
    while True:
        more = [j for i, j in found.above if up[i] and not up[j]]
        if not more:
            return [bool(x) for x in up]
        up[more] = True


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("name", MODELS)
def test_either_end_is_the_recipe_that_it_comes_from(name, low):
    found = between(name, low)
    assert found.plan([False] * len(found.groups)) is found.low.plan
    every = decoder(found.low.config, found.plan([True] * len(found.groups)), 5, 2)
    assert every.graphs == found.high.graphs


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("name", MODELS)
def test_every_plan_that_heeds_what_follows_has_the_widths_asked_for(name, low):
    found = between(name, low)
    random = np.random.default_rng(len(name))
    for share in (0.02, 0.1, 0.5):
        up = closed(found, random.random(len(found.groups)) < share)
        dec = decoder(found.low.config, found.plan(up), 5, 2)
        check_bits(dec)
        graphs = {g.prefix: g for g in dec.graphs}
        for group, raised in zip(found.groups, up, strict=True):
            for m in group.members:
                bits = graphs[m.prefix][m.name].quant.bits[m.layer]
                assert bits == (group.high if raised else group.low), m


@pytest.mark.parametrize("name", ["gqa_llama3", "gemma3_tiny"])
def test_what_must_follow_is_what_a_kernel_needs(name):
    """Each pair is one that the graph refuses to stage the other way round."""
    found = between(name, "w4a8")
    assert found.above
    for i, j in found.above[:: max(1, len(found.above) // 8)]:
        up = np.zeros(len(found.groups), bool)
        up[i] = True
        without = closed(found, up)
        without[j] = False
        with pytest.raises(UserError, match="no kernel gives fewer bits than it takes; raise it"):
            found.plan(without)
        names = [global_name(m.prefix, m.layer, m.name) for m in found.groups[i].members]
        asked = [n for n in planned_names(found.low) if n in names]
        rules = [(n, found.groups[i].high) for n in asked]
        plan = BitPlan((*rules, *found.low.plan.rules))
        with pytest.raises(UserError, match="fewer bits than its input"):
            decoder(found.low.config, plan, 5, 2)


def test_groups_by_hand():
    found = between("gqa_llama3", "w4a8")
    by_name = {g.name: g for g in found.groups}
    assert {m.name for m in by_name["layers.1.attn.q"].members} == {"attn.q", "attn.q_heads"}
    assert by_name["layers.0.mlp.down.weight"].kind == "weight"
    assert (by_name["layers.0.mlp.down.weight"].low, by_name["layers.0.mlp.act"].high) == (4, 16)
    assert "head.weight" not in by_name  # 8 bits in both
    follows = {(found.groups[i].name, found.groups[j].name) for i, j in found.above}
    assert ("layers.0.mlp.act", "layers.0.mlp.down") in follows
    assert ("layers.0.mlp.gate", "layers.0.mlp.silu") in follows
    # A requantize stands between: what a block reads may have fewer bits than what it is made of.
    assert not any(j == "layers.0.attn.input" for _, j in follows)


def test_what_reads_one_shared_input_in_a_layer_has_one_width():
    """All heads' scores, and queries and keys of RoPE; another layer has its own."""
    found = between("gqa_llama3", "w4a8s8")
    for layer in range(found.low.layer.layers):
        at = [found.index[Member("layers.", f"attn.kv{i}.scores", layer)] for i in (0, 1)]
        assert at[0] == at[1] and found.groups[at[0]].name == f"layers.{layer}.attn.kv0.scores"
        assert {m.layer for m in found.groups[at[0]].members} == {layer}
    rotated = between("gqa_llama3", "w4a8i8")
    at = [rotated.index[Member("layers.", f"attn.rope.{x}", 1)] for x in ("q", "k", "q_cos")]
    assert len({*at}) == 1 and {m.layer for m in rotated.groups[at[0]].members} == {1}


def test_the_stream_may_widen_from_any_place_on(tmp_path):
    """8 bits up to the first layer's MLP, 16 from what it adds on, as no kernel narrows the stream;
    in LiteRT's kernels too."""
    dec, params, free = tiny.calibrated("gqa_llama3", "w4a8i8")
    above = decoder(dec.config, tiny.PLANS["w8a16"], dec.tokens, dec.prefix)
    found = choices(dec, above)
    first = next(i for i, g in enumerate(found.groups) if g.name == "layers.0.mlp.residual")
    plan = found.plan(found.closed([False] * len(found.groups), (first,)))
    mixed = decoder(dec.config, plan, dec.tokens, dec.prefix)
    stream = ("input.residual", "attn.residual", "mlp.residual")
    assert [mixed.layer[n].quant.bits for n in stream] == [(8, 16), (8, 16), (16, 16)]
    assert mixed.embed["residual"].quant.bits == (8,)
    assert mixed.head["input.residual"].quant.bits == (16,)
    scales, _ = calibrate_activations(
        mixed, collect_statistics(mixed, params, tiny.random_ids((4, tiny.TOKENS))),
        "class", tame=True,
    )  # fmt: skip
    model = freeze(mixed, params, free | scales, tiny.PREFIX)
    writer.write_prefill(model, tmp_path / "m.tflite", tiny.TOKENS)
    ids = tiny.random_ids((tiny.TOKENS,))
    compared = verify_file(tmp_path / "m.tflite", model, ids, "ref")
    assert compared.differing == 0 < compared.elements


def test_heads_may_differ_in_the_width_of_probabilities():
    found = between("gqa_llama3", "w4a8")
    probs = [found.index[Member("layers.", f"attn.kv{i}.probs", 0)] for i in (0, 1)]
    plan = found.plan(closed(found, np.arange(len(found.groups)) == probs[1]))
    layer = decoder(found.low.config, plan, 5, 2).layer
    assert [layer[f"attn.kv{i}.kept"].quant.bits for i in (0, 1)] == [(8, 8), (16, 8)]
    # In no layer does keep change the first head's, which have nothing of its scale.
    assert layer.ties["keep"] == "keep" != layer.ties["attn.kv0.kept"]


def test_plans_the_wrong_way_round_are_refused():
    with pytest.raises(UserError, match="bits in the low plan and 8 in the high one; expected no"):
        between("gqa_llama3", "w8a16", "w4a8")


def test_planned_names_are_what_a_plan_decides():
    dec = between("gqa_llama3", "w4a8").low
    names = planned_names(dec)
    assert len(names) == len(set(names))
    assert "layers.0.attn.q" in names and "head.bias" in names
    copies = {
        dec.layer.global_name(0, n.output) for n in dec.layer.nodes if tied_inputs(n.op, n.inputs)
    }
    assert copies and not copies & set(names)


def test_norms_of_a_layer_have_one_width():
    """They share eps; the head has its own."""
    found = between("gqa_llama3", "w8a8i8", "w8a8")
    at = {
        (n, i): found.index[Member("layers.", f"{n}.norm.sum", i)]
        for n in ("attn", "mlp")
        for i in (0, 1)
    }
    assert at["attn", 0] == at["mlp", 0] != at["attn", 1] == at["mlp", 1]
    assert found.index[Member("head.", "norm.sum", 0)] not in at.values()
