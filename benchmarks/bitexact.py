"""The simulator against LiteRT's reference kernels: every tensor of a whole model, per recipe.

For each recipe and length the frozen model is written as a .tflite and run by the interpreter
(BUILTIN_REF) and by the simulator, on real text. `litert_ref` must equal it in every element of
every tensor. `npu`, which has no floating point, is counted against it twice: op by op on the same
inputs, and end to end, where one code that differs early changes most of what follows.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax import corpus, models, pipeline, tflite, verify
from qnpu_jax.config import UserError
from qnpu_jax.freeze import IntegerModel
from qnpu_jax.learn.stages import Text
from qnpu_jax.litert import LiteRT
from qnpu_jax.ops import FullyConnected, Sqrt
from qnpu_jax.recipes import RECIPES, load_recipe
from qnpu_jax.verify import op_names
from sim.run import Program, compile_model, global_name, run, run_op


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="real text; default: pydoc_data.topics")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--quick", action="store_true", help="w8a8, 16 tokens, no prefix")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Row:
    """One model and length: `litert_ref` and `npu` against the interpreter."""

    exact: verify.Comparison
    npu_ops: verify.Comparison
    npu_logits: verify.Comparison


def compare(model: IntegerModel, ids: np.ndarray) -> Row:
    """Both profiles against LiteRT on one window."""
    dec = model.decoder(len(ids))
    ops = op_names(dec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        tflite.write(model, path, len(ids))
        runner = LiteRT(path, "ref", keep_tensors=True)
        runner.run(ids)
        expected = dict(runner.tensors())
    exact, npu = (compile_model(model, dec, profile) for profile in ("litert_ref", "npu"))
    tensors = {n: np.asarray(x) for n, x in run(exact, ids, keep=lambda _: True).items()}
    alone = op_by_op(npu, tensors)
    logits = {"head.logits": np.asarray(run(npu, ids)["head.logits"])}
    return Row(
        verify.compare(expected.items(), tensors, ops),
        verify.compare(((n, tensors[n]) for n in alone), alone, {n: ops[n] for n in alone}),
        verify.compare(logits.items(), tensors, {"head.logits": ops["head.logits"]}),
    )


def op_by_op(program: Program, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the program's FULLY_CONNECTED and SQRT, the ops that profiles differ in, make of given
    inputs."""
    out = {}
    with jax.enable_x64():
        for graph, codes, constants in zip(
            program.decoder.graphs, program.codes, program.constants, strict=True
        ):
            for layer in range(graph.layers):
                for node in graph.nodes:
                    if not isinstance(node.op, FullyConnected | Sqrt):
                        continue
                    x = jnp.asarray(tensors[global_name(graph, layer, node.inputs[0])])
                    inputs = [x, *(codes[layer][n] for n in node.inputs[1:])]
                    y = run_op(graph, node, layer, inputs, constants[layer][node.output])
                    out[global_name(graph, layer, node.output)] = np.asarray(y)
    return out


def largest(comparison: verify.Comparison) -> int:
    return max((d.largest for d in comparison.differences), default=0)


def share(comparison: verify.Comparison) -> float:
    return comparison.differing / comparison.elements


def measure(args: argparse.Namespace) -> int:
    """Prints the table; returns how many elements differ under `litert_ref`."""
    checkpoint = models.load(args.model)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    texts = corpus.read_text(args.text) if args.text else [corpus.default_text()]
    ids = corpus.tokenize(texts, tokenizer, config.vocab_size, str(args.text))
    params = pipeline.prepare(config, checkpoint.params, load_recipe(args.recipes[0]))
    print(
        f"{'recipe':8}{'tokens':>7}{'tensors':>9}{'elements':>12}{'litert_ref':>12}"
        f"{'npu ops':>10}{'largest':>9}{'npu logits':>12}{'largest':>9}{'seconds':>9}"
    )
    total = 0
    for name in args.recipes:
        recipe = dataclasses.replace(load_recipe(name), prefix="none" if args.quick else "auto")
        windows = corpus.windows(ids, 256, 16, "text")
        model = pipeline.quantize(config, params, recipe, Text.of(windows), tokenizer.bos_id).model
        for length in args.lengths:
            start = time.perf_counter()
            row = compare(model, np.asarray(ids[:length], np.int32))
            total += row.exact.differing
            print(
                f"{name:8}{length:7}{row.exact.tensors:9}{row.exact.elements:12}"
                f"{row.exact.differing:12}{share(row.npu_ops):10.4%}{largest(row.npu_ops):9}"
                f"{share(row.npu_logits):12.1%}{largest(row.npu_logits):9}"
                f"{time.perf_counter() - start:9.1f}",
                flush=True,
            )
            for difference in row.exact.differences[:5]:
                print(f"  {difference}")
    return total


def main() -> int:
    args = arguments()
    if args.quick:
        args.recipes, args.lengths = ["w8a8"], [16]
    try:
        differing = measure(args)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"differing elements, simulator (litert_ref) against LiteRT BUILTIN_REF: {differing}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
