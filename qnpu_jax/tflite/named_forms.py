"""Export profiles: which ops of an NPU's own a file asks for, and how it stores weights. Codes and
scales stay the same, and the file runs on LiteRT's CPU kernels to the same bits.

No profile has linears of 8-bit inputs with 16-bit outputs: Qualcomm's compiler has no such
FULLY_CONNECTED, CONV_2D or BATCH_MATMUL (benchmarks/README.md, Deployment).
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
"""A power of two, so that gamma is as exact as its float32 scale; Hexagon wants 16 bits of it."""


@dataclass(frozen=True)
class NormsTogether(Integers):
    """Codes, scales and zero points as frozen; each norm is a composite.

    odml.rms_norm(x, gamma) = gamma x / sqrt(mean(x^2) + epsilon). `decoder.rms_norm` is the one
    with gamma = 1 / sqrt(D) for all channels.

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
                yield self._composite(nodes)

    def _composite(self, nodes: tuple[Node, ...]) -> Composite:
        size = self.model.config.hidden_size
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
    """The norm that a tensor belongs to: what stands before the tensor's own name."""
    found = re.match(r"(?:.*\.)?norm\.", name)
    return found and found[0]


FORMS: dict[FormName, type[Integers]] = {
    "plain": Integers,
    "unpacked": UnpackedPrefill,
    "hexagon": NormsTogether,
}
"""How a file of a profile holds a model. `unpacked` is for CPUs whose int8 kernels prefill faster
than their int4 ones: with static activations, XNNPACK has AMX kernels for int8 weights alone. In
`hexagon` norms of 16 bits are the NPU's own op."""
HEXAGON_FORM: FormName = "hexagon"
"""Of what is compiled for Hexagon."""
