"""Makes the golden integer models and the hashes of the files that the writer made of them.

They come from commit 0bc0ee1, the last one before the topic folders, so that a move of code shows
that it moved no bit. The script runs with that commit's packages and stands here as the record of
how the files came to be:

    git worktree add old 0bc0ee1
    PYTHONPATH=old python tests/golden/make_integer.py

For each recipe: integer/<recipe>/integer_model.{safetensors,json}, and in integer/sha256.json the
hash of the .tflite of every form of export. Integers and float32 scales are stored, so the hashes
depend on no processor's float arithmetic.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from qnpu_jax import freeze, pipeline, tflite
from qnpu_jax.learn.stages import Text
from qnpu_jax.models import load_params
from qnpu_jax.npu.profile import PROFILES
from qnpu_jax.recipes import RECIPES

HERE = Path(__file__).parent
MODEL = "gqa_llama3"
NAMES = ("w8a8", "w4a8", "w4a16", "w8a8i8")
TOKENS, PREFILL, CONTEXT = 24, 8, 32


def text() -> Text:
    """8 windows of 24 random tokens."""
    ids = np.random.default_rng(0).integers(0, 96, (8, TOKENS)).astype(np.int32)
    return Text.of(ids)


def quantized(name: str) -> freeze.IntegerModel:
    """With nothing learned (`--effort none`)."""
    config, params = load_params(HERE / MODEL)
    recipe = RECIPES[name]
    prepared = pipeline.prepare(config, params, recipe)
    return pipeline.quantize(config, prepared, recipe, text(), 1).model


def hashes(model: freeze.IntegerModel) -> dict[str, str]:
    """sha256 of a prefill, of its last logits, of a KV cache, each in every export profile."""
    files = {}
    for profile, stored in PROFILES.items():
        files[f"{profile}-all"] = tflite.build(model, TOKENS, "all", stored(model))
        files[f"{profile}-last"] = tflite.build(model, TOKENS, "last", stored(model))
        cached = tflite.build_cached(model, PREFILL, CONTEXT, "last", stored(model))
        files[f"{profile}-cached"] = cached
    return {n: hashlib.sha256(x.to_bytes()).hexdigest() for n, x in files.items()}


def main() -> None:
    found = {}
    for name in NAMES:
        folder = HERE / "integer" / name
        folder.mkdir(parents=True, exist_ok=True)
        model = quantized(name)
        freeze.save(model, folder)
        found[name] = hashes(model)
    (HERE / "integer" / "sha256.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
