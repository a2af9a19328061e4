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
    """A constant that an op of a file has beside the tensors of the graph: codes and one scale."""

    name: str
    codes: np.ndarray
    scale: np.float32

    def add_to(self, subgraph: SubgraphWriter, label: str, *, filled: bool = False) -> int:
        """The tensor `<label>/<name>` in a subgraph, with its contents or as a place for them."""
        data = self.codes if filled else None
        kind = TensorType(DTYPES[8 * self.codes.itemsize], self.scale)
        return subgraph.add_tensor(f"{label}/{self.name}", self.codes.shape, kind, data)


@dataclass(frozen=True, eq=False)
class Composite:
    """Nodes of a graph that a file holds as one op, STABLEHLO_COMPOSITE.

    A compiler that knows its name takes an op of its own; all else, LiteRT's CPU kernels among it,
    runs the nodes, which are a subgraph of the file.

    Attributes:
      nodes: in execution order. Only the last one's output is read elsewhere.
      inputs: what the op reads of the graph, by local name.
      constants: what the nodes read of it beside that, contents by local name.
      operands: of the op alone, after its inputs.
      attributes: what the compiler needs to know.
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
    """How a file holds tensors and ops."""

    def constants(self, graph: Graph, layer: int) -> dict[str, np.ndarray]:
        """Contents of the parameters of a graph in one layer, by local name."""
        ...

    def inputs(self, dec: Decoder) -> dict[str, np.ndarray]:
        """Contents of what all layers share, by local name."""
        ...

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        """Type and quantization of a tensor."""
        ...

    def drops(self, graph: Graph, node: Node, layer: int) -> bool:
        """Whether the op changes nothing and is left out."""
        ...

    def parts(self, graph: Graph) -> Sequence[Node | Composite]:
        """The ops of a graph, in execution order."""
        ...


@dataclass(frozen=True)
class Integers:
    """Codes, scales and zero points as frozen."""

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
    """As `Integers`, with 4-bit codes in INT8 tensors: the same codes, twice the size."""

    @staticmethod
    def differs(model: IntegerModel) -> bool:
        """Whether any weight has 4 bits, so that this is not just as `Integers`."""
        graphs = model.decoder(1).graphs
        return any(4 in t.quant.bits for g in graphs for t in g.tensors)

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        kind = super().tensor_type(graph, layer, name)
        return replace(kind, dtype="int8") if kind.dtype == "int4" else kind


@dataclass(frozen=True)
class UnpackedPrefill(Unpacked):
    """As `Unpacked` where several tokens come at once: products of matrices, which kernels for 8
    bits may compute faster. A single token waits for memory, so its weights stay packed; a file of
    both signatures holds 4-bit weights twice."""

    def tensor_type(self, graph: Graph, layer: int, name: str) -> TensorType:
        first = graph.ids or graph[graph.nodes[0].inputs[0]]
        tokens = first.shape[0]
        return (super() if tokens > 1 else Integers(self.model)).tensor_type(graph, layer, name)


@dataclass(frozen=True)
class Reals:
    """Float32: the frozen weights times their scales, and activations that nothing rounds. What a
    benchmark holds the integers against."""

    params: Mapping[str, np.ndarray]

    @staticmethod
    def of(model: IntegerModel) -> Reals:
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
