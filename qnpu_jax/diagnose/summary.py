"""Errors of every activation tensor of a simulated model, summed up over windows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qnpu_jax.diagnose.attribution import charges, kl
from qnpu_jax.diagnose.tensor_errors import (
    Constants,
    Sums,
    by_design,
    decibels,
    measure_window,
    rounding_tensors,
)
from qnpu_jax.graph import Graph, Node


@dataclass(frozen=True)
class TensorRow:
    """Errors of one activation tensor over all windows.

    Attributes:
      tensor: global name.
      op: name of the op that makes it.
      bits: width of its codes.
      sqnr: dB against the float pass; None without error.
      own_sqnr: dB against the op in float on the simulator's inputs; None without error.
      ends: fraction of codes at either end of the code range.
      clipped: fraction of elements whose real value lies more than half a code outside the range.
      used: (highest - lowest + 1) / 2^bits, of the codes that occurred.
      kl: nats per position of the KL that it is charged; None where it copies or widens codes,
        which loses nothing.
      error: standard error of `kl` over windows; None for a single window.
      by_design: reason for which codes at the ends are no sign of a bad scale; None without one.
    """

    tensor: str
    op: str
    bits: int
    sqnr: float | None
    own_sqnr: float | None
    ends: float
    clipped: float
    used: float
    kl: float | None
    error: float | None
    by_design: str | None

    @property
    def rounds(self) -> bool:
        """Whether the op that makes the tensor rounds."""
        return self.kl is not None


class Tally:
    """Sums of errors of every tensor, window by window."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._sums: dict[str, Sums] = {}
        self._charges: list[dict[str, np.ndarray]] = []
        self._kls: list[tuple[float, float]] = []

    def read(self, ids: np.ndarray, tensors: Mapping[str, Any], reference: Any | None) -> Any:
        """Adds a window and returns the logits that KL is measured from.

        Args:
          ids: the window (T,).
          tensors: simulated codes by global name.
          reference: logits to measure KL from; None takes those of the float pass.
        """
        found = measure_window(self._constants, ids, tensors)
        origin = found.float_logits if reference is None else reference
        for name, sums in found.sums.items():
            known = self._sums.get(name)
            self._sums[name] = sums if known is None else known.merged(sums)
        self._charges.append(charges(self._constants, ids, origin, found.errors))
        self._kls.append((kl(origin, found.logits), kl(origin, found.float_logits)))
        return origin

    def kl(self) -> dict[str, float]:
        """Returns the KL of `simulator` and `constants`, averaged over windows (`Diagnosis.kl`)."""
        simulator, constants = np.mean(self._kls, axis=0)
        return {"simulator": float(simulator), "constants": float(constants)}

    def rows(self) -> list[TensorRow]:
        """Returns a row for each activation tensor, in the order of the graph."""
        dec = self._constants.decoder
        charged = self.charged()
        return [
            _row(graph, node, layer, self._sums[name], charged.get(name))
            for graph in dec.graphs
            for layer in range(graph.layers)
            for node in graph.nodes
            for name in [graph.global_name(layer, node.output)]
        ]

    def charged(self) -> dict[str, tuple[float, float | None]]:
        """Returns mean charges and their standard errors, by global name of tensors that round."""
        return {
            name: mean([float(np.atleast_1d(c[stacked])[layer]) for c in self._charges])
            for name, (stacked, layer) in rounding_tensors(self._constants.decoder).items()
        }


def mean(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """Returns the mean and its standard error, which is None for a single value.

    Example:
      >>> mean([1.0, 3.0])
      (2.0, 1.0)
    """
    count = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else None
    return float(np.mean(values)), error


def _row(
    graph: Graph, node: Node, layer: int, s: Sums, charged: tuple[float, float | None] | None
) -> TensorRow:
    quant = graph[node.output].quant
    nats, error = charged or (None, None)
    return TensorRow(
        tensor=graph.global_name(layer, node.output),
        op=type(node.op).__name__,
        bits=quant.bits[layer],
        sqnr=decibels(s.signal, s.noise),
        own_sqnr=None if charged is None else decibels(s.own_signal, s.own_noise),
        ends=s.ends / s.count,
        clipped=s.clipped / s.count,
        used=(s.highest - s.lowest + 1) / 2 ** quant.bits[layer],
        kl=nats,
        error=error,
        by_design=by_design(node.op),
    )
