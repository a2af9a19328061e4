"""Which tensor the KL divergence of a simulated model comes from.

The simulator is the float pass (`diagnose`) with an error added to every tensor: e_i, what integer
op i gives less what the op gives in real numbers on the same inputs. With a factor t_i on every
error, KL(reference || logits) is a smooth function f(t): f(0, ..., 0) is the float pass on the
model's own constants, f(1, ..., 1) the simulator. Tensor i is charged

    a_i = integral over s in [0, 1] of df/dt_i at t = (s, ..., s),    sum a_i = f(1) - f(0).

A gradient at the simulator alone charges about twice too much in total: KL is flat at its minimum,
so f grows with the square of the errors, and of f = t'Ht/2 the gradient at 1 is H1, a_i half of it.
Independent errors have a diagonal H; then a_i is also what one sees go when i alone is exact.

Two measurements of that, one tensor at a time: `without` takes e_i alone away, so it is exact in f;
`replaced` leaves i in float in fake-quant, where the codes that follow round anew: what really
happens, and noisy, since so do thousands of others. Below its spread between windows it says
nothing.

Reference: Sundararajan et al., Integrated Gradients (arXiv 1703.01365), Proposition 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qnpu_jax.diagnose.tensor_errors import Constants, rounding_tensors
from qnpu_jax.fakequant import Edge, evaluate, fake_quant
from qnpu_jax.graph import LAYERS, Decoder, Tensors, local
from qnpu_jax.measure import kl_terms

POINTS = 3
"""Of the integral over s, Gauss-Legendre: exact where f is a polynomial of degree up to 6."""


def charges(
    constants: Constants,
    ids: Int[np.ndarray, " t"],
    reference: Float[Array, "t v"],
    errors: Tensors,
) -> dict[str, np.ndarray]:
    """a_i for one window, in nats a position, by global name without the layer: (L,) or ().

    Args:
      reference: logits that KL is measured from.
      errors: of `tensor_errors.measure_window`.
    """
    total = {n: np.zeros(_layers(n, e)) for n, e in errors.items()}
    for x, weight in zip(*np.polynomial.legendre.leggauss(POINTS), strict=True):
        slope = slopes(constants, ids, reference, errors, (x + 1) / 2)
        total = {n: a + weight / 2 * slope[n] for n, a in total.items()}
    return total


def slopes(
    constants: Constants,
    ids: Int[np.ndarray, " t"],
    reference: Float[Array, "t v"],
    errors: Tensors,
    at: float,
) -> dict[str, np.ndarray]:
    """df/dt_i at t = (at, ..., at), named and shaped as `charges`."""
    factors = {n: jnp.full(_layers(n, e), at, jnp.float32) for n, e in errors.items()}
    values = _values(constants, ids)
    found = _slopes(constants.decoder, values, errors, reference, factors)
    return {n: np.asarray(x, np.float64) for n, x in found.items()}


def _layers(name: str, error: Any) -> tuple[int, ...]:
    return np.shape(error)[:1] if name.startswith(LAYERS) else ()


@partial(jax.jit, static_argnums=0)
def _slopes(
    dec: Decoder, values: Tensors, errors: Tensors, reference: jax.Array, factors: Tensors
) -> Tensors:
    def kl(factors: Tensors) -> jax.Array:
        logits = _logits(dec, values, {n: (errors[n], factors[n]) for n in errors}, _with_errors)
        return jnp.sum(kl_terms(reference, logits)) / len(logits)

    return jax.grad(kl)(factors)


def _with_errors(extra: Tensors) -> Edge:
    """x + t e, of the (e, t) by local name."""

    def edge(spec: Any, x: jax.Array) -> jax.Array:
        if spec.name not in extra:
            return x
        error, factor = extra[spec.name]
        return x + factor * error

    return edge


def without(
    constants: Constants, ids: Int[np.ndarray, " t"], errors: Tensors, names: Iterable[str] = ()
) -> Float[Array, "t v"]:
    """Logits of the simulator less the errors of the named tensors (global names, of those that
    round), all other errors as they are."""
    exact = _chosen(constants, names)
    extra = {n: (e, jnp.where(exact[n], 0.0, 1.0).astype(jnp.float32)) for n, e in errors.items()}
    return _injected(constants.decoder, _values(constants, ids), extra)


def replaced(
    constants: Constants, ids: Int[np.ndarray, " t"], names: Iterable[str] = ()
) -> Float[Array, "t v"]:
    """Logits in fake-quant, with the named tensors (as in `without`) in float."""
    exact = _chosen(constants, names)
    extra = {n: (constants.scales[n], *constants.ranges[n], x) for n, x in exact.items()}
    return _replaced(constants.decoder, _values(constants, ids), extra)


def _chosen(constants: Constants, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Whether a tensor is named, by global name without the layer, (L,) or (): of all that round in
    some layer. Where one does not (a widening), it counts as named."""
    known = rounding_tensors(constants.decoder)
    chosen = {n: np.ones(np.shape(constants.scales[n].scale), bool) for n, _ in known.values()}
    given = set(names)
    for name, (stacked, layer) in known.items():
        np.atleast_1d(chosen[stacked])[layer] = name in given
    return chosen


