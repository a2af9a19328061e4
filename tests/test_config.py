"""Recipes and model shapes as JSON, and what is said of those that cannot be read."""

import json

import pytest

from qnpu_jax.config import (
    RECIPES,
    BitPlan,
    ModelConfig,
    Recipe,
    RopeScaling,
    UserError,
    bit_plan,
    load_recipe,
)


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w8a16", "w4a16"])
def test_named_recipes_survive_json(tmp_path, name):
    recipe = load_recipe(name)
    assert recipe == RECIPES[name]
    assert recipe.name == name
    path = tmp_path / "own.json"
    path.write_text(json.dumps(recipe.to_json()))
    assert load_recipe(str(path)) == recipe


def test_defaults_of_a_recipe():
    recipe = Recipe.from_json({"name": "mine", "bits": [["*", 8]], "seed": 3})
    assert recipe == Recipe(name="mine", bits=BitPlan((("*", 8),)), seed=3)


def test_unknown_key(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**RECIPES["w8a8"].to_json(), "rotatoin": "none"}))
    text = message(load_recipe, str(path))
    assert text.startswith(f"{path}: unknown key 'rotatoin'; expected one of [")
    assert "'rotation'" in text


@pytest.mark.parametrize("key", ["name", "bits"])
def test_missing_key(key):
    data = RECIPES["w8a8"].to_json()
    del data[key]
    assert message(Recipe.from_json, data, "f").startswith(f"f: key '{key}' is missing; add it")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": 8}, "name must be a string; got 8"),
        ({"rotation": "hadamrd"}, "rotation must be one of ['hadamard', 'none']; got 'hadamrd'"),
        ({"prefix": True}, "prefix must be one of ['auto', 'none']; got True"),
        ({"activation_init": "max"}, "activation_init must be one of"),
        ({"weight_init": ["mse"]}, "weight_init must be one of"),
        ({"max_prefix": 0}, "max_prefix must be an integer from 1 to"),
        ({"max_prefix": True}, "max_prefix must be an integer from 1 to"),
        ({"calibration_tokens": 0}, "calibration_tokens must be an integer from 1 to"),
        ({"calibration_tokens": 512.0}, "got 512.0"),
        ({"calibration_length": 7}, "calibration_length must be an integer from 8 to"),
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295; got -1"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295; got 4294967296"),
        ({"seed": None}, "got None"),
        ({"bits": {"*": 8}}, 'key "bits" must be a list of [pattern, bits]'),
        ({"bits": [["*", 7]]}, "with bits in 2, 4, 8, 16, 32, 64"),
        ({"bits": [["*"]]}, 'key "bits" must be'),
        ({"bits": [[8, "*"]]}, 'key "bits" must be'),
    ],
)
def test_bad_value(change, expected):
    text = message(Recipe.from_json, {**RECIPES["w8a8"].to_json(), **change}, "own.json")
    assert text.startswith("own.json: ")
    assert expected in text
    assert text.endswith("correct it")


def test_unknown_recipe():
    text = message(load_recipe, "w9a9")
    assert text.startswith("w9a9: no such recipe; expected one of ['w4a16', 'w4a8',")


@pytest.mark.parametrize(("data", "expected"), [(b"{", "not valid JSON"), (b"[]", "got list")])
def test_not_a_recipe(tmp_path, data, expected):
    path = tmp_path / "own.json"
    path.write_bytes(data)
    assert expected in message(load_recipe, str(path))


def test_not_utf8(tmp_path):
    path = tmp_path / "own.json"
    path.write_bytes(b'{"name": "\xff"}')
    assert message(load_recipe, str(path)).startswith(f"{path}: not valid JSON")


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


@pytest.mark.parametrize(
    ("weights", "activations", "bias", "scores"), [(4, 8, 32, 16), (8, 16, 64, 16)]
)
def test_plan_of_the_named_recipes(weights, activations, bias, scores):
    plan = bit_plan(weights, activations)
    assert plan.bits("layers.3.attn.q.weight") == weights
    assert plan.bits("head.weight") == plan.bits("embed.weight") == 8
    assert plan.bits("layers.3.attn.q.bias") == bias
    assert plan.bits("layers.3.attn.kv0.scores") == scores
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
        rope_scaling=scaling,
    )
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.queries_per_kv_head == 2
