"""Bytes of files and integers of models, pinned: a change that should move no number moves none.

The golden data come from the commit before the topic folders (tests/golden/make_integer.py).
"""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import tiny

from qnpu_jax import pipeline
from qnpu_jax.integer import storage
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text.windows import Windows
from qnpu_jax.tflite import cached, writer
from qnpu_jax.tflite.named_forms import FORMS

FOLDER = tiny.GOLDEN / "integer"
SHA256: dict[str, dict[str, str]] = json.loads((FOLDER / "sha256.json").read_text())
recipes = pytest.mark.parametrize("recipe", list(SHA256))
PREFILL, CONTEXT = 8, 32


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def forms(model: IntegerModel) -> dict[str, Any]:
    """Every form of export, by the name that sha256.json gives it."""
    out = {}
    for profile, form in FORMS.items():
        for logits in ("all", "last"):
            built = writer.build_prefill(model, tiny.TOKENS, logits, form(model))
            out[f"{profile}-{logits}"] = built
        built = cached.build_cached(model, PREFILL, CONTEXT, "last", form(model))
        out[f"{profile}-cached"] = built
    return out


@recipes
def test_the_writer_gives_the_same_bytes(recipe):
    """From stored integers, so on every machine."""
    model = storage.load(FOLDER / recipe)
    assert {n: digest(x.to_bytes()) for n, x in forms(model).items()} == SHA256[recipe]


@recipes
def test_a_model_is_stored_as_it_was(tmp_path, recipe):
    storage.save(storage.load(FOLDER / recipe), tmp_path)
    for file in (FOLDER / recipe).iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@recipes
def test_quantizing_gives_the_same_integers(recipe):
    """Every scale is that of the golden model but for a float's rounding (1e-5: sums of 24 to 96
    float32 terms), and where all are equal to the bit, every code is."""
    config, params = load_params(tiny.GOLDEN / "gqa_llama3")
    ids = np.random.default_rng(0).integers(0, 96, (8, tiny.TOKENS)).astype(np.int32)
    prepared = pipeline.prepare(config, params, RECIPES[recipe])
    text = Windows.of(ids)
    got = pipeline.quantize(config, prepared, RECIPES[recipe], text, 1).model
    expected = storage.load(FOLDER / recipe)
    assert (got.config, got.plan, got.prefix) == (expected.config, expected.plan, expected.prefix)
    assert got.tensors.keys() == expected.tensors.keys()
    for name, t in expected.tensors.items():
        np.testing.assert_allclose(got.tensors[name].scale, t.scale, rtol=1e-5, err_msg=name)
    for name, codes in expected.codes.items():
        # Another processor rounds another sum: a code may then go the other way.
        assert np.mean(got.codes[name] != codes) < 0.01, name
