"""Recipes as data: each survives JSON, errors name what cannot be read, and recipes differ in
nothing but their values."""

import dataclasses
import json
from typing import Any, get_args

import numpy as np
import pytest

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.recipes import (
    EFFORTS,
    GROUPS,
    METHODS,
    RECIPES,
    Ranges,
    Recipe,
    Stage,
    load_effort,
    load_recipe,
)

OURS = ("w8a8", "w4a8", "w8a16", "w4a16", "w8a8s8", "w4a8s8", "w8a8i8", "w4a8i8")
STAGE = {
    "learn": [["rotation", 0.1], ["rounding", 1]],
    "share": 1,
    "quantized": "rotated",
    "calibrate": "all",
    "ranges": "sigma",
    "gptq": True,
    "gptaq": 0.5,
    "gptq_tokens": 4096,
    "damping": 0.1,
    "loss": "ce",
    "top_k": 1000,
    "hidden_mse": 0.5,
    "warmup": 0.25,
    "optimizer": "sgd",
    "rounding_optimizer": "adam",
    "rotation_optimizer": "cayley_sgd",
    "masked": False,
}
"""Every key of a stage, no value its default but `share`."""


def message(function, *args) -> str:
    with pytest.raises(UserError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- The named ones ---


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_survive_json(tmp_path, name):
    recipe = load_recipe(name)
    assert recipe == RECIPES[name]
    assert recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == recipe
    path = tmp_path / "own.json"
    path.write_text(json.dumps(recipe.to_json()))
    assert load_recipe(str(path)) == recipe


def test_every_method_comes_at_every_width():
    assert {*RECIPES} == {*OURS, *(f"{method}-{bits}" for method in METHODS for bits in OURS)}
    for method in METHODS:
        for bits in OURS:
            assert RECIPES[f"{method}-{bits}"].bits == RECIPES[bits].bits


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_learn_groups_that_there_are(name):
    for stage in RECIPES[name].stages:
        assert {g for g, _ in stage.learn} <= {*GROUPS}
        assert len(dict(stage.learn)) == len(stage.learn)
        assert all(rate > 0 for _, rate in stage.learn)
    learning = [s.share for s in RECIPES[name].stages if s.learn]
    assert not learning or sum(learning) == 1


def test_our_recipes_learn_at_every_effort_but_none():
    for name in OURS:
        for effort in EFFORTS.values():
            learns = {g for s in RECIPES[name].stages for g, _ in s.learn} - {*effort.without}
            # Calibrated w8a16 is as good as float: learning only moves it away.
            assert bool(learns) == (name != "w8a16")
            assert (effort.steps > 0) == (effort.name != "none")
    groups = {w: {g for s in RECIPES[w].stages for g, _ in s.learn} for w in ("w8a8", "w4a8")}
    assert groups == {"w8a8": {*GROUPS}, "w4a8": {*GROUPS} - {"rotation", "diagonal"}}


def test_loud_channels_are_scaled_where_columns_bear_it_and_copied_where_not():
    for name in OURS:
        recipe, narrow = RECIPES[name], "a8" in name
        assert bool(recipe.peak_limit) == (narrow and name.startswith("w8"))
        assert bool(recipe.split_channels) == (narrow and name.startswith("w4"))


def test_a_rate_by_its_group():
    stage = Stage(learn=(("rotated", 0.1), ("weights", 0.2)))
    assert (stage.rate("weights"), stage.rate("rotation")) == (0.2, 0.0)


# --- One's own ---


def own(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "bits": [["*", 8]], **changes}


def test_defaults_of_a_recipe():
    recipe = Recipe.from_json(own(seed=3))
    assert recipe == Recipe(name="mine", bits=BitPlan((("*", 8),)), seed=3)
    assert Recipe.from_json(own(stages=[{}])).stages == (Stage(),)


def test_every_key_of_a_stage_is_read():
    (stage,) = Recipe.from_json(own(stages=[STAGE])).stages
    assert {f.name for f in dataclasses.fields(Stage)} == STAGE.keys()
    assert dataclasses.asdict(stage) == {
        **STAGE,
        "learn": (("rotation", 0.1), ("rounding", 1.0)),
        "share": 1.0,
    }
    for name, value in dataclasses.asdict(Stage()).items():
        assert name == "share" or dataclasses.asdict(stage)[name] != value


@pytest.mark.parametrize("ranges", get_args(Ranges))
def test_every_rule_of_ranges_can_be_asked_for(ranges):
    recipe = Recipe.from_json(own(activation_init=ranges, stages=[{"ranges": ranges}]))
    assert recipe.activation_init == recipe.stages[0].ranges == ranges


def test_lists_and_numbers_of_numpy_become_what_json_holds():
    data = own(seed=np.int64(3), smooth=np.float32(0.5), stages=[{"learn": [["rotated", 1]]}])
    recipe = Recipe.from_json(data)
    assert (type(recipe.seed), type(recipe.smooth)) == (int, float)
    assert recipe.stages[0].learn == (("rotated", 1.0),)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert hash(recipe) == hash(Recipe.from_json(data))


def test_an_effort_by_its_name():
    assert {name: load_effort(name) for name in EFFORTS} == EFFORTS
    text = message(load_effort, "quick")
    assert text.startswith(
        "quick: no such effort; expected one of ['none', 'fast', 'full', 'best']"
    )


# --- What cannot be read ---


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
        ({"name": 8}, "name must be printable text; got 8"),
        ({"name": "a\nb"}, r"name must be printable text; got 'a\nb'"),
        ({"name": "a\ud800"}, "name must be printable text"),
        ({"rotation": "hadamrd"}, "rotation must be one of ['hadamard', 'none']; got 'hadamrd'"),
        ({"prefix": True}, "prefix must be one of ['auto', 'none']; got True"),
        ({"activation_init": "max"}, "activation_init must be one of"),
        ({"weight_init": ["mse"]}, "weight_init must be one of"),
        ({"max_prefix": 0}, "max_prefix must be an integer from 1 to"),
        ({"max_prefix": True}, "max_prefix must be an integer from 1 to"),
        ({"smooth": 1.5}, "smooth must be a number from 0 to 1; got 1.5"),
        ({"smooth": "half"}, "smooth must be a number from 0 to 1; got 'half'"),
        ({"peak_limit": -1}, "peak_limit must be a number from 0 to"),
        ({"calibration_tokens": 0}, "calibration_tokens must be an integer from 1 to"),
        ({"calibration_tokens": 512.0}, "got 512.0"),
        ({"calibration_pool": -1}, "calibration_pool must be an integer from 0 to"),
        ({"calibration_length": 7}, "calibration_length must be an integer from 8 to"),
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295; got -1"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 4294967295; got 4294967296"),
        ({"seed": None}, "got None"),
        ({"bits": {"*": 8}}, "bits must be a list of [pattern, bits]"),
        ({"bits": [["*", 7]]}, "with bits in 2, 4, 8, 16, 32, 64"),
        ({"bits": [["*"]]}, "bits must be"),
        ({"bits": [[8, "*"]]}, "bits must be"),
        ({"stages": {}}, "stages must be a list of stages; got {}"),
        ({"stages": "two"}, "stages must be a list of stages; got 'two'"),
    ],
)
def test_bad_value(change, expected):
    text = message(Recipe.from_json, {**RECIPES["w8a8"].to_json(), **change}, "own.json")
    assert text.startswith("own.json: ")
    assert expected in text
    assert text.endswith("correct it")


