"""Form of a file that Arm's compiler vela puts on the NPU as a whole, with the same bits in LiteRT.

It differs from `Integers` where vela stops:

* 4-bit weights lie in INT8 tensors. vela divides by zero on an INT4 tensor; its coder of weights
  makes them small again.
* SQRT, which vela leaves to the CPU, is a GATHER from a table of its output codes.
* A prefill's sums of squares are the diagonal of one product of all rows. Products row by row or
  in blocks (`square_sums`) vela would compute one after the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.graph import Embedding, Graph, Node, Sqrt
from qnpu_jax.integer import IntegerModel
from qnpu_jax.tflite import (
    Emitter,
    Integers,
    ModelWriter,
    TensorType,
    Unpacked,
    add_cached,
    add_op,
    are_squares,
    cached_decoder,
    open_interpreter,
)


def codes_of(kind: TensorType) -> np.ndarray:
    """Returns the input codes of a SQRT, in the order of its table.

    For int16, whose zero point is 0, the codes from 0. For int8 all codes; those of negative
    numbers, which do not occur, are replaced by the code of 0.
    """
    if kind.dtype == "int16":
        return np.arange(2**15, dtype=np.int16)
    return np.maximum(np.arange(-128, 128), kind.zero_point).astype(np.int8)


@dataclass(frozen=True)
class ArmForm(Unpacked):
    """Form like `Unpacked`, with tables in place of SQRT.

    Attributes:
      roots: output of each SQRT for the codes of `codes_of`, by global name of its output. Empty
        where only the weights differ from `Integers`.
    """

    roots: Mapping[str, np.ndarray]


class ArmEmitter(Emitter):
    """Emitter for vela; its `form` is an `ArmForm`."""

    def add(self, node: Node, env: Mapping[str, int]) -> int:
        """Adds an op, SQRT as a GATHER, and returns the tensor that it makes."""
        assert isinstance(self.form, ArmForm)
        table = self.form.roots.get(self.global_name(node.output))
        if table is not None:
            return self._gathered(node, env[node.inputs[0]], table)
        return super().add(node, env)

    def _gathered(self, node: Node, x: int, table: np.ndarray) -> int:
        """Adds table[x], with the codes x as int32, and 128 added to int8 ones."""
        name, shape = self.global_name(node.output), self.graph[node.output].shape
        codes, add = schema.BuiltinOperator, self.subgraph.add_tensor
        source = self.type_of(node.inputs[0])
        narrow = source.dtype == "int8"
        index = add(f"{name}/index", shape, TensorType("int32", source.scale))
        options = schema.CastOptionsT()
        options.inDataType = schema.TensorType.INT8 if narrow else schema.TensorType.INT16
        options.outDataType = schema.TensorType.INT32
        self.subgraph.add_op(codes.CAST, options, [x], [index])
        if narrow:
            half = add(f"{name}/half", (1,), "int32", data=np.asarray([128], np.int32))
            place = add(f"{name}/place", shape, "int32")
            self.subgraph.add_op(codes.ADD, schema.AddOptionsT(), [index, half], [place])
            index = place
        held = add(f"{name}/table", table.shape, self.type_of(node.output), table)
        output = self.tensor(node.output)
        add_op(self.subgraph, Embedding(), [index, held], output)
        return output

    def block(self, node: Node) -> int:
        """Returns the number of all rows, or 1 where only the weights differ from `Integers`."""
        assert isinstance(self.form, ArmForm)
        respelled = self.form.roots and are_squares(self.graph, node)
        return self.graph[node.output].shape[0] if respelled else 1


def build_signature(
    model: IntegerModel, form: ArmForm, tokens: int, context: int, key: str
) -> ModelWriter:
    """Returns a file with one signature of `cached.build_cached`.

    Args:
      tokens: tokens of the signature.
      context: positions after the prefix.
      key: name of the signature.

    Raises:
      UserError: as `cached.build_cached`.
    """
    dec, writer = cached_decoder(model, tokens, context), ModelWriter()
    whole = model.decoder(context)
    add_cached(form, writer.add_subgraph(key), key, dec, whole, ArmEmitter)
    return writer


def arm_form(model: IntegerModel, *, respell: bool = True) -> ArmForm:
    """Returns the form of a model for vela.

    Args:
      respell: replace SQRT and sums of squares; otherwise only the weights differ from `Integers`.
    """
    return ArmForm(model, square_roots(model) if respell else {})


def square_roots(model: IntegerModel) -> dict[str, np.ndarray]:
    """Runs every SQRT of a model on all input codes, in LiteRT's reference kernel.

    So the tables have the kernel's bits, whatever its arithmetic.

    Returns:
      Output codes in the order of `codes_of`, by global name of the SQRT's output.
    """
    form, writer = Integers(model), ModelWriter()
    subgraph = writer.add_subgraph("roots")
    x, y, asked = {}, {}, {}
    for graph, layer, node in _roots(model):
        emitter = Emitter(form, subgraph, graph, layer)
        name = emitter.global_name(node.output)
        kinds = [emitter.type_of(n) for n in (node.inputs[0], node.output)]
        asked[name] = codes_of(kinds[0])
        shape = asked[name].shape
        x[name], y[name] = (subgraph.add_tensor(name, shape, kind) for kind in kinds)
        add_op(subgraph, node.op, [x[name]], y[name])
    subgraph.add_signature("roots", x, y)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roots.tflite"
        writer.write(path)
        runner = open_interpreter(path, "ref").get_signature_runner("roots")
        return runner(**asked)


def _roots(model: IntegerModel) -> Iterator[tuple[Graph, int, Node]]:
    for graph in model.decoder(1).graphs:
        for layer in range(graph.layers):
            for node in graph.nodes:
                if isinstance(node.op, Sqrt):
                    yield graph, layer, node
