"""Makes the golden integer models and the hashes of the files that the writer makes of them.

They pin numbers: a move of code shows that it moved no bit. Run it again only where numbers are
meant to change, and say why:

    PYTHONPATH=.:sim:tests python tests/golden/make_integer.py

For each recipe: integer/<recipe>/integer_model.{safetensors,json}, and in integer/sha256.json the
hash of the .tflite of every form of export. Integers and float32 scales are stored, so the hashes
depend on no processor's float arithmetic.
"""

from __future__ import annotations

import json

import test_same_bytes as pinned

from qnpu_jax.integer import storage

NAMES = ("w8a8", "w4a8", "w4a16", "w8a8i8")


def main() -> None:
    found = {}
    for name in NAMES:
        folder = pinned.FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        model = pinned.quantized(name)
        storage.save(model, folder)
        found[name] = {n: pinned.digest(x.to_bytes()) for n, x in pinned.forms(model).items()}
    (pinned.FOLDER / "sha256.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
