"""TensorFlow's own full-integer conversion of the same float decoder: what a user has without qnpu.

The float decoder of a checkpoint (graphs of `qnpu_jax.graph`, norms folded, optionally rotated and
with the prefix that qnpu finds) is a `tf.function`, converted by `tf.lite.TFLiteConverter` with a
representative dataset: int8 (`TFLITE_BUILTINS_INT8`) and int16x8 (16-bit activations, 8-bit
weights). Each file is run by TensorFlow's interpreter on held-out text. A row gives perplexity
beside float, the file's size and float tensors, and what the converter or the interpreter refused.

Needs the extra `tensorflow`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import outcome

from qnpu_jax import extras, models, pipeline
from qnpu_jax.graph import decoder as stage_decoder
from qnpu_jax.graph.decoder import Decoder
from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.layered import Params, local
from qnpu_jax.graph.ops import (
    Add,
    AddMask,
    BatchMatmul,
    Concat,
    Embedding,
    FullyConnected,
    Gelu,
    Keep,
    Logistic,
    Mul,
    Op,
    Requantize,
    Reshape,
    Rsqrt,
    Slice,
    Softmax,
    Sqrt,
    Transpose,
)
from qnpu_jax.graph.shared_inputs import layer_inputs
from qnpu_jax.graph.shared_names import select_shared
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text import excerpts, starts_of
from qnpu_jax.transform import add_prefix, find_prefix

Widths = Literal["int8", "int16x8"]


@dataclass
class Row:
    """One conversion.

    Attributes:
      seconds: of the conversion, calibration included.
      floats: float tensors in the file: what the converter left in float.
      perplexity: of the file, None where it did not convert or run.
      refused: first line of what TensorFlow said, empty where all went well.
    """

    model: str
    widths: str
    float_perplexity: float
    seconds: float = 0.0
    megabytes: float = 0.0
    floats: int = 0
    perplexity: float | None = None
    refused: str = ""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="held-out text; default: pydoc_data.topics")
    parser.add_argument("--calibration", type=Path, help="default: the model writes its own")
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--windows", type=int, default=16, help="scored")
    parser.add_argument("--samples", type=int, default=32, help="of the representative dataset")
    parser.add_argument("--widths", nargs="+", default=["int8", "int16x8"])
    parser.add_argument("--models", nargs="+", default=["plain", "prepared"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def tf_op(tf: Any, op: Op, *x: Any) -> Any:
    """The op in TensorFlow, as `qnpu_jax.graph.ops.eval_op` is in JAX."""
    match op:
        case Embedding():
            return tf.gather(x[1], x[0])
        case FullyConnected():
            return tf.matmul(x[0], x[1], transpose_b=True) + x[2]
        case BatchMatmul(adj_y=adj_y):
            return tf.matmul(x[0], x[1], transpose_b=adj_y)
        case Add() | AddMask():
            return x[0] + x[1]
        case Mul() | Keep():
            return x[0] * x[1]
        case Requantize():
            return x[0]
        case Softmax():
            return tf.nn.softmax(x[0])
        case Logistic():
            return tf.sigmoid(x[0])
        case Gelu():
            return tf.nn.gelu(x[0], approximate=True)
        case Sqrt():
            return tf.sqrt(x[0])
        case Rsqrt():
            return tf.math.rsqrt(x[0])
        case Reshape(shape=shape):
            return tf.reshape(x[0], shape)
        case Transpose(perm=perm):
            return tf.transpose(x[0], perm)
        case Slice(begin=begin, size=size):
            return tf.slice(x[0], begin, size)
        case Concat(axis=axis):
            return tf.concat(x, axis)
        case _:
            assert_never(op)


def run_graph(tf: Any, graph: Graph, values: dict[str, Any]) -> dict[str, Any]:
    env = dict(values)
    for node in graph.nodes:
        env[node.output] = tf_op(tf, node.op, *(env[name] for name in node.inputs))
    return env


def tf_decoder(tf: Any, dec: Decoder, params: Params) -> Any:
    """`tf.function`: ids (T,) int32 to logits (T, V), layers unrolled, parameters as constants."""
    shared = {name: tf.constant(x) for name, x in layer_inputs(dec).items()}

    def forward(ids: Any) -> Any:
        values: dict[str, Any] = {"ids": ids}
        for graph in dec.graphs:
            whole = {n: np.asarray(x) for n, x in local(params, graph.prefix).items()}
            for layer in range(graph.layers):
                own = {n: tf.constant(x) for n, x in graph.at(whole, layer).items()}
                tables = select_shared(dec, graph, shared, layer)
                env = run_graph(tf, graph, values | tables | own)
                values = {"input.residual": env[graph.outputs[0]]}
        return tf.identity(env[graph.outputs[0]], "logits")

    ids = tf.TensorSpec((dec.tokens,), tf.int32, "ids")
    return tf.function(forward, [ids], autograph=False)


def converted(tf: Any, function: Any, samples: np.ndarray, widths: Widths) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([ids.astype(np.int32)] for ids in samples)
    sets = tf.lite.OpsSet
    int16x8 = sets.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
    chosen = sets.TFLITE_BUILTINS_INT8 if widths == "int8" else int16x8
    converter.target_spec.supported_ops = [chosen]
    return converter.convert()


def perplexity(logits: Any, windows: np.ndarray) -> float:
    """exp of the mean -log p(next token); `logits` takes ids (T,) and gives (T, V)."""
    total = 0.0
    for ids in windows:
        z = np.asarray(logits(ids), np.float64)[:-1]
        z -= z.max(axis=1, keepdims=True)
        total += float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), ids[1:]]).sum())
    return float(np.exp(total / (windows.shape[0] * (windows.shape[1] - 1))))


def run_file(tf: Any, content: bytes, windows: np.ndarray) -> tuple[int, float]:
    """Float tensors of a file, and its perplexity in TensorFlow's interpreter."""
    interpreter = tf.lite.Interpreter(model_content=content)
    floats = sum(d["dtype"] == np.float32 for d in interpreter.get_tensor_details())
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero = target["quantization"]

    def logits(ids: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(source["index"], ids.astype(source["dtype"]))
        interpreter.invoke()
        codes = interpreter.get_tensor(target["index"]).astype(np.float64)
        return (codes - zero) * scale if scale else codes

    return floats, perplexity(logits, windows)


def prepared(checkpoint: models.Checkpoint, kind: str, windows: np.ndarray) -> tuple[Params, int]:
    """Parameters and length of the prefix: `plain` is folded only, `prepared` also rotated, with
    the prefix that qnpu finds."""
    config, recipe = checkpoint.config, RECIPES["w8a8" if kind == "prepared" else "rtn-minmax-w8a8"]
    params = pipeline.prepare(config, checkpoint.params, recipe)
    if kind == "plain":
        return params, 0
    starts = starts_of(checkpoint.tokenizer)
    found = find_prefix(config, recipe.bits, params, (windows,), starts, recipe.max_prefix)
    return add_prefix(config, recipe.bits, params, found.tokens), len(found.tokens)


def row(tf: Any, kind: str, widths: Widths, function: Any, texts: dict[str, np.ndarray]) -> Row:
    made = Row(kind, widths, perplexity(function, texts["scored"]))
    start = time.perf_counter()
    try:
        content = converted(tf, function, texts["calibration"], widths)
        made.seconds, made.megabytes = time.perf_counter() - start, len(content) / 1e6
        made.floats, made.perplexity = run_file(tf, content, texts["scored"])
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        made.seconds = made.seconds or time.perf_counter() - start
        made.refused = str(error).strip().splitlines()[0][:300]
    return made


def measure() -> int:
    args = arguments()
    extras.check("tensorflow", "2.21", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    checkpoint = models.load(args.model)
    read = (checkpoint.tokenizer, checkpoint.config.vocab_size)
    scored = excerpts.tokenized(args.text, *read).first(args.tokens, args.windows * args.tokens)
    rows = []
    for kind in args.models:
        recipe = RECIPES["w8a8"]
        if args.calibration:
            given = excerpts.tokenized(args.calibration, *read)
            windows = given.first(args.tokens, args.samples * args.tokens).windows
        else:
            folded = pipeline.prepare(checkpoint.config, checkpoint.params, recipe)
            windows = (
                excerpts.written(checkpoint, folded, recipe, None, lambda steps, length: steps)[0]
                .windows.reshape(-1)[: args.samples * args.tokens]
                .reshape(-1, args.tokens)
            )
        params, prefix = prepared(checkpoint, kind, windows)
        dec = stage_decoder(checkpoint.config, recipe.bits, args.tokens, prefix)
        function = tf_decoder(tf, dec, params)
        texts = {"scored": scored.windows, "calibration": windows}
        for widths in args.widths:
            rows.append(row(tf, kind, widths, function, texts))
            print(json.dumps(asdict(rows[-1])), flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(outcome.status(measure))
