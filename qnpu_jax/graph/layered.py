"""Values by tensor name; those of the layer graph are stacked along a leading layer axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.qparams import code_range

T = TypeVar("T")
Tensors = dict[str, Any]
"""Arrays by tensor name."""
Params = Mapping[str, jax.Array | np.ndarray]
"""Real parameters by stacked global name (`embed.weight`, `layers.attn.q.weight` (L, out, in))."""
Bounds = tuple[Any, Any]
"""qmin and qmax, in codes: float32 scalars, or (L,) arrays."""


def local(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Selects the entries whose names begin with `prefix`, and removes it from them.

    >>> local({"layers.attn.q": 1, "head.logits": 2}, "layers.")
    {'attn.q': 1}
    """
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def ranges_of(graph: Graph, names: Mapping[str, object]) -> dict[str, Bounds]:
    """Code ranges of the named tensors of a graph.

    Args:
      names: local names; values are not read.

    Returns:
      (qmin, qmax) by local name: (L,) arrays for the layer graph, scalars for the others.
    """
    out = {}
    for name in names:
        qmin, qmax = code_range(graph[name])
        out[name] = (qmin, qmax) if graph.layered else (qmin[0], qmax[0])
    return out
