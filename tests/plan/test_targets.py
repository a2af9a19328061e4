"""Widths that targets have kernels for, against graphs of many families and Qualcomm's compiler."""

import dataclasses
import functools
import itertools
from typing import get_args

import numpy as np
import pytest
import tiny
from extras import needs
from test_groups import MODELS, closed

from qnpu_jax.choices import PlanTarget
from qnpu_jax.compilers import hexagon
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.graph.ops import BatchMatmul, Concat, Reshape, Slice, Transpose
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.plan import feasible
from qnpu_jax.plan.costs import cost
from qnpu_jax.plan.groups import Choices, choices
from qnpu_jax.plan.targets import TARGETS, target
from qnpu_jax.recipes import RECIPES
from qnpu_jax.tflite import cached
from qnpu_jax.tflite.named_forms import FORMS

V73 = ("SM8650", "SM8750", "SM8850", "SA8255", "QCS9075")
ARM = ("ethos-u85-256", "ethos-u85-2048")


@functools.cache
def staged(name: str, plan: str):
    config, _ = load_params(tiny.GOLDEN / name)
    config = dataclasses.replace(config, max_positions=512)
    return decoder(config, tiny.PLANS[plan], 5, 2)


def between(name: str, low: str, high: str) -> Choices:
    return choices(staged(name, low), staged(name, high))


def lacking(its: str, name: str, plan: str) -> list[str]:
    """Global names of what a target lacks."""
    dec = staged(name, plan)
    graphs = {g.prefix: g for g in dec.graphs}
    found = feasible.lacks(target(its), dec)
    return [graphs[x.member.prefix].global_name(x.member.layer, x.member.name) for x in found]