@partial(jax.jit, static_argnums=0)
def _injected(dec: Decoder, values: Tensors, extra: Tensors) -> jax.Array:
    return _logits(dec, values, extra, _with_errors)


@partial(jax.jit, static_argnums=0)
def _replaced(dec: Decoder, values: Tensors, extra: Tensors) -> jax.Array:
    return _logits(dec, values, extra, _quantized)


def _quantized(extra: Tensors) -> Edge:
    """Fake-quantizes what is in `extra` (QParams, qmin, qmax, whether to leave it exact) by local
    name: only tensors that round, so that what copies an exact tensor stays exact."""

    def edge(spec: Any, x: jax.Array) -> jax.Array:
        if spec.name not in extra:
            return x
        q, qmin, qmax, exact = extra[spec.name]
        return jnp.where(exact, x, fake_quant(x, q.scale, q.zero_point, qmin, qmax))

    return edge


def _values(constants: Constants, ids: Int[np.ndarray, " t"]) -> Tensors:
    """What `_logits` reads, by prefix of its graph."""
    return {
        g.prefix: (constants.whole(g, ids), constants.shared(g)) for g in constants.decoder.graphs
    }


def _logits(
    dec: Decoder, values: Tensors, extra: Tensors, edge: Callable[[Tensors], Edge]
) -> jax.Array:
    """The decoder on constants of `_values`, layers under `lax.scan`, rematerialised under
    autodiff.

    Args:
      extra: by global name without the layer, stacked in `layers.*`.
      edge: from the part of `extra` of one graph and layer, by local name.
    """

    @jax.checkpoint
    def step(x: jax.Array, layer: tuple[Tensors, Tensors]) -> tuple[jax.Array, None]:
        own, more = layer
        inputs = {"input.residual": x, **own, **values["layers."][1]}
        return evaluate(dec.layer, inputs, edge(more))[dec.layer.outputs[0]], None

    def whole(graph: Any, inputs: Tensors) -> jax.Array:
        own, shared = values[graph.prefix]
        found = evaluate(graph, {**inputs, **own, **shared}, edge(local(extra, graph.prefix)))
        return found[graph.outputs[0]]

    x = whole(dec.embed, {})
    x, _ = jax.lax.scan(step, x, (values["layers."][0], local(extra, "layers.")))
    return whole(dec.head, {"input.residual": x})


def kl(reference: Float[Array, "t v"], logits: Float[Array, "t v"]) -> float:
    """KL(reference || logits) in nats a position."""
    return float(jnp.sum(kl_terms(reference, logits))) / len(logits)