def test_a_pool_smaller_than_what_is_chosen_from_it():
    text = message(lambda: dataclasses.replace(RECIPES["w8a8"], calibration_pool=8191))
    assert text == (
        "calibration_pool: 8191 tokens; expected 0, or at least calibration_tokens, 8192; raise it"
    )
    text = message(lambda: dataclasses.replace(RECIPES["w8a8"], peak_limit=1e-30))
    assert text.startswith("peak_limit: 1e-30 times the 99th percentile; expected 0, or at least")
    assert dataclasses.replace(RECIPES["w8a8"], peak_limit=0.0625).peak_limit == 0.0625
    said = message(lambda: Recipe.from_json(own(calibration_pool=1), "own.json"))
    assert said.startswith("own.json: calibration_pool: 1 tokens; expected 0, or at least")


RATES = "learn must be a list of [group, learning rate above 0]"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learn": {"rotated": 0.1}}, RATES),
        ({"learn": ["rotated"]}, RATES),
        ({"learn": [["rotated"]]}, RATES),
        ({"learn": [["rotated", "fast"]]}, RATES),
        ({"learn": [["rotated", True]]}, RATES),
        ({"learn": [["rotated", 0]]}, RATES),
        ({"learn": [["rotated", -0.1]]}, RATES),
        ({"learn": [["rotated", float("inf")]]}, RATES),
        ({"learn": [["rotated", float("nan")]]}, RATES),
        ({"learn": [[1, 0.1]]}, RATES),
        ({"learn": [["rotations", 0.1]]}, "learn must name groups of ['rotation', 'diagonal', "),
        ({"learn": [["rotations", 0.1]]}, "; got 'rotations'; correct it"),
        (
            {"learn": [["rotated", 0.1], ["rotated", 0.2]]},
            "learn names 'rotated' twice; correct it",
        ),
        ({"share": 1.5}, "share must be a number from 0 to 1; got 1.5"),
        ({"share": float("nan")}, "share must be a number from 0 to 1; got nan"),
        ({"warmup": -0.1}, "warmup must be a number from 0 to 1; got -0.1"),
        ({"warmup": True}, "warmup must be a number from 0 to 1; got True"),
        ({"hidden_mse": "much"}, "hidden_mse must be a number from 0 to 1000000.0; got 'much'"),
        ({"top_k": -1}, "top_k must be an integer from 0 to 2147483647; got -1"),
        ({"top_k": 1.0}, "top_k must be an integer from 0 to 2147483647; got 1.0"),
        ({"quantized": "none"}, "quantized must be one of ['all', 'rotated']; got 'none'"),
        ({"calibrate": True}, "calibrate must be one of ['none', 'unrotated', 'all']; got True"),
        ({"ranges": "max"}, "ranges must be one of ['minmax', 'sigma', "),
        ({"gptq": 1}, "gptq must be true or false; got 1"),
        ({"masked": "no"}, "masked must be true or false; got 'no'"),
        ({"loss": "mse"}, "loss must be one of ['kl', 'ce', 'hidden']; got 'mse'"),
        ({"optimizer": "adamw"}, "optimizer must be one of ['adam', 'sgd']; got 'adamw'"),
        ({"rotation_optimizer": "sgd"}, "rotation_optimizer must be one of ['adam', 'cayley_sgd']"),
        ({"laerning": 1}, "unknown key 'laerning'; expected one of ['calibrate', 'damping', "),
    ],
)
def test_bad_value_in_a_stage(change, expected):
    data = own(stages=[STAGE, {**STAGE, **change}, STAGE])
    text = message(Recipe.from_json, data, "own.json")
    assert text.startswith("own.json: stages[1]: ")
    assert expected in text
    assert text.endswith("correct it")


def test_a_stage_is_an_object():
    text = message(Recipe.from_json, own(stages=[STAGE, 3]), "own.json")
    assert text == "own.json: stages[1]: expected a JSON object, got int; correct it"


def test_unknown_recipe():
    text = message(load_recipe, "w9a9")
    assert text.startswith("w9a9: no such recipe; expected one of ['w8a8', ")
    assert all(f"'{name}'" in text for name in (*OURS, *METHODS))
    assert "quarot-w4a8" in text and "quarot-w4a8" in RECIPES


def test_a_method_alone_is_no_recipe():
    assert message(load_recipe, "quarot").startswith("quarot: no such recipe; expected one of")


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"{", "not valid JSON"), (b"[" * 100_000, "nested too deeply"), (b"[]", "got list")],
)
def test_not_a_recipe(tmp_path, data, expected):
    path = tmp_path / "own.json"
    path.write_bytes(data)
    assert expected in message(load_recipe, str(path))


def test_not_utf8(tmp_path):
    path = tmp_path / "own.json"
    path.write_bytes(b'{"name": "\xff"}')
    assert message(load_recipe, str(path)).startswith(f"{path}: not valid JSON")
