"""Differences between the Hexagon emulator and the simulator: op by op on the same inputs, whole
layers beside float, and the perplexity of the whole model.

The two differ by design, because the hardware rounds in its own ways. This module measures by how
much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qnpu_jax.compilers.hexagon_emulator import EmulatedSignature
from qnpu_jax.fakequant import evaluate
from qnpu_jax.graph import (
    Concat,
    Decoder,
    Graph,
    Node,
    Reshape,
    Slice,
    Transpose,
    is_identity,
    local,
    select_shared,
)
from qnpu_jax.integer import IntegerModel, dequantize
from qnpu_jax.tflite import Composite, Emitter, FileForm, Integers, ModelWriter

LAYER = "layer"
"""Name of the signature of `build_layer`."""
TensorCodes = Mapping[str, np.ndarray]
"""Integer codes of tensors, by name."""


@dataclass(frozen=True)
class OpDifference:
    """One op on the simulator's inputs, emulator against simulator.

    Attributes:
      op: name, and bits of its inputs and output (`FullyConnected 8x4>8`).
      tensor: global name of its output.
      count: number of elements that differ.
      size: number of elements.
      largest: largest absolute difference, in codes.
      shift: mean difference, emulator less simulator, in codes.
    """

    op: str
    tensor: str
    count: int
    size: int
    largest: int
    shift: float


@dataclass(frozen=True)
class LayerDifference:
    """One layer on the simulator's inputs, emulator and simulator against float.

    Compared is what the layer adds to the residual stream, d = output - input, in real values.

    Attributes:
      simulator, emulator: |d - d_float| / |d_float| of each.
      between: |d_emulator - d_simulator| / |d_float|.
    """

    layer: int
    simulator: float
    emulator: float
    between: float


@dataclass(frozen=True)
class TextDifference:
    """The whole model on windows of text of one length.

    Attributes:
      simulator, emulator: perplexity of each window.
      differing: fraction of the logits' codes that differ.
    """

    simulator: tuple[float, ...]
    emulator: tuple[float, ...]
    differing: float

    @property
    def ratio(self) -> float:
        """Perplexity of all windows together, the emulator's over the simulator's."""
        return float(np.exp(np.mean(self._logs)))

    @property
    def error(self) -> float:
        """Standard error of the ratio's logarithm, for independent windows; nan for one window."""
        count = len(self.simulator)
        return float(np.std(self._logs, ddof=1) / count**0.5) if count > 1 else math.nan

    def __str__(self) -> str:
        whole = (float(np.exp(np.mean(np.log(x)))) for x in (self.simulator, self.emulator))
        simulator, emulator = (f"{x:.2f}" for x in whole)
        sure = "" if math.isnan(self.error) else f", standard error {100 * self.error:.2f}%"
        return (
            f"simulator {simulator}, emulator {emulator} ({100 * (self.ratio - 1):+.2f}%{sure});"
            f" {100 * self.differing:.1f}% of the logits' codes differ"
        )

    @property
    def _logs(self) -> np.ndarray:
        return np.log(self.emulator) - np.log(self.simulator)


def build_ops(model: IntegerModel, dec: Decoder, layer: int) -> ModelWriter:
    """Returns a file with each op of a layer that computes as a signature of its own.

    The signature `op_<i>` is the layer's op number i. Activations are its inputs.
    """
    form, writer, graph = Integers(model), ModelWriter(), dec.layer
    constants = form.constants(graph, layer)
    for i, node in computing(graph, layer):
        emitter = Emitter(form, writer.add_subgraph(f"op_{i}"), graph, layer)
        env = {n: emitter.tensor(n, constants.get(n)) for n in dict.fromkeys(node.inputs)}
        fed = {_port(n): env[n] for n in env if n not in constants}
        emitter.subgraph.add_signature(f"op_{i}", fed, {"y": emitter.add(node, env)})
    return writer


def build_layer(form: FileForm, dec: Decoder, layer: int) -> ModelWriter:
    """Returns a file with a whole layer as the signature LAYER.

    Its inputs are those of the graph that ops of the file read.
    """
    writer, graph = ModelWriter(), dec.layer
    emitter = Emitter(form, writer.add_subgraph(LAYER), graph, layer)
    inside = {n for p in form.parts(graph) if isinstance(p, Composite) for n in p.constants}
    names = [t.name for t in graph.named("input") if t.name not in inside]
    env = {name: emitter.tensor(name) for name in names}
    made = emitter.emit(env)
    outputs = {_port(n): made[n] for n in graph.outputs}
    emitter.subgraph.add_signature(LAYER, {_port(n): i for n, i in env.items()}, outputs)
    return writer


