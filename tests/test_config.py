"""Bit plans and model shapes: rules that are read in order and all used, JSON that comes back."""

import json

import pytest

from qnpu_jax.config import BitPlan, LayerKind, ModelConfig, RopeScaling, bit_plan
from qnpu_jax.errors import UserError


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# Bit plans.


def test_first_match_decides():
    plan = BitPlan((("layers.0.*", 16), ("*.weight", 4), ("*", 8)))
    assert [plan.bits(n) for n in ("layers.0.a.weight", "layers.1.a.weight", "head.x")] == [
        16,
        4,
        8,
    ]


def test_every_tensor_needs_a_rule():
    text = message(BitPlan((("embed.*", 8),)).bits, "head.logits")
    assert text.startswith("head.logits: no rule of the bit plan matches; expected one, got")


def test_every_rule_needs_a_tensor():
    plan = BitPlan((("*.weight", 4), ("head.weight", 8), ("*", 8)))
    text = message(plan.check_used, ["head.weight", "head.logits"])
    assert text.startswith("bit plan rule 'head.weight': 8: matches no tensor that an earlier")
    BitPlan(plan.rules[::2]).check_used(["head.weight", "head.logits"])


def test_replaced_bits_come_first_and_rules_without_a_tensor_go():
    plan = BitPlan((("a.bias", 64), ("*.bias", 64), ("*", 8)))
    names = ["a.bias", "b.bias"]
    assert plan.replaced({"a.bias": 32}, names).rules == (("a.bias", 32), *plan.rules[1:])
    assert plan.replaced({"*.bias": 32}, names).rules == (("*.bias", 32), ("*", 8))
    assert plan.replaced({}, names) == plan


@pytest.mark.parametrize(
    ("weights", "activations", "bias", "scores", "stream"),
    [(4, 8, 32, 16, 16), (4, 8, 32, 8, 16), (4, 8, 32, 8, 8), (8, 16, 64, 16, 16)],
)
def test_plan_of_the_named_recipes(weights, activations, bias, scores, stream):
    plan = bit_plan(weights, activations, scores, stream)
    assert plan.bits("layers.3.attn.q.weight") == weights
    assert plan.bits("head.weight") == plan.bits("embed.weight") == 8
    assert plan.bits("layers.3.attn.q.bias") == bias
    for tensor in ("scores", "masked", "softmax"):
        assert plan.bits(f"layers.3.attn.kv0.{tensor}") == scores
    for tensor in ("mlp.residual", "attn.norm.out", "attn.rope.q_cos", "rope.cos"):
        assert plan.bits(f"layers.3.{tensor}") == stream
    assert plan.bits("layers.3.attn.k_cache") == 8
    assert plan.bits("layers.3.mlp.act") == activations


# Model shapes.


@pytest.mark.parametrize("scaling", [None, RopeScaling("llama3", 8.0, 1.0, 4.0, 32)])
def test_model_config_survives_json(scaling):
    config = ModelConfig(
        family="llama",
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        max_positions=128,
        kinds=(LayerKind(10000.0, scaling), LayerKind(None, None, 16)),
        kind_of_layer=(0, 1),
        biases=("attn.q",),
    )
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.queries_per_kv_head == 2
