"""The simulator against LiteRT's three kernel sets: every tensor of a whole model.

Each model is written as a .tflite and run on real text by the interpreter, with the reference
kernels, the optimized ones and XNNPACK, on one thread and on two; the profile of that name must
equal it in every element of every tensor. Tensors are kept for that, which cuts what XNNPACK takes
into single ops: its logits are compared a second time from a run as an application has it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import outcome
from sim_speed import MODEL, quantize

from qnpu_jax.integer import storage
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.models.checkpoint import load
from qnpu_jax.proof import comparison
from qnpu_jax.text import files
from qnpu_jax.tflite import writer
from qnpu_jax.tflite.interpreter import KernelSet, LiteRT
from qnpu_sim.program import compile_model, run
from qnpu_sim.rounding import ProfileName

KERNELS: dict[ProfileName, KernelSet] = {
    "litert_ref": "ref",
    "litert_opt": "opt",
    "litert_xnn": "xnn",
}
RECIPES = ["w8a8", "w4a8", "w8a16", "w4a16"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=RECIPES, help="recipes, or folders of `qnpu quantize`"
    )
    parser.add_argument("--text", type=Path, help="real text; default: pydoc_data.topics")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="w8a8, 16 tokens, no prefix")
    args = parser.parse_args()
    if args.quick:
        args.models, args.tokens = ["w8a8"], 16
    return args


def integers(names: list[str], quick: bool) -> Iterator[tuple[str, IntegerModel]]:
    """Each model by name, one at a time: folders as they are, recipes with little calibration."""
    for name in names:
        if Path(name).is_dir():
            yield Path(name).name, storage.load(Path(name))
        else:
            yield name, quantize([name], quick)[0][name]


def real_text(path: Path | None, tokens: int) -> np.ndarray:
    """The first token ids of a text: (tokens,) int32."""
    checkpoint = load(MODEL)
    texts = files.read_text(path) if path else [files.default_text()]
    ids = files.tokenize(texts, checkpoint.tokenizer, checkpoint.config.vocab_size, str(path))
    return np.asarray(ids[:tokens], np.int32)


@dataclass
class Row:
    """One model, kernel set and number of threads."""

    model: str
    profile: str
    threads: int
    tensors: comparison.Comparison
    logits: int
    seconds: float
    differing: int = field(init=False)

    def __post_init__(self) -> None:
        self.differing = self.tensors.differing + self.logits

    def __str__(self) -> str:
        t = self.tensors
        return (
            f"{self.model:16}{self.profile:12}{self.threads:8}{t.tensors:9}{t.elements:13}"
            f"{t.differing:10}{self.logits:8}{self.seconds:9.1f}"
        )


def compare(name: str, model: IntegerModel, ids: np.ndarray, threads: list[int]) -> Iterator[Row]:
    """Every kernel set on one window."""
    dec = model.decoder(len(ids))
    ops = comparison.op_names(dec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        writer.write_prefill(model, path, len(ids))
        for profile, kernels in KERNELS.items():
            program = compile_model(model, dec, profile)
            got = {n: np.asarray(x) for n, x in run(program, ids, keep=lambda _: True).items()}
            for count in threads:
                start = time.perf_counter()
                runner = LiteRT(path, kernels, keep_tensors=True, threads=count)
                runner.run(ids)
                tensors = comparison.compare_tensors(runner.tensors(), got, ops)
                del runner
                plain = LiteRT(path, kernels, threads=count).run(ids)
                differing = int(np.count_nonzero(plain != got["head.logits"]))
                seconds = time.perf_counter() - start
                yield Row(name, profile, count, tensors, differing, seconds)


def measure(args: argparse.Namespace) -> list[Row]:
    """Prints the table row by row; returns the exit status."""
    ids = real_text(args.text, args.tokens)
    print(
        f"{'model':16}{'profile':12}{'threads':>8}{'tensors':>9}{'elements':>13}{'differing':>10}"
        f"{'logits':>8}{'seconds':>9}"
    )
    rows: list[Row] = []
    for name, model in integers(args.models, args.quick):
        for row in compare(name, model, ids, args.threads):
            rows.append(row)
            print(row, flush=True)
            for difference in row.tensors.differences[:5]:
                print(f"  {difference}")
    return rows


def measured(args: argparse.Namespace) -> int:
    rows = measure(args)
    total = sum(r.differing for r in rows)
    elements = sum(r.tensors.elements for r in rows)
    print(f"differing elements, simulator against LiteRT: {total} of {elements}")
    return 1 if total else 0


def main() -> int:
    args = arguments()
    return outcome.status(lambda: measured(args))


if __name__ == "__main__":
    sys.exit(main())
