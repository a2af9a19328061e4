"""Values by tensor name. Those of the layer graph carry a leading layer axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.qparams import code_range

T = TypeVar("T")
Tensors = dict[str, Any]
Params = Mapping[str, jax.Array | np.ndarray]
Bounds = tuple[Any, Any]
"""qmin and qmax: float32 scalars, or (L,) arrays."""


def local(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries under `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def ranges_of(graph: Graph, names: Mapping[str, object]) -> dict[str, Bounds]:
    """Code ranges of the named tensors, with the layer axis in the layer graph only."""
    out = {}
    for name in names:
        qmin, qmax = code_range(graph[name])
        out[name] = (qmin, qmax) if graph.layered else (qmin[0], qmax[0])
    return out
