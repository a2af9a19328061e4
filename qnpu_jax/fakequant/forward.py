"""The float and the fake-quantized forward pass: layers under `lax.scan`, rematerialised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qnpu_jax.fakequant.evaluate import (
    Edge,
    evaluate,
    fake_quant_edge,
    measured,
)
from qnpu_jax.graph import (
    Bounds,
    Decoder,
    Graph,
    Params,
    QParams,
    Scales,
    Tensors,
    layer_inputs,
    local,
    ranges_of,
    select_shared,
)


def shared_inputs(dec: Decoder, filled: int = 0, held: int | None = None) -> Tensors:
    """Real values of the inputs that layers share (`graph.layer_inputs`), as device arrays."""
    return {k: jnp.asarray(v) for k, v in layer_inputs(dec, filled, held).items()}


def scanned_inputs(
    dec: Decoder, shared: Tensors
) -> tuple[Int[Array, " l"] | None, Callable[[Any], Tensors]]:
    """Prepares shared inputs for a `lax.scan` over layers.

    Args:
      shared: by shared name.

    Returns:
      A number for each layer, for the scan to slice, equal where layers share all: None where all
      do, and the scan needs none. And the function from its slice to the layer's inputs by local
      name.
    """
    named = {name: name for name in shared}
    layers = range(dec.layer.layers)
    read = [tuple(select_shared(dec, dec.layer, named, i).items()) for i in layers]
    first = dict.fromkeys(read)
    tables = [{name: shared[x] for name, x in own} for own in first]
    if len(tables) == 1:
        return None, lambda _: tables[0]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tables)
    index = jnp.asarray([[*first].index(own) for own in read])
    return index, lambda kind: {name: x[kind] for name, x in stacked.items()}


Prepare = Callable[[Graph, Tensors], Tensors]
"""Maps stored values of one layer (local names) to the graph's parameters."""


def stored(_: Graph, values: Tensors) -> Tensors:
    """Takes parameters as they are stored."""
    return values


@dataclass(frozen=True)
class Reading:
    """Parameters and scales of a forward pass. Under jit it holds tracers, so it is made inside.

    Attributes:
      params: real values by stacked global name.
      scales: QParams by stacked global name; tensors without an entry stay in float.
      prepare: makes the graph's parameters of them (learning merges rotations here).
      masked: stop the gradient of clipped values, as `fake_quant.fake_quant` says.
      measure: also sum up the local errors (`evaluate.measured`).
    """

    params: Mapping[str, Any]
    scales: Scales
    prepare: Prepare = stored
    masked: bool = True
    measure: bool = False

    def whole(self, graph: Graph) -> tuple[Tensors, Edge]:
        """Parameters and edge of a graph without layers."""
        edge = fake_quant_edge(*self.quant(graph), self.masked)
        return self.prepare(graph, local(self.params, graph.prefix)), edge

    def quant(self, graph: Graph) -> tuple[dict[str, QParams], dict[str, Bounds]]:
        """Scales and code ranges of a graph by local name."""
        q = local(self.scales, graph.prefix)
        return q, ranges_of(graph, q)


def _alike(values: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Takes what is known to be alike in all layers out of values that `lax.scan` would slice, and
    leaves every array in once: a GPU takes as long for one scalar of a layer as for a small matrix,
    and there are hundreds.

    Args:
      values: arrays with a leading axis of layers; NumPy's are known, JAX's may be traced.

    Returns:
      The other arrays, and the function that puts those of one layer into the structure again.
    """
    leaves, structure = jax.tree.flatten(values)
    known = {i for i, x in enumerate(leaves) if isinstance(x, np.ndarray) and (x == x[:1]).all()}
    # Tensors that are tied to another have its array.
    sliced = {id(x): x for i, x in enumerate(leaves) if i not in known}

    def whole(own: list[Any]) -> Any:
        found = dict(zip(sliced, own, strict=True))
        rows = (x[0] if i in known else found[id(x)] for i, x in enumerate(leaves))
        return jax.tree.unflatten(structure, rows)

    return list(sliced.values()), whole


class Hidden(NamedTuple):
    """Residual stream of a sequence.

    Attributes:
      residuals: after each layer, (L, T, D).
      last: after the last layer, (T, D); by itself, so that XLA need not keep the others for it.
      error: sum of local errors, (); 0 unless measured.
    """

    residuals: Float[Array, "l t d"]
    last: Float[Array, "t d"]
    error: Float[Array, ""]


def hidden(dec: Decoder, reading: Reading, ids: Int[Array, " t"]) -> Hidden:
    """Runs the embedding and all layers.

    The layer graph runs under `lax.scan` over stacked parameters and scales, rematerialised under
    autodiff.

    Args:
      ids: (T,) token ids.
    """
    kinds, tables = scanned_inputs(dec, shared_inputs(dec))
    sliced, whole = _alike(reading.quant(dec.layer))

    # Autodiff keeps the residual stream between layers alone: writing out what is in a layer, and
    # reading it again, takes a GPU longer than computing it.
    @jax.checkpoint
    def step(x: jax.Array, layer) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        p, own, kind = layer
        q, r = whole(own)
        edge = fake_quant_edge(q, r, reading.masked)
        errors: list[jax.Array] = [jnp.float32(0)]
        edge = measured(edge, errors) if reading.measure else edge
        values = {"input.residual": x, **tables(kind), **reading.prepare(dec.layer, p)}
        x = evaluate(dec.layer, values, edge)["mlp.residual"]
        return x, (x, sum(errors[1:], errors[0]))

    # Of the table only the rows that are read: rotated and quantized whole, it would be there three
    # times under autodiff.
    rows = {"embed.weight": jnp.asarray(reading.params["embed.weight"])[ids]}
    values, edge = replace(reading, params=rows).whole(dec.embed)
    x = evaluate(dec.embed, {"ids": jnp.arange(len(ids)), **values}, edge)["residual"]
    layers = (local(reading.params, "layers."), sliced, kinds)
    last, (residuals, errors) = jax.lax.scan(step, x, layers)
    return Hidden(residuals, last, jnp.sum(errors))


def head(dec: Decoder, values: Tensors, edge: Edge, x: Float[Array, "t d"]) -> Float[Array, "r v"]:
    """Runs the head: logits of the last layer's residual stream.

    Args:
      values, edge: from `Reading.whole(dec.head)`.
      x: (T, D).
    """
    eps = select_shared(dec, dec.head, shared_inputs(dec))
    return evaluate(dec.head, {"input.residual": x, **eps, **values}, edge)["logits"]


def forward(
    dec: Decoder, params: Params, ids: Int[Array, " t"], scales: Scales | None = None
) -> Float[Array, "rows v"]:
    """Runs the whole decoder: float without `scales`, fake-quantized with `resolve`d ones.

    Args:
      dec: staged for T tokens, no cache.
      params: folded parameters by global name (`fold.fold_norms`), prefix K/V included if dec has
        a prefix.
      ids: (T,) int32.
      scales: QParams by global name; tensors without an entry stay in float.
    """
    reading = Reading(params, scales or {})
    return head(dec, *reading.whole(dec.head), hidden(dec, reading, ids).last)


def token_nll(logits: Float[Array, "t v"], ids: Int[Array, " t"]) -> Float[Array, " t-1"]:
    """Negative log-likelihood of each next token: -log softmax(logits[t])[ids[t+1]].

    Args:
      logits: (T, V), real.
      ids: (T,).

    Returns: (T-1,), in nats.
    """
    log_p = jax.nn.log_softmax(logits[:-1], axis=-1)
    return -jnp.take_along_axis(log_p, ids[1:, None], axis=-1)[:, 0]