def computing(graph: Graph, layer: int) -> Iterator[tuple[int, Node]]:
    """Yields the ops that do more than move codes, with their numbers in the layer."""
    for i, node in enumerate(graph.nodes):
        moves = isinstance(node.op, Reshape | Transpose | Slice | Concat)
        if not moves and not is_identity(graph, node, layer):
            yield i, node


def op_differences(
    compiled: Path, model: IntegerModel, dec: Decoder, layer: int, tensors: TensorCodes
) -> Iterator[OpDifference]:
    """Runs the ops of a layer in the emulator one by one, and compares each output.

    Args:
      compiled: file of `build_ops`, compiled.
      tensors: the simulator's codes, by global name.
    """
    graph = dec.layer
    values = layer_values(model, dec, layer, tensors)
    for i, node in computing(graph, layer):
        emulated = EmulatedSignature(compiled, f"op_{i}")
        fed = {p.name: values[_local_name(graph, p.name)] for p in emulated.signature.inputs}
        expected = values[node.output].astype(np.int64)
        off = emulated.run(fed)["y"].astype(np.int64) - expected
        yield OpDifference(
            _kind(graph, node, layer),
            f"layers.{layer}.{node.output}",
            int(np.count_nonzero(off)),
            off.size,
            int(np.abs(off).max()),
            float(off.mean()),
        )


def layer_difference(
    compiled: Path, model: IntegerModel, dec: Decoder, layer: int, tensors: TensorCodes
) -> LayerDifference:
    """Runs a whole layer in the emulator and in float, and compares them and the simulator.

    The float layer has the dequantized weights and rounds no activation.

    Args:
      compiled: file of `build_layer`, compiled.
      tensors: the simulator's codes, by global name.
    """
    graph = dec.layer
    values = layer_values(model, dec, layer, tensors)
    emulated = EmulatedSignature(compiled, LAYER)
    fed = {p.name: values[_local_name(graph, p.name)] for p in emulated.signature.inputs}
    out = graph.outputs[0]
    codes = {
        "simulator": values[out],
        "emulator": emulated.run(fed)[_port(out)],
    }
    real = {t.name: _real(model, graph, t.name, layer, values) for t in graph.named("input")}
    params = {n: jnp.asarray(x[layer]) for n, x in local(dequantize(model), "layers.").items()}
    exact = evaluate(graph, {**params, **{n: jnp.asarray(x) for n, x in real.items()}})
    before = real["input.residual"]
    added = np.asarray(exact[out]) - before
    got = {n: _real(model, graph, out, layer, {out: x}) - before for n, x in codes.items()}
    errors = {n: float(np.linalg.norm(x - added)) for n, x in got.items()}
    between = float(np.linalg.norm(got["emulator"] - got["simulator"]))
    size = float(np.linalg.norm(added))
    return LayerDifference(
        layer, errors["simulator"] / size, errors["emulator"] / size, between / size
    )


def layer_values(
    model: IntegerModel, dec: Decoder, layer: int, tensors: TensorCodes
) -> dict[str, Any]:
    """Returns codes of a layer's inputs and activations, by local name."""
    graph, head = dec.layer, f"layers.{layer}."
    values = {n.removeprefix(head): x for n, x in tensors.items() if n.startswith(head)}
    before = f"layers.{layer - 1}.{graph.outputs[0]}" if layer else dec.embed.outputs[0]
    source = before if layer else f"embed.{before}"
    shared = select_shared(dec, graph, model.inputs(dec), layer)
    return {**shared, **values, "input.residual": tensors[source]}


def _real(
    model: IntegerModel, graph: Graph, name: str, layer: int, values: TensorCodes
) -> np.ndarray:
    """Returns scale (code - zero_point) of a layer's tensor."""
    tensor = graph.at(model.tensors[graph.prefix + name], layer)
    centred = values[name].astype(np.int64) - tensor.zero_point
    return (centred * np.float64(tensor.scale)).astype(np.float32)


def _port(name: str) -> str:
    return name.replace(".", "_")


def _local_name(graph: Graph, port: str) -> str:
    return next(t.name for t in graph.tensors if _port(t.name) == port)


def _kind(graph: Graph, node: Node, layer: int) -> str:
    bits = [q.bits[layer] for n in node.inputs[:2] if (q := graph[n].quant) is not None]
    out = graph[node.output].quant
    assert out is not None
    return f"{type(node.op).__name__} {'x'.join(map(str, bits))}>{out.bits[layer]}"
