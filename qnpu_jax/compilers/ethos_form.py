"""The form of a file that Arm's compiler takes whole: the same model, the same bits in LiteRT, and
other spellings where the compiler stops at ours.

* 4-bit weights lie in INT8 tensors: the compiler divides by zero on an INT4 one, and its own coder
  makes them small again.
* SQRT, which it leaves to the CPU, is a table of its codes and a GATHER.
* A prefill's sums of squares are the diagonal of one product: ours are row by row or in blocks
  (`squares`), which it takes one by one.
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
    """What a SQRT can take, in the order of its table: int16 codes of zero point 0 that are not
    negative; all int8 codes, with those of negative numbers, which cannot come, as that of 0."""
    if kind.dtype == "int16":
        return np.arange(2**15, dtype=np.int16)
    return np.maximum(np.arange(-128, 128), kind.zero_point).astype(np.int8)


@dataclass(frozen=True)
class ArmForm(Unpacked):
    """As `Unpacked`.

    Attributes:
      roots: what each SQRT gives for `codes_of` its input, by the name of its tensor; empty where
        ops keep their spelling.
    """

    roots: Mapping[str, np.ndarray]


class ArmEmitter(Emitter):
    """Emits what Arm's compiler takes; `form` is an `ArmForm`."""

    def add(self, node: Node, env: Mapping[str, int]) -> int:
        assert isinstance(self.form, ArmForm)
        table = self.form.roots.get(self.global_name(node.output))
        if table is not None:
            return self._gathered(node, env[node.inputs[0]], table)
        return super().add(node, env)

    def _gathered(self, node: Node, x: int, table: np.ndarray) -> int:
        """table[x], with x as int32; an int8 x plus 128."""
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
        """All rows at once, or each alone where ops keep their spelling."""
        assert isinstance(self.form, ArmForm)
        respelled = self.form.roots and are_squares(self.graph, node)
        return self.graph[node.output].shape[0] if respelled else 1


def build_signature(
    model: IntegerModel, form: ArmForm, tokens: int, context: int, key: str
) -> ModelWriter:
    """One signature of `cached.write_cached`, alone in its file.

    Raises:
      UserError: as `cached.write_cached`.
    """
    dec, writer = cached_decoder(model, tokens, context), ModelWriter()
    whole = model.decoder(context)
    add_cached(form, writer.add_subgraph(key), key, dec, whole, ArmEmitter)
    return writer


def arm_form(model: IntegerModel, *, respell: bool = True) -> ArmForm:
    """The form of a model; without `respell` only the weights differ from `Integers`."""
    return ArmForm(model, square_roots(model) if respell else {})


def square_roots(model: IntegerModel) -> dict[str, np.ndarray]:
    """What LiteRT's reference kernel gives for every code of every SQRT, by the name of its tensor:
    it is asked, so that a table holds its bits whatever its arithmetic."""
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
