"""Bits set by hand: what moves along, what is refused and why, and that every plan stages."""

import dataclasses
import functools

import numpy as np
import pairwise
import pytest
import tiny
from model_files import FAMILIES

import qnpu_jax
from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import Decoder, decoder, planned_names, with_additions
from qnpu_jax.integer.freeze import check_bits
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.plan.model_ties import ties
from qnpu_jax.width_ties import Ties

MODELS = (*tiny.NAMES, *(f"{name}_tiny" for name in FAMILIES))
STARTS = ("w4a8", "w8a8", "w8a16", "w4a16")
TRIES = 5
"""Tensors that are set in each model and plan: each is two stagings."""
UNSET = (".i16", ".i8", ".keep")
"""Widened copies; and what multiplies 16-bit probabilities, which has 16 always."""
W4A8 = tiny.PLANS["w4a8"]


@functools.cache
def shape(name: str) -> ModelConfig:
    config, _ = load_params(tiny.GOLDEN / name)
    return dataclasses.replace(config, centred_keys=True, double_norms=name == "gemma3_tiny")


@functools.cache
def tied(name: str) -> Ties:
    return ties(shape(name))


LLAMA = "gqa_llama3"


def set_bits(name: str, bits: int, plan: BitPlan = W4A8, follow: bool = False) -> BitPlan:
    return plan.set(name, bits, tied(LLAMA), follow)


def widths(dec: Decoder) -> dict[str, int]:
    """Bits of every tensor, by global name."""
    return {
        graph.global_name(layer, t.name): bits
        for graph in dec.graphs
        for t in graph.tensors
        for layer, bits in enumerate(t.quant.bits)
    }


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        set_bits(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pairwise.parametrize(("name", "start"), MODELS, STARTS, choose=pairwise.levels)
def test_whatever_is_set_stages_with_the_bits_asked_for(name, start):
    """Of tensors of the graph, copies and shared inputs among them, each at either width; with what
    the pipeline may add to it and without."""
    config, known, plan = with_additions(shape(name)), tied(name), tiny.PLANS[start]
    before = widths(decoder(config, plan, 5, 2))
    settable = [*known.names, *known.copies]
    assert settable and {n for n in before if not n.endswith(UNSET)} <= {*settable}
    plain = dataclasses.replace(config, centred_keys=False, double_norms=False)
    random = np.random.default_rng(len(name) + STARTS.index(start))
    for tensor in random.choice(settable, TRIES, replace=False):
        for bits in known.widths[known.copies.get(tensor, tensor)]:
            made = plan.set(tensor, bits, known, follow=True)
            dec = decoder(config, made, 5, 2)
            check_bits(dec)
            check_bits(decoder(plain, made, 5, 2))
            after = widths(dec)
            assert after.get(tensor, bits) == bits, (tensor, bits)  # `keep` goes with 8 bits
            moved = [n for n in known.names if after[n] != before[n]]
            other = 16 if tensor in known.biases else bits  # a wide bias asks for a wide sum
            assert {after[n] for n in moved if n not in known.biases} <= {other}, moved


@pytest.mark.parametrize("name", MODELS)
def test_what_follows_a_raised_tensor_is_what_a_kernel_needs(name):
    """With one of them left behind no graph comes of it."""
    config, known = shape(name), tied(name)
    for tensor in ("layers.0.mlp.act", "layers.1.mlp.gate", "layers.1.mlp.input"):
        made = W4A8.set(tensor, 16, known, follow=True)
        moved = [n for n in known.names if made.bits(n) != W4A8.bits(n) and n != tensor]
        followers = [n for n in moved if n not in known.biases]
        assert "mlp.down" in " ".join(followers)
        for left in followers:
            with pytest.raises(UserError, match="fewer bits than"):
                decoder(config, BitPlan(((left, 8), *made.rules)), 5, 2)


def test_a_set_tensor_names_all_that_must_move_and_moves_it_when_told_to():
    said = refusal("layers.1.mlp.act", 16)
    assert said == (
        "layers.1.mlp.act at 16 bits: layers.1.mlp.down must move to 16 too, as no kernel gives"
        " fewer bits than it takes, and what is copied or shared has one width; set follow=True"
        " (--follow), or set them too"
    )
    made = set_bits("layers.1.mlp.act", 16, follow=True)
    new = (("layers.1.mlp.act", 16), ("layers.1.mlp.down", 16), ("layers.1.mlp.down.bias", 64))
    assert made.rules == (*new, *W4A8.rules)


def test_what_is_made_of_a_tensor_is_raised_and_what_makes_it_is_lowered():
    wide = tiny.PLANS["w8a16"]
    assert "layers.0.mlp.act" in refusal("layers.0.mlp.down", 8, wide)
    made = set_bits("layers.0.mlp.down", 8, wide, follow=True)
    low = [n for n in tied(LLAMA).names if made.bits(n) < wide.bits(n)]
    assert {"layers.0.mlp.act", "layers.0.mlp.gate", "layers.0.mlp.input"} < {*low}
    assert not any("layers.1" in n or "attn" in n for n in low)
    assert made.bits("layers.0.mlp.down.bias") == 32
    assert set_bits("layers.1.mlp.act", 8, set_bits("layers.1.mlp.act", 16, follow=True)) != W4A8
    assert set_bits("layers.1.mlp.down", 16) != W4A8  # the stream after it has 16 bits already


def test_what_is_set_back_leaves_the_plan_as_it_was():
    made = set_bits("layers.1.mlp.act", 16, follow=True)
    made = set_bits("layers.1.mlp.act", 8, made)
    assert made.bits("layers.1.mlp.down") == 16
    assert set_bits("layers.1.mlp.down", 8, made) == W4A8
    assert set_bits("layers.1.mlp.act", 8) == W4A8  # it has them


def test_patterns_and_weights():
    made = set_bits("layers.*.attn.q.weight", 8)
    assert made.rules == (("layers.*.attn.q.weight", 8), *W4A8.rules)
    assert set_bits("layers.*.attn.q.weight", 4, made) == W4A8
    by_layer = W4A8
    for layer in range(2):
        by_layer = set_bits(f"layers.{layer}.mlp.act", 16, by_layer, follow=True)
    assert by_layer == set_bits("layers.*.mlp.act", 16, follow=True)
    assert ("layers.*.mlp.act", 16) in by_layer.rules
    assert "layers.0.mlp.down.weight: 16 bits; expected 4 or 8" in refusal("layers.*.mlp.d*", 16)


def test_a_copy_stands_for_its_source():
    assert set_bits("layers.1.attn.q_heads", 16) == set_bits("layers.1.attn.q", 16)
    assert set_bits("layers.1.attn.q", 16).bits("layers.1.attn.q.bias") == 64


def test_what_heads_share_moves_in_all_of_them():
    """Named by patterns, or a model of 30 layers would fill a screen."""
    said = refusal("layers.0.attn.kv0.scores", 8)
    assert "layers.0.attn.kv*.masked" in said and "layers.0.attn.kv*.scores" in said
    made = set_bits("layers.0.attn.kv0.scores", 8, follow=True)
    moved = tuple((f"layers.0.attn.kv*.{n}", 8) for n in ("scores", "masked"))
    assert made.rules == (*moved, *W4A8.rules), "other layers have masks of their own"


def test_a_wide_bias_needs_a_wide_sum():
    assert "layers.0.attn.q must move to 16" in refusal("layers.0.attn.q.bias", 64)
    assert set_bits("layers.0.attn.q.bias", 64, follow=True) == set_bits("layers.0.attn.q", 16)
    wide = set_bits("layers.0.attn.q", 16)
    narrow = set_bits("layers.0.attn.q.bias", 32, wide)
    assert (narrow.bits("layers.0.attn.q"), narrow.bits("layers.0.attn.q.bias")) == (16, 32)


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("layers.0.attn.k_cache", 16, "16 bits; expected 8, as kernels have no other width"),
        ("embed.weight", 4, "embed.weight: 4 bits; expected 8"),
        ("layers.0.mlp.act", 4, "layers.0.mlp.act: 4 bits; expected 8 or 16"),
        ("head.logits", 17, "head.logits: 17 bits; expected 8 or 16"),
        ("layers.0.attn.q.bias", 8, "expected 32 or 64"),
        ("layers.1.mpl.act", 16, "layers.1.mpl.act: no tensor of the model; expected a name like"),
        ("layers.1.mpl.act", 16, "; nearest: layers.1.mlp.act, "),
        ("layers.*.mlp.acts", 16, "; nearest: layers.*.mlp.act, "),
        ("layers.7.mlp.act", 16, "; nearest: layers."),
    ],
)
def test_refused(name, bits, message):
    assert message in refusal(name, bits, follow=True)


