"""`qnpu recipe --set`: bits set by hand, from the command line to a graph that has them."""

import dataclasses
import json

import pytest

from qnpu_jax.recipes import load_recipe

SET = ["recipe", "w4a8", "--model", "model", "--set", "layers.1.mlp.act=16"]


def test_what_is_set_is_printed_and_taken(qnpu, here):
    status, out, err = qnpu(*SET, "--follow")
    assert (status, err) == (0, "")
    (here / "own.json").write_text(out)
    plain, made = load_recipe("w4a8"), load_recipe("own.json")
    assert made.bits.rules[:2] == (("layers.1.mlp.act", 16), ("layers.1.mlp.down", 16))
    assert made.name == "w4a8-set"
    assert dataclasses.replace(made, bits=plain.bits, name="w4a8") == plain
    status, out, _ = qnpu("graph", "model", "--recipe", "own.json", "--prefill", "4")
    assert status == 0
    (line,) = [x for x in out.splitlines() if x.startswith("  layers.*.mlp.act  ")]
    assert "i8|i16" in line


def test_bits_set_together_need_no_leave(qnpu, here):
    status, alone, _ = qnpu(*SET, "--follow")
    again, together, _ = qnpu(*SET, "--set", "layers.1.mlp.down=16")
    assert (status, again) == (0, 0) and alone == together


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SET], "layers.1.mlp.act at 16 bits: layers.1.mlp.down must move to 16 too, as no"),
        (["recipe", "--set", "head.logits=16"], "--set: no model; expected the one whose tensors"),
        (["recipe", "--set", "head.logits"], "--set head.logits: expected a tensor and its bits,"),
        (["recipe", "--set", "head.logits=x"], "--set head.logits=x: expected a tensor and its"),
        (["recipe", "--set", "head.logits=²"], "--set head.logits=²: expected a tensor and its"),
        (["recipe", "--follow"], "--follow: nothing moves without --set"),
        (["recipe", "--model", "model"], "--model model: not for a recipe without --set"),
        ([*SET, "--set", "head.logit=16"], "head.logit: no tensor of the model; expected a name"),
        ([*SET, "--set", "head.logit=16"], "; nearest: head.logits"),
        ([*SET, "--set", "head.logits=9"], "head.logits: 9 bits; expected 8 or 16, as kernels"),
        ([*SET, "--set", "layers.1.mlp.down=8"], "layers.1.mlp.down at 8 do not go together"),
        (["recipe", "--set", "head.logits=16", "--model", "none"], "none"),
    ],
)
def test_mistakes_are_one_line(refused, words, message):
    assert message in refused(*words)


def test_the_last_of_several_settings_counts(qnpu, here):
    sets = [f"{name}={bits}" for name, bits in (
        ("layers.0.mlp.act", 16), ("layers.*.mlp.act", 8), ("layers.0.mlp.act", 16)
    )]  # fmt: skip
    more = [x for s in sets for x in ("--set", s)]
    status, out, err = qnpu("recipe", "w8a8", "--model", "model", "--follow", *more)
    assert status == 0, err
    assert ["layers.0.mlp.act", 16] in json.loads(out)["bits"]
