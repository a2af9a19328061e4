"""Graphs of a decoder added to a subgraph of a .tflite, layers unrolled.

Each op of a graph becomes a LiteRT operator. Tensors get their global names (`layers.3.attn.q`) and
keep scales and zero points to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from qnpu_jax.graph import Decoder, Graph, Node, select_shared
from qnpu_jax.tflite.flatbuffer import SubgraphWriter
from qnpu_jax.tflite.forms import Composite, FileForm
from qnpu_jax.tflite.operators import add_op
from qnpu_jax.tflite.packing import TensorType
from qnpu_jax.tflite.square_sums import add_diagonals, are_squares, block_size


def emit(
    emitter: Callable[[Graph, int], Emitter],
    dec: Decoder,
    ids: int,
    shared: Mapping[str, int],
    caches: Sequence[Mapping[str, int]],
    *,
    head: bool = True,
) -> tuple[int, list[list[int]]]:
    """Adds a decoder's graphs to a subgraph, layers unrolled.

    Args:
      emitter: makes the emitter of a graph and layer.
      ids: tensor of the token ids.
      shared: tensors that layers share (RoPE rows, mask, eps), by shared name
        (`graph.shared_names`).
      caches: for each layer its tensors of cached keys and values, by local name.
      head: False leaves the head out.

    Returns:
      The tensor that the last graph makes (the logits with the head), and for each layer its new
      rows of keys and values.
    """
    values, out, rows = {"ids": ids}, ids, []
    for graph in dec.graphs if head else dec.graphs[:-1]:
        for layer in range(graph.layers):
            own = caches[layer] if graph.layered else {}
            inputs = {**values, **select_shared(dec, graph, shared, layer), **own}
            env = emitter(graph, layer).emit(inputs)
            out = env[graph.outputs[0]]
            values = {"input.residual": out}
            if graph.layered:
                rows.append([env[name] for name in graph.outputs[1:]])
    return out, rows


class Emitter:
    """Emits one graph, for one layer, into a subgraph."""

    def __init__(self, form: FileForm, subgraph: SubgraphWriter, graph: Graph, layer: int) -> None:
        self.form, self.subgraph, self.graph, self.layer = form, subgraph, graph, layer

    def emit(self, env: Mapping[str, int]) -> dict[str, int]:
        """Adds the constants and ops of the graph.

        Args:
          env: tensor indices of the graph's inputs, by local name.

        Returns:
          Tensor indices of everything, by local name.
        """
        env = dict(env)
        for name, contents in self.form.constants(self.graph, self.layer).items():
            env[name] = self.tensor(name, contents)
        return self.run(self.form.parts(self.graph), env)

    def run(self, parts: Iterable[Node | Composite], env: Mapping[str, int]) -> dict[str, int]:
        """Adds ops and returns `env` with the tensors that they make."""
        env = dict(env)
        for part in parts:
            if isinstance(part, Composite):
                env[part.output] = self.wrap(part, env)
            elif self.form.drops(self.graph, part, self.layer):
                env[part.output] = env[part.inputs[0]]
            else:
                env[part.output] = self.add(part, env)
        return env

    def wrap(self, part: Composite, env: Mapping[str, int]) -> int:
        """Adds a composite, and its nodes as a subgraph of their own.

        Returns:
          The tensor that the composite makes.
        """
        label = self.global_name(part.output)
        inner = Emitter(self.form, self.subgraph.sibling(label), self.graph, self.layer)
        known = {name: inner.tensor(name) for name in part.inputs}
        fed = [*known.values(), *(x.add_to(inner.subgraph, label) for x in part.operands)]
        constants = {name: inner.tensor(name, x) for name, x in part.constants.items()}
        made = inner.run(part.nodes, known | constants)
        inner.subgraph.finish(fed, [made[part.output]])
        output = self.tensor(part.output)
        options = schema.StableHLOCompositeOptionsT()
        options.name, options.version = part.name, 1
        options.decompositionSubgraphIndex = inner.subgraph.index
        options.compositeAttributes = list(flexbuffers.Dumps(dict(part.attributes)))
        operands = [x.add_to(self.subgraph, label, filled=True) for x in part.operands]
        inputs = [*(env[name] for name in known), *operands]
        code = schema.BuiltinOperator.STABLEHLO_COMPOSITE
        self.subgraph.add_op(code, options, inputs, [output])
        return output

    def add(self, node: Node, env: Mapping[str, int]) -> int:
        """Adds an op and returns the tensor that it makes."""
        output = self.tensor(node.output)
        if (block := self.block(node)) > 1:
            type_x, type_y = (self.type_of(n) for n in (node.inputs[0], node.output))
            add_diagonals(self.subgraph, env[node.inputs[0]], output, block, type_x, type_y)
            return output
        add_op(self.subgraph, node.op, [env[n] for n in node.inputs], output)
        return output

    def block(self, node: Node) -> int:
        """Returns how many rows a sum of squares multiplies at a time (`square_sums`).

        1 for other ops, and for int16 rows: LiteRT's int16 kernel does not pack its operands, so a
        block would only cost more products.
        """
        if not are_squares(self.graph, node):
            return 1
        if self.type_of(node.inputs[0]).dtype == "int16":
            return 1
        return block_size(self.graph[node.output].shape[0])

    def tensor(self, name: str, data: np.ndarray | None = None, label: str | None = None) -> int:
        """Adds a tensor of the graph and returns its index.

        Args:
          name: local name, which decides shape and type.
          data: constant contents; None for an activation.
          label: name in the file; None takes the global name.
        """
        shape = self.graph[name].shape
        return self.subgraph.add_tensor(
            label or self.global_name(name), shape, self.type_of(name), data
        )

    def type_of(self, name: str) -> TensorType:
        """Type and quantization that the file's form gives a tensor, by local name."""
        return self.form.tensor_type(self.graph, self.layer, name)

    def global_name(self, name: str) -> str:
        """Global name of a tensor: `attn.q` in layer 3 is `layers.3.attn.q`."""
        return self.graph.global_name(self.layer, name)
