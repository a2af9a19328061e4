"""Attribution of a simulated model's KL divergence to its tensors, by integrated gradients.

The simulator is the float pass on the model's own constants (`tensor_errors`) with an error e_i
added to every tensor i: the output of integer op i less the op in real numbers on the same inputs.
With a factor t_i on every error, KL(reference || logits) is a smooth function f(t). f(0, ..., 0) is
the float pass, f(1, ..., 1) the simulator. Tensor i is charged

    a_i = integral over s in [0, 1] of df/dt_i at t = (s, ..., s),    sum a_i = f(1) - f(0).

The gradient at the simulator alone would charge about twice too much in total. KL is flat at its
minimum, so f grows with the square of the errors: for f = t'Ht/2 the gradient at t = 1 is H1, and
a_i is half of it. If errors are independent, H is diagonal, and a_i is also the amount by which KL
falls when tensor i alone is exact.

Two functions measure that for one tensor at a time. `without` leaves out e_i and keeps all other
errors. `replaced` leaves tensor i in float in fake-quant, where everything behind it rounds anew.
That is what happens in a real model, but it is noisy, because thousands of codes change: a fall
smaller than its spread between windows says nothing.

Reference: Sundararajan et al., Integrated Gradients (arXiv 1703.01365), Proposition 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qnpu_jax.diagnose.tensor_errors import Constants, rounding_tensors
from qnpu_jax.fakequant import Edge, decoder_logits, fake_quant, with_errors
from qnpu_jax.graph import LAYERS, Decoder, Tensors
from qnpu_jax.measure import mean_kl

POINTS = 3
"""Points of the Gauss-Legendre rule for the integral over s. The rule is exact where f is a
polynomial of degree up to 6."""


def charges(
    constants: Constants,
    ids: Int[np.ndarray, " t"],
    reference: Float[Array, "t v"],
    errors: Tensors,
) -> dict[str, np.ndarray]:
    """Charges the KL of one window to tensors: a_i of the module's equation.

    Args:
      constants: of the model, for windows of this length.
      ids: the window.
      reference: logits that KL is measured from.
      errors: e_i by global name without the layer, from `tensor_errors.measure_window`.

    Returns:
      Nats per position by global name without the layer: (L,) for tensors of layers, else ().
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
    """Returns df/dt_i at t = (at, ..., at), with names and shapes as `charges`."""
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
        logits = decoder_logits(
            dec, values, {n: (errors[n], factors[n]) for n in errors}, with_errors(dec)
        )
        return mean_kl(reference, logits)

    return jax.grad(kl)(factors)


def without(
    constants: Constants, ids: Int[np.ndarray, " t"], errors: Tensors, names: Iterable[str] = ()
) -> Float[Array, "t v"]:
    """Returns logits of the simulator without the errors of the named tensors.

    All other errors keep their values.

    Args:
      names: global names of tensors that round.
    """
    exact = _chosen(constants, names)
    extra = {n: (e, jnp.where(exact[n], 0.0, 1.0).astype(jnp.float32)) for n, e in errors.items()}
    return _injected(constants.decoder, _values(constants, ids), extra)


def replaced(
    constants: Constants, ids: Int[np.ndarray, " t"], names: Iterable[str] = ()
) -> Float[Array, "t v"]:
    """Returns logits of fake-quant with the named tensors in float.

    Args:
      names: global names of tensors that round.
    """
    exact = _chosen(constants, names)
    extra = {n: (constants.scales[n], *constants.ranges[n], x) for n, x in exact.items()}
    return _replaced(constants.decoder, _values(constants, ids), extra)


def _chosen(constants: Constants, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns whether each tensor is named, by global name without the layer: (L,) or ().

    Tensors are those that round in some layer. In layers where such a tensor does not round (a
    widening), it counts as named.
    """
    known = rounding_tensors(constants.decoder)
    chosen = {n: np.ones(np.shape(constants.scales[n].scale), bool) for n, _ in known.values()}
    given = set(names)
    for name, (stacked, layer) in known.items():
        np.atleast_1d(chosen[stacked])[layer] = name in given
    return chosen


@partial(jax.jit, static_argnums=0)
def _injected(dec: Decoder, values: Tensors, extra: Tensors) -> jax.Array:
    return decoder_logits(dec, values, extra, with_errors(dec))


@partial(jax.jit, static_argnums=0)
def _replaced(dec: Decoder, values: Tensors, extra: Tensors) -> jax.Array:
    return decoder_logits(dec, values, extra, _quantized)


def _quantized(extra: Tensors) -> Edge:
    """Returns an edge that fake-quantizes the tensors in `extra`.

    Only tensors that round are in it, so that copies of an exact tensor stay exact.

    Args:
      extra: (QParams, qmin, qmax, whether to leave it exact) by local name.
    """

    def edge(spec: Any, x: jax.Array) -> jax.Array:
        if spec.name not in extra:
            return x
        q, qmin, qmax, exact = extra[spec.name]
        return jnp.where(exact, x, fake_quant(x, q.scale, q.zero_point, qmin, qmax))

    return edge


def _values(constants: Constants, ids: Int[np.ndarray, " t"]) -> Tensors:
    """Returns what `_logits` reads: parameters by prefix of the graph, and tables."""
    whole = {g.prefix: constants.whole(g, ids) for g in constants.decoder.graphs}
    return {**whole, "tables": constants.tables}


def kl(reference: Float[Array, "t v"], logits: Float[Array, "t v"]) -> float:
    """Returns KL(reference || logits) in nats per position."""
    return float(mean_kl(reference, logits))
