"""Forms of a file: how it holds the tensors and ops of a graph, which the emitter asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from qnpu_jax.graph import Decoder, Graph, Node, Requantize, is_identity, layer_inputs
from qnpu_jax.integer import IntegerModel, dequantize
from qnpu_jax.tflite.flatbuffer import SubgraphWriter
from qnpu_jax.tflite.packing import TensorType

DTYPES: dict[int, Literal["int4", "int8", "int16", "int32", "int64"]] = {
    4: "int4",
    8: "int8",
    16: "int16",
    32: "int32",
    64: "int64",
}


@dataclass(frozen=True, eq=False)
class Operand:
    """Constant of a composite op that no tensor of the graph stands for: codes, and one scale."""

    name: str
    codes: np.ndarray
    scale: np.float32

    def add_to(self, subgraph: SubgraphWriter, label: str, *, filled: bool = False) -> int:
        """Adds the tensor `<label>/<name>`, with contents if `filled`, and returns its index."""
        data = self.codes if filled else None
        kind = TensorType(DTYPES[8 * self.codes.itemsize], self.scale)
        return subgraph.add_tensor(f"{label}/{self.name}", self.codes.shape, kind, data)


@dataclass(frozen=True, eq=False)
class Composite:
    """Nodes of a graph that a file holds as one op, STABLEHLO_COMPOSITE.

    A compiler that knows the name puts an op of its own in its place. Everything else, such as
    LiteRT's CPU kernels, runs the nodes, which the file holds as a subgraph.

    Attributes:
      name: that compilers know, such as `odml.rms_norm`.
      nodes: in execution order. Only the last one's output is read elsewhere.
      inputs: local names of the tensors that the op reads.
      constants: contents of the graph's constants that the nodes read, by local name.
      operands: further inputs of the op, which the nodes do not read.
      attributes: settings of the compiler's op, such as `epsilon`.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]
    operands: tuple[Operand, ...]
    attributes: Mapping[str, float]

    @property
    def output(self) -> str:
        return self.nodes[-1].output


@runtime_checkable
class FileForm(Protocol):
    """Form of a file: what it holds for each tensor and op of a graph."""

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        """Returns contents of a graph's parameters in one layer, by local name."""
        ...

    def inputs(self, dec: Decoder) -> dict[str, np.ndarray]:
        """Returns contents of what layers share (RoPE tables, mask, eps), by shared name
        (`graph.shared_names`)."""
        ...

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        """Returns type and quantization of a tensor, which has a local name."""
        ...

    def drops(self, graph: Graph, node: Node, layer: int) -> bool:
        """Whether an op changes no value, so that the file leaves it out."""
        ...

    def parts(self, graph: Graph) -> Sequence[Node | Composite]:
        """Returns the ops of a graph, in execution order."""
        ...


@dataclass(frozen=True)
class Integers:
    """Form that holds codes, scales and zero points exactly as in the integer model."""

    model: IntegerModel

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        return self.model.constants(graph, layer)

    def inputs(self, dec: Decoder) -> dict[str, np.ndarray]:
        return self.model.inputs(dec)

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        quant = graph[name].quant
        tensor = graph.at(self.model.tensors[graph.prefix + name], layer)
        return TensorType(
            DTYPES[quant.bits[layer]],
            scale=np.asarray(tensor.scale, np.float32)[()],
            zero_point=int(tensor.zero_point),
            axis=quant.axis or 0,
        )

    def drops(self, graph: Graph, node: Node, layer: int) -> bool:
        return is_identity(graph, node, layer)

    def parts(self, graph: Graph) -> Sequence[Node | Composite]:
        return graph.nodes


@dataclass(frozen=True)
class Unpacked(Integers):
    """Form like `Integers`, with 4-bit codes in INT8 tensors: the same codes, twice the bytes."""

    @staticmethod
    def differs(model: IntegerModel) -> bool:
        """Whether any tensor of the model has 4 bits: only then the file is not that of
        `Integers`."""
        graphs = model.decoder(1).graphs
        return any(4 in t.quant.bits for g in graphs for t in g.tensors)

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        kind = super().tensor_type(graph, layer, name)
        return replace(kind, dtype="int8") if kind.dtype == "int4" else kind


@dataclass(frozen=True)
class UnpackedPrefill(Unpacked):
    """Form like `Unpacked` in prefills, like `Integers` in single steps.

    A prefill multiplies matrices, which int8 kernels may do faster. A single step waits for memory,
    so its weights stay packed. A file with both signatures holds 4-bit weights twice.
    """

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        first = graph.ids or graph[graph.nodes[0].inputs[0]]
        tokens = first.shape[0]
        return (super() if tokens > 1 else Integers(self.model)).tensor_type(graph, layer, name)


@dataclass(frozen=True)
class Reals:
    """Float32 form: the dequantized weights, and activations that nothing rounds.

    Benchmarks measure integers against it.

    Attributes:
      params: real values of the parameters, by global name, stacked over layers.
    """

    params: Mapping[str, np.ndarray]

    @staticmethod
    def of(model: IntegerModel) -> Reals:
        """Returns the float32 form of an integer model."""
        return Reals(dequantize(model))

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        names = {t.name: graph.prefix + t.name for t in graph.named("param")}
        return {n: graph.at(self.params[whole], layer) for n, whole in names.items()}

    def inputs(self, dec: Decoder) -> dict[str, np.ndarray]:
        return layer_inputs(dec)

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        return TensorType("float32")

    def drops(self, graph: Graph, node: Node, layer: int) -> bool:
        return isinstance(node.op, Requantize)

    def parts(self, graph: Graph) -> Sequence[Node | Composite]:
        return graph.nodes
