"""Single-op models and the interpreter that runs them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from qnpu_jax.tflite.flatbuffer import ModelWriter
from qnpu_jax.tflite.interpreter import RESOLVERS, KernelSet
from qnpu_jax.tflite.packing import TensorType


@dataclass(frozen=True)
class Tensor:
    """Codes (an array), or only a shape (an output), and their quantization.

    `constant` puts the codes in the file; the others are fed.
    """

    dtype: Any
    data: Any = None
    scale: Any = None
    zero_point: int = 0
    constant: bool = False
    shape: tuple[int, ...] = ()

    @property
    def kind(self) -> TensorType:
        return TensorType(self.dtype, self.scale, self.zero_point)


def single_op(code: int, options: Any, inputs: list[Tensor], output: Tensor) -> ModelWriter:
    """A model of one operator with the signature `op`: inputs x0, x1..., output y."""
    writer = ModelWriter()
    graph = writer.add_subgraph("main")
    indices, feeds = [], {}
    for i, t in enumerate(inputs):
        data = t.data if t.constant else None
        indices.append(graph.add_tensor(f"x{i}", t.data.shape, t.kind, data))
        if not t.constant:
            feeds[f"x{i}"] = indices[-1]
    y = graph.add_tensor("y", output.shape, output.kind)
    graph.add_op(code, options, indices, [y])
    graph.add_signature("op", feeds, {"y": y})
    return writer


def interpret(
    model: bytes | str, feeds: dict[str, np.ndarray], kernels: KernelSet = "ref"
) -> np.ndarray:
    """The output of signature `op` under one of LiteRT's kernel sets."""
    content, path = (model, None) if isinstance(model, bytes) else (None, model)
    interpreter = Interpreter(
        model_path=path,
        model_content=content,
        experimental_op_resolver_type=RESOLVERS[kernels],
    )
    return interpreter.get_signature_runner("op")(**feeds)["y"]


def run_op(
    code: int, options: Any, inputs: list[Tensor], output: Tensor, kernels: KernelSet = "ref"
) -> np.ndarray:
    feeds = {f"x{i}": t.data for i, t in enumerate(inputs) if not t.constant}
    return interpret(single_op(code, options, inputs, output).to_bytes(), feeds, kernels)
