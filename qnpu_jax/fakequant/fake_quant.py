"""Fake quantization: real values on the integer grid, with straight-through gradients.

xhat = (clip(round(x / s) + z, qmin, qmax) - z) s, with scale s and zero point z: the static
quantizer of Quant.npu (arXiv 2605.20295).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from qnpu_jax.graph import Array


def fake_quant(
    x: jax.Array,
    scale: Array,
    zero_point: Array,
    qmin: Array,
    qmax: Array,
    *,
    masked: bool = True,
) -> jax.Array:
    """xhat = (clip(round(x/s) + z, qmin, qmax) - z) s, with the gradients of LSQ and LSQ+.

    With u = x/s and q the clipped code:

    - where the code is in the range: dx = 1, ds = round(u) - u, dz = 0;
    - where it is clipped: dx = 0 if masked else 1, ds = q - z, dz = -s.

    qmin and qmax get no gradient. Reverse mode only: a custom rule has no `jax.jvp`.

    Args:
      x: real values.
      scale, zero_point: broadcastable to x. Their gradients are sums over the axes along which they
        broadcast.
      qmin, qmax: the code range, broadcastable to x.
      masked: stop the gradient of clipped values, as LSQ does; Quant.npu's authors let it through.

    Returns: xhat, of the shape of x.

    Reference: Esser et al., LSQ (arXiv 1902.08153), eqs. 3 and 5; Bhalgat et al., LSQ+ (arXiv
    2004.09576), eqs. 5 and 6.
    """
    return _fake_quant(masked, x, scale, zero_point, qmin, qmax)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quant(
    masked: bool, x: Array, scale: Array, zero_point: Array, qmin: Array, qmax: Array
) -> jax.Array:
    codes = jnp.clip(jnp.round(x / scale), qmin - zero_point, qmax - zero_point)
    # Small negative values round to -0.0, which no integer code stands for.
    return jnp.where(codes == 0, 0.0, codes * scale)


def _fake_quant_forward(masked: bool, *args: Array) -> tuple[jax.Array, tuple[Array, ...]]:
    # The arguments, not the masks and differences: under a scan those would be kept per layer.
    return _fake_quant(masked, *args), args


def _fake_quant_backward(masked: bool, args: tuple[Array, ...], g: jax.Array) -> tuple:
    x, scale, zero_point, qmin, qmax = args
    q = jnp.round(x / scale)
    low, high = qmin - zero_point, qmax - zero_point
    inside = (q >= low) & (q <= high)
    # round(u) - u from q s - x, whose rounding is random. XLA may compute u as x times 1/s, whose
    # rounding is one relative error of all of them: the sum of g ds, small as terms of both signs
    # cancel, would gain that error times the sum of g u, up to 2^16 times larger.
    ds = jnp.where(inside, (q * scale - x) / scale, jnp.clip(q, low, high))
    dx = jnp.where(inside, g, 0.0) if masked else g
    dz = jnp.where(inside, 0.0, -scale)
    return _sum_to(dx, x), _sum_to(g * ds, scale), _sum_to(g * dz, zero_point), None, None


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)


def _sum_to(g: jax.Array, like: Array) -> jax.Array:
    """Sums a cotangent over the axes along which `like` was broadcast."""
    shape = jnp.shape(like)
    padded = (1,) * (g.ndim - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(padded) if n == 1 and g.shape[i] != 1)
    return jnp.sum(g, axes, keepdims=True).reshape(shape).astype(jnp.result_type(like))


def scale_gradient(x: jax.Array, factor: Array | float) -> jax.Array:
    """Returns x, and multiplies its gradient by `factor`: y = x, dy/dx = factor.

    Args:
      x: any real array.
      factor: broadcastable to x; it gets no gradient. `lsq_factor` for a scale or zero point.

    Returns: x, bit for bit.
    """
    return _scale_gradient(x, jnp.asarray(factor, x.dtype))


@jax.custom_jvp
def _scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    return x


_scale_gradient.defjvps(lambda tangent, _, x, factor: tangent * factor, None)


def lsq_factor(numel: int, qmax: Array | float) -> Array | float:
    """LSQ's factor on the gradient of a scale, 1 / sqrt(numel qmax), for `scale_gradient`.

    It makes the relative update of a scale about as large as that of the values it quantizes.

    Args:
      numel: values that share the scale (per channel: the input features).
      qmax: highest code, > 0; a number, or an array of any shape.

    Returns: the factor, of the shape of qmax.

    Reference: Esser et al., LSQ (arXiv 1902.08153), section 2.2.
    """
    return (numel * qmax) ** -0.5


@jax.custom_jvp
def round_ste(x: jax.Array) -> jax.Array:
    """Rounds half to even with a straight-through gradient: y = round(x), dy/dx = 1.

    Reference: Bengio et al. (arXiv 1308.3432).
    """
    return jnp.round(x)


round_ste.defjvps(lambda tangent, _, x: tangent)