def test_several_at_once():
    together = {"layers.*.mlp.act": 16, "layers.*.mlp.down": 16}
    made = W4A8.set_all(together, tied(LLAMA))
    assert made == set_bits("layers.*.mlp.act", 16, follow=True)
    with pytest.raises(UserError, match=r"act at 16 bits and .*mlp\.down at 8 do not go"):
        W4A8.set_all(together | {"layers.1.mlp.down": 8}, tied(LLAMA), follow=True)
    of_two = {"layers.0.attn.kv0.scores": 8, "layers.0.attn.kv1.scores": 16}
    with pytest.raises(UserError, match=r"scores at 8 bits and .*scores at 16 do not go"):
        W4A8.set_all(of_two, tied(LLAMA), follow=True)


def test_what_no_plan_decides_is_told():
    """`keep` multiplies 16-bit probabilities alone."""
    assert tied(LLAMA).constant == {f"layers.{i}.keep": 16 for i in range(2)}
    with pytest.raises(UserError, match=r"^layers\.0\.keep: has 16 bits wherever it is; leave it"):
        W4A8.set("layers.*.keep", 8, tied(LLAMA))


def test_a_cache_without_a_prefix_may_have_16_bits():
    config = shape(LLAMA)
    made = W4A8.set("layers.*.attn.k_cache", 16, qnpu_jax.ties(config, prefix=0))
    dec = decoder(config, made, 5)
    check_bits(dec)
    assert set(dec.layer["attn.k_cache"].quant.bits) == {16}


def test_ties_know_every_name_that_a_plan_decides():
    dec = decoder(with_additions(shape(LLAMA)), W4A8, 5, 2)
    assert list(tied(LLAMA).names) == planned_names(dec)
    assert not {*tied(LLAMA).names} & {*tied(LLAMA).copies}


def test_a_rule_that_matches_nothing_names_the_nearest():
    plan = BitPlan((("layers.*.mlp.atc", 16), *W4A8.rules))
    with pytest.raises(UserError, match=r"every name\); nearest: layers\.\*\.mlp\.act, "):
        decoder(shape(LLAMA), plan, 5)
    taken = BitPlan((*W4A8.rules, ("head.logits", 8)))
    with pytest.raises(UserError, match=r"every name\)$"):  # well spelt, but taken
        decoder(shape(LLAMA), taken, 5)
