"""The forms of a file that a user chooses from, by the names of the option `--profile`.

A form decides how weights lie in the file and which of an NPU's own ops it asks for. Codes and
scales are the same in all forms, and on LiteRT's CPU kernels all give the same bits.

No form has linears of 8-bit inputs with 16-bit outputs: Qualcomm's compiler has no such
FULLY_CONNECTED, CONV_2D or BATCH_MATMUL (benchmarks/README.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from qnpu_jax.choices import FormName
from qnpu_jax.graph import Graph, Node
from qnpu_jax.tflite.forms import Composite, Integers, Operand, UnpackedPrefill

RMS_NORM = "odml.rms_norm"
GAMMA_CODE = 2**14
"""Code of gamma, int16 because Hexagon's op takes no narrower one. A power of two, so that the code
times its float32 scale has no rounding beyond that of the scale."""


@dataclass(frozen=True)
class NormsTogether(Integers):
    """Form in which each norm is one composite op, `odml.rms_norm`.

        rms_norm(x, gamma) = gamma x / sqrt(mean(x^2) + epsilon)

    Folding has moved the learned gains into the weights, or into a MUL that follows:
    gamma = 1 / sqrt(D) for all D channels.

    Reference: google-ai-edge/LiteRT, litert/vendors/qualcomm/core/builders/rms_norm_op_builder.cc.
    """

    def parts(self, graph: Graph) -> Sequence[Node | Composite]:
        return [*self._parts(graph)]

    def _parts(self, graph: Graph) -> Iterator[Node | Composite]:
        for norm, group in groupby(graph.nodes, lambda node: _scope(node.output)):
            nodes = tuple(group)
            if norm is None:
                yield from nodes
            else:
                yield self._composite(graph, nodes)

    def _composite(self, graph: Graph, nodes: tuple[Node, ...]) -> Composite:
        size = graph[nodes[-1].output].shape[-1]
        gamma = np.full(size, GAMMA_CODE, np.int16)
        made = {node.output for node in nodes}
        shared = self.model.inputs(self.model.decoder(1))  # D eps is one of them
        read = dict.fromkeys(n for node in nodes for n in node.inputs if n not in made)
        return Composite(
            RMS_NORM,
            nodes,
            inputs=tuple(n for n in read if n not in shared),
            constants={n: shared[n] for n in read if n in shared},
            operands=(Operand("gamma", gamma, np.float32(1 / (GAMMA_CODE * size**0.5))),),
            attributes={"epsilon": self.model.config.rms_norm_eps},
        )


def _scope(name: str) -> str | None:
    """Returns the norm that a tensor belongs to, the part of its name up to `norm.`; None without
    one."""
    found = re.match(r"(?:.*\.)?norm\.", name)
    return found and found[0]


FORMS: dict[FormName, type[Integers]] = {
    "plain": Integers,
    "unpacked": UnpackedPrefill,
    "hexagon": NormsTogether,
}
"""Form of each name. `plain` packs 4-bit weights two to a byte. `unpacked` gives each a byte in
prefills, which is faster on CPUs with AMX: for static activations, XNNPACK has AMX kernels for int8
weights only. In `hexagon` 16-bit norms are the NPU's own op."""
HEXAGON_FORM: FormName = "hexagon"
"""Form that is compiled for Hexagon by default."""
