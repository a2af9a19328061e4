"""Host loop over the graphs, one layer at a time, for callers that read intermediate tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qnpu_jax.config import ModelConfig
from qnpu_jax.fakequant.compiling import jit_brief
from qnpu_jax.fakequant.evaluate import Edge, evaluate, fake_quant_edge
from qnpu_jax.fakequant.forward import shared_inputs
from qnpu_jax.graph import Decoder, Graph, Params, Scales, Tensors, local, ranges_of, select_shared

Keep = Callable[[Graph], tuple[str, ...]]
"""Chooses tensors of a graph: local names."""
EdgeOfBits = Callable[[Tensors], Edge]
"""Makes an edge from the bits of each tensor, by local name: layers of one graph may differ."""
LOGIT_BYTES = {"cpu": 2**27, "gpu": 2**29}
"""Most memory for the float32 logits of a pass, beside which copies of them stand, by backend."""


def windows_at_once(config: ModelConfig, tokens: int, count: int, most: int = 8) -> int:
    """Returns how many of `count` windows a pass takes: at most min(most, LOGIT_BYTES / (4 T V)),
    at least 1, and if possible a divisor of `count`, since each size of a pass is compiled.

    >>> from qnpu_jax.config import ModelConfig
    >>> sizes = dict(family="a", hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
    >>> sizes |= dict(num_kv_heads=1, head_dim=8, max_positions=512)
    >>> windows_at_once(ModelConfig(vocab_size=49_152, **sizes), tokens=256, count=32)
    2

    Args:
      tokens: of a window.
      count: windows in all.
      most: no more than these.
    """
    most_bytes = LOGIT_BYTES.get(jax.default_backend(), LOGIT_BYTES["gpu"])
    limit = max(1, min(most, count, most_bytes // (4 * tokens * config.vocab_size)))
    equal = next(n for n in range(limit, 0, -1) if count % n == 0)
    return equal if 2 * equal > limit else limit


@jit_brief(static_argnums=(0, 1, 5))
def graph_tensors(
    graph: Graph,
    keep: tuple[str, ...],
    values: Tensors,
    params: Tensors,
    quant: Any = ({}, {}),
    edge: EdgeOfBits | None = None,
) -> Tensors:
    """Evaluates one graph for a batch, and returns the kept tensors by local name.

    Args:
      values: inputs with a leading batch axis.
      params: parameters and shared inputs, without one.
      quant: QParams and code ranges of the tensors to fake-quantize, one layer's; with `edge`, the
        bits of all tensors there.
      edge: makes what stands in place of fake-quantization.
    """

    def one(values: Tensors) -> Tensors:
        here = edge(quant) if edge else fake_quant_edge(*quant)
        env = evaluate(graph, {**values, **params}, here)
        return {name: env[name] for name in keep}

    return jax.vmap(one)(values)


def passes(
    dec: Decoder,
    params: Params,
    ids: jax.Array,
    keep: Keep,
    scales: Scales | None = None,
    tables: Tensors | None = None,
    edge: EdgeOfBits | None = None,
) -> Iterator[tuple[Graph, int, Tensors]]:
    """Yields the kept tensors of a batch, graph by graph and layer by layer.

    Args:
      ids: (B, T) token ids.
      keep: tensors to return.
      scales: as in `forward`: float without, and for every tensor that has none.
      tables: in place of `shared_inputs(dec)`.
      edge: makes, from the bits of a layer's tensors, what sees every tensor in place of
        fake-quantization; a function at module level, since each is compiled.
    """
    tables = shared_inputs(dec) if tables is None else tables
    values: Tensors = {"ids": ids}
    for graph in dec.graphs:
        own, q = local(params, graph.prefix), local(scales or {}, graph.prefix)
        quant = bits_of(graph) if edge else (q, ranges_of(graph, q))
        out = graph.outputs[0]
        names = tuple(dict.fromkeys((out, *keep(graph))))
        for i in range(graph.layers):
            here = graph.at((own, quant), i)
            shared = select_shared(dec, graph, tables, i)
            env = graph_tensors(graph, names, values, here[0] | shared, here[1], edge)
            yield graph, i, env
            values = {"input.residual": env[out]}


def bits_of(graph: Graph) -> Tensors:
    """Returns the bits of every tensor by local name: (L,) int32, or () without layers."""
    bits = {t.name: np.asarray(t.quant.bits, np.int32) for t in graph.tensors}
    return bits if graph.layered else {n: b[0] for n, b in bits.items()}