def test_the_option_lists_all_targets():
    assert get_args(PlanTarget) == tuple(TARGETS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", tiny.WIDTHS)
def test_what_has_all_kernels(name, plan):
    for its in (*V73, *ARM):
        assert lacking(its, name, plan) == []
    assert (lacking("xnnpack", name, plan) == []) == (plan in ("w8a8i8", "w4a8i8"))
    assert (lacking("int8", name, plan) == []) == (plan == "w8a8i8")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", tiny.WIDTHS)
def test_a_machine_of_8_bits_lacks_what_has_others(name, plan):
    """All that the graph computes, and the weights of its linears; and no other tensor."""
    dec = staged(name, plan)
    expected = {
        (g.prefix, n, layer)
        for g in dec.graphs
        for layer in range(g.layers)
        for n in (t.name for t in g.tensors)
        if g[n].quant.bits[layer] != 8
    }
    found = {tuple(x.member) for x in feasible.lacks(target("int8"), dec)}
    assert found <= expected
    for prefix, tensor, layer in expected - found:
        g = next(g for g in dec.graphs if g.prefix == prefix)
        made = next((n for n in g.nodes if n.output == tensor), None)
        moved = made is None or isinstance(made.op, Reshape | Transpose | Slice | Concat)
        assert moved or tensor.endswith(".i16"), (tensor, layer)
        assert not tensor.endswith("weight")


# What Qualcomm's compiler (onnxruntime-qnn 2.6.0) leaves to the CPU of a file compiled for SA8295.
def squares(layers: int, norms: str) -> list[str]:
    return [f"layers.{i}.{x}.squares" for i in range(layers) for x in norms.split()]


PRODUCTS = ("scores", "mixed")
HEADS = "attn.q_norm.norm attn.k_norm.norm"
REFUSED = {
    ("gqa_llama3", "w8a8s8"): [],
    ("gqa_llama3", "w8a8i8"): [],
    ("qwen2_tiny", "w8a8s8"): [],
    ("granite_tiny", "w8a8s8"): [],
    ("smollm3_tiny", "w8a8s8"): [],
    ("gemma3_tiny", "w8a8i8"): [],
    ("qwen3_tiny", "w8a8i8"): [],
    ("gqa_llama3", "w8a8"): [
        f"layers.{i}.attn.kv{k}.scores" for i, k in itertools.product(range(2), range(2))
    ],
    ("qwen3_tiny", "w8a8s8"): squares(3, HEADS),
    ("olmo2_tiny", "w8a8s8"): [*squares(3, HEADS), "head.norm.squares"],
    ("gemma3_tiny", "w8a8s8"): [
        *squares(4, f"attn.norm {HEADS} mlp.norm"), "head.norm.squares",
    ],
    ("olmo2_tiny", "w8a16"): [
        *(f"layers.{i}.attn.kv{k}.{x}" for i in range(3) for k in range(2) for x in PRODUCTS),
        "head.norm.squares",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "plan"), REFUSED)
def test_v68_lacks_what_its_compiler_refuses(name, plan):
    """A norm that is refused as one op, as its input is narrower, is refused for its squares."""
    found = [x.replace("norm.rows", "norm.squares") for x in lacking("SA8295", name, plan)]
    assert sorted(found) == sorted(REFUSED[name, plan])


@needs(hexagon.check_installed)
@pytest.mark.parametrize(
    ("soc", "name", "plan"),
    [
        ("SA8295", "gqa_llama3", "w8a8"),
        ("SA8295", "gqa_llama3", "w4a8s8"),
        ("SA8295", "qwen3_tiny", "w8a8s8"),
        ("SA8295", "qwen3_tiny", "w8a16"),
        ("SA8255", "qwen3_tiny", "w8a8"),
        ("SM8850", "gqa_llama3", "w4a16"),
    ],
)
def test_the_compiler_takes_all_but_what_is_lacking(tmp_path, soc, name, plan):
    model = tiny.quantized(name, plan)
    source = tmp_path / "m.tflite"
    cached.build_cached(model, 4, 12, form=FORMS["hexagon"](model)).write(source)
    made = hexagon.compile_file(source, soc, tmp_path / "out.tflite")
    for signature in made.signatures:
        assert signature.ops - signature.on_npu == len(lacking(soc, name, plan))


ENDS = {"int8": ("w4a8i8", "w8a16"), "xnnpack": ("w4a8i8", "w8a16"), "SA8295": ("w4a8i8", "w8a16")}


@pytest.mark.parametrize("its", TARGETS)
@pytest.mark.parametrize("name", ["gqa_llama3", "gemma3_tiny", "qwen3_tiny", "olmo2_tiny"])
def test_no_plan_between_narrowed_ends_lacks_a_kernel(its, name):
    low, high = ENDS.get(its, ("w4a8", "w8a16"))
    found = between(name, low, high)
    plans = feasible.narrowed(target(its), found, (low, high))
    config = found.low.config
    narrow = choices(*(decoder(config, plan, 5, 2) for plan in plans))
    random = np.random.default_rng(2)
    for share in (0.0, 0.1, 0.5, 1.0):
        up = closed(narrow, random.random(len(narrow.groups)) < share)
        dec = decoder(config, narrow.plan(up), 5, 2)
        assert feasible.fits(target(its), dec), share


@pytest.mark.parametrize(
    ("its", "low"), [("SA8295", "w4a8s8"), ("xnnpack", "w4a8i8"), ("int8", "w4a8i8")]
)
def test_what_is_no_choice_is_lacking_and_nothing_else(its, low):
    """Each group that left is one whose other width, with what must follow, has no kernel."""
    found = between("gqa_llama3", low, "w8a16")
    plans = feasible.narrowed(target(its), found, (low, "w8a16"))
    ends = [decoder(found.low.config, plan, 5, 2) for plan in plans]
    kept = {m for g in choices(*ends).groups for m in g.members}
    before = set(feasible.lacks(target(its), found.low))
    left = 0
    for i in range(0, len(found.groups), 2):
        members = found.groups[i].members
        raised = closed(found, np.arange(len(found.groups)) == i)
        alone = decoder(found.low.config, found.plan(raised), 5, 2)
        lacking_more = set(feasible.lacks(target(its), alone)) - before
        gone = bool(lacking_more) or any(x.member in members for x in before)
        assert gone == (members[0] not in kept), members[0]
        left += gone
    assert left


def test_rows_of_a_norm_stay_low_with_it_on_v68():
    """Qualcomm's compiler has no RmsNorm of 8-bit rows into 16 bits, and v68 no product of 16."""
    found = between("gqa_llama3", "w4a8i8", "w8a16")
    _, high = feasible.narrowed(target("SA8295"), found, ("w4a8i8", "w8a16"))
    dec = decoder(found.low.config, high, 5, 2)
    assert set(dec.layer["attn.norm.squares"].quant.bits) == {8}
    assert set(dec.layer["input.residual"].quant.bits) == {8}
    assert set(dec.layer["attn.v"].quant.bits) == {16}


def test_queries_are_wide_where_v68_must_norm_them_in_one_op():
    found = between("qwen3_tiny", "w4a8s8", "w8a16")
    low, _ = feasible.narrowed(target("SA8295"), found, ("w4a8s8", "w8a16"))
    dec = decoder(found.low.config, low, 5, 2)
    assert set(dec.layer["attn.q"].quant.bits) == set(dec.layer["attn.k"].quant.bits) == {16}
    assert set(dec.layer["attn.v"].quant.bits) == {8}


def test_narrowed_ends_of_a_machine_that_has_all_are_the_ends():
    found = between("gqa_llama3", "w4a8", "w8a16")
    for its in (*V73, *ARM):
        plans = feasible.narrowed(target(its), found, ("w4a8", "w8a16"))
        assert plans == (found.low.plan, found.high.plan)


def test_recipes_that_change_are_named_after_the_target():
    config = staged("gqa_llama3", "w4a8").config
    low, high = feasible.recipes(target("SA8295"), config, RECIPES["w4a8s8"], RECIPES["w8a16"])
    assert low == RECIPES["w4a8s8"]
    assert high.name == "w8a16 on SA8295" and high.bits != RECIPES["w8a16"].bits
    dec = decoder(config, high.bits, 5, 2)
    for graph in dec.graphs:
        for node in graph.nodes:
            if isinstance(node.op, BatchMatmul) and "norm" not in node.output:
                assert set(graph[node.output].quant.bits) == {8}
    assert set(dec.layer["mlp.act"].quant.bits) == {16}


@pytest.mark.parametrize(
    ("its", "low", "message"),
    [
        ("SA8295", "w4a8", r"layers.0.attn.kv0.scores: 16 bits in w4a8 and 16 in w8a16; SA8295"
         r" has products of two activations of 8 bits only; choose --low and --high of \['w8a8s8'"),
        ("int8", "w4a8", r"embed.residual: 16 bits in w4a8 and 16 in w8a16; int8 has"
         r" elementwise ops of 8 bits only; choose --low and --high of \['w8a8i8'\]"),
        ("xnnpack", "w4a8s8", r"embed.residual: 16 bits .* of \['w8a8i8', 'w4a8i8'\]"),
        ("SM8650", "w8a16", "plan: w8a16 and w8a16 give every tensor the same bits; expected two"),
    ],
)  # fmt: skip
def test_what_no_width_has_a_kernel_for_is_refused_in_one_line(its, low, message):
    config = staged("gqa_llama3", "w4a8").config
    with pytest.raises(UserError, match=message) as e:
        feasible.recipes(target(its), config, RECIPES[low], RECIPES["w8a16"])
    assert "\n" not in str(e.value)


def test_an_unknown_target_lists_them():
    with pytest.raises(UserError, match=r"--soc SM1: unknown; expected one of \['SM8650', .*pack"):
        target("SM1")


@pytest.mark.parametrize("its", ["int8", "xnnpack"])
def test_without_rates_there_are_no_seconds(its):
    found = between("gqa_llama3", "w4a8i8", "w8a8i8")
    c, up = cost(found, its, 200), [True] * len(found.groups)
    assert not c.timed and np.isnan([c.decode(up), c.prefill(up), *c.error]).all()
    assert c.bytes(up) == cost(found, "SM8750", 200).bytes(up) > c.size > 0
