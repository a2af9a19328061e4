"""Learning on the orthogonal group, as optax transformations of the rotations themselves.

A learned rotation merges into the weights only while it is orthogonal: where |R R^T - I| exceeds
float32 rounding, the merge changes the model. Two ways to stay orthogonal, for any pytree of
matrices with any leading axes:

- `cayley_sgd`, the optimizer of SpinQuant and Quant.npu, for their recipes as baselines: momentum
  in the tangent space, one approximate Cayley step at a time;
- `on_orthogonal_group`: R = R0 cayley(A), A skew, learned by any optax optimizer.

Products are float32 in full: an NVIDIA GPU multiplies in TF32 by default, which keeps 10 bits of
each factor, and a product of rotations is no more orthogonal than its factors are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Tree = Any
"""A pytree of matrices (..., n, n), or of cotangents of such."""

_NO_PARAMS = "optimizer.update: expected the rotations as `params`, got None; pass them third"

_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _skew(a: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """(A - A^T) / 2."""
    return (a - a.mT) / 2


def orthogonality_error(r: Float[Any, "*b p n"]) -> Float[Array, ""]:
    """Returns max |R R^T - I| over all entries and leading axes: 0 where the rows are orthonormal.

    >>> float(orthogonality_error(jnp.eye(2)))
    0.0
    """
    r = jnp.asarray(r)
    gram = _matmul(r, r.mT)
    return jnp.abs(gram - jnp.broadcast_to(jnp.eye(r.shape[-2], dtype=r.dtype), gram.shape)).max()


# --- R = R0 cayley(A) ---


def cayley(a: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """Maps a skew matrix A to the rotation (I - A)^-1 (I + A), which is I + 2A for small A.

    The inverse map is A = (R - I) (R + I)^-1, so every rotation without the eigenvalue -1 is
    reached; a turn by t in a plane has |A| = tan(t/2). Differentiable.

    Args:
      a: A = -A^T, to the last bit (the result is as orthogonal as A is skew); |A| below about 100,
        because I - A loses log10 |A| digits.

    Returns: R, with |R R^T - I| about 1e-6 in float32.

    Reference: Cayley, Sur quelques propriétés des déterminants gauches (1846).
    """
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    return jnp.linalg.solve(eye - a, eye + a)


class OrthogonalGroupState(NamedTuple):
    """State of `on_orthogonal_group`: R0, the skew A of R = R0 cayley(A), and the optimizer's own
    state."""

    start: Tree
    skew: Tree
    inner: optax.OptState


def on_orthogonal_group(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs any optax optimizer on the orthogonal group: R = R0 cayley(A), A skew, A = 0 at first.

    The gradient by R is pulled back to A and projected on skew matrices; `inner` steps A, and the
    update is R0 cayley(A_new) - R. R cannot drift from orthogonality: it is computed from R0 each
    time, not from the last R. Values set in R from outside are lost at the next update.

    Turns near half a circle are out of reach in practice: a turn by t needs |A| = tan(t/2), and the
    gradient of A shrinks as 1 / (1 + |A|^2).

    Args:
      inner: steps A, whose entries are halves of angles. Optimizers that treat entries alike (SGD,
        Adam) keep A skew to the last bit; for others it is projected.

    Returns: a transformation whose `update` needs `params`.

    Raises:
      ValueError: `update` was called without `params`.

    Reference: Lezcano-Casado and Martínez-Rubio, Cheap orthogonal constraints in neural networks
      (arXiv 1901.08428), section 3, with the Cayley map for the exponential.
    """
    optimizer = optax.with_extra_args_support(inner)

    def init(params: Tree) -> OrthogonalGroupState:
        start = jax.tree.map(jnp.array, params)  # a copy: a train step may donate both
        skew = jax.tree.map(jnp.zeros_like, start)
        return OrthogonalGroupState(start, skew, optimizer.init(skew))

    def rotate(start: Tree, skew: Tree) -> Tree:
        return jax.tree.map(lambda r0, a: _matmul(r0, cayley(a)), start, skew)

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, OrthogonalGroupState]:
        if params is None:
            raise ValueError(_NO_PARAMS)
        pull_back = jax.vjp(partial(rotate, state.start), state.skew)[1]
        (gradient,) = pull_back(updates)
        gradient = jax.tree.map(_skew, gradient)
        with _library_promotion():
            steps, inner_state = optimizer.update(gradient, state.inner, state.skew, **extra)
            skew = jax.tree.map(_skew, optax.apply_updates(state.skew, steps))
        moved = jax.tree.map(jnp.subtract, rotate(state.start, skew), params)
        return moved, OrthogonalGroupState(state.start, skew, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _library_promotion() -> Any:
    """Allows dtype promotion for optax, whose schedules and Adam mix the step count (int32) with
    floats; strict promotion, a setting of the tests, forbids that."""
    return jax.numpy_dtype_promotion("standard")


# --- Cayley-SGD ---


class CayleySGDState(NamedTuple):
    """State of `cayley_sgd`: steps done (int32), and V, shaped as the transposed parameters."""

    steps: Any
    momentum: Tree


def cayley_sgd(
    learning_rate: float | Callable[[Any], Any],
    momentum: float = 0.9,
    *,
    iterations: int = 5,
    corrections: int = 2,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Builds Cayley-SGD with momentum, for matrices X (p x n, p <= n) with orthonormal rows.

    One step, G = dL/dX, V and Y (n x p), W (n x n, skew):

        V <- m V - G^T
        What = M - X^T (X M) / 2 with M = V X,  W = What - What^T
        V <- W X^T                     (projected on the tangent space)
        a = min(lr, 1 / (max column sum of |W| + eps))
        Y = X^T + a V, then `iterations` times  Y <- X^T + a W (X^T + Y) / 2
        X <- Y^T, then `corrections` times  X <- (3I - X X^T) X / 2

    The last line is not in the paper: see `_newton_schulz`.

    Args:
      learning_rate: lr > 0, a number or a schedule of the step count; Quant.npu: 0.1, cosine.
      momentum: m in [0, 1).
      iterations: of the loop over Y; 5 in the authors' code, 2 in the paper.
      corrections: Newton-Schulz steps; 2 bring 0.014 to float32 rounding.
      eps: keeps the bound on a finite where W is 0.

    Returns: a transformation whose `update` needs `params`, and returns X_new - X.

    Raises:
      ValueError: `update` was called without `params`.

    Reference: Li et al., Efficient Riemannian optimization on the Stiefel manifold via the Cayley
      transform (arXiv 2002.01113), Algorithm 1 (with X transposed).
    """

    @partial(jnp.vectorize, signature="(p,n),(p,n),(n,p),()->(p,n),(n,p)")
    def step(x: Array, g: Array, v: Array, lr: Array) -> tuple[Array, Array]:
        x_new, v = _cayley_sgd_step(x, momentum * v - g.mT, lr, iterations, eps)
        return _newton_schulz(x_new, corrections) - x, v

    return optax.GradientTransformationExtraArgs(_at_rest, _stepwise(step, learning_rate))


def _at_rest(params: Tree) -> CayleySGDState:
    velocity = jax.tree.map(lambda x: jnp.zeros_like(x.mT), params)
    return CayleySGDState(jnp.zeros([], jnp.int32), velocity)


def _stepwise(
    step: Callable[..., tuple[Array, Array]], learning_rate: float | Callable[[Any], Any]
) -> Callable[..., tuple[Tree, CayleySGDState]]:
    """Builds the `update` of `cayley_sgd` from the step of one matrix.

    Args:
      step: (X, G, V, lr) -> (X_new - X, V_new).
    """

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **_: Any
    ) -> tuple[Tree, CayleySGDState]:
        if params is None:
            raise ValueError(_NO_PARAMS)
        with _library_promotion():
            lr = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        moved = jax.tree.map(
            lambda x, g, v: step(x, g, v, jnp.asarray(lr, x.dtype)), params, updates, state.momentum
        )
        pairs = jax.tree.structure(params), jax.tree.structure((0, 0))
        moves, velocity = jax.tree.transpose(*pairs, moved)
        return moves, CayleySGDState(optax.safe_increment(state.steps), velocity)

    return update


def _cayley_sgd_step(
    x: Float[Array, "p n"],
    v: Float[Array, "n p"],
    lr: Float[Array, ""],
    iterations: int,
    eps: float,
) -> tuple[Float[Array, "p n"], Float[Array, "n p"]]:
    """X_new (uncorrected) and the projected V, from X and m V - G^T: `cayley_sgd`'s equations.

    The loop's fixed point is the Cayley transform (I - aW/2)^-1 (I + aW/2) X^T, orthogonal; the
    bound on a makes each iteration at least halve the distance to it. V is projected before the
    loop starts from it, as in the paper's Algorithm 1. The authors' code (and SpinQuant's) projects
    V after the loop: that has the same fixed point, but starts at a distance without a bound, which
    grows with the part of the gradient off the tangent space.
    """
    xt = x.mT
    m = _matmul(v, x)
    w_hat = m - _matmul(xt, _matmul(x, m)) / 2
    w = w_hat - w_hat.mT
    v = _matmul(w, xt)
    a = jnp.minimum(lr, 1 / (jnp.abs(w).sum(-2).max() + eps))
    y = xt + a * v
    for _ in range(iterations):
        y = xt + a * _matmul(w, xt + y) / 2
    return y.mT, v


def _newton_schulz(x: Float[Array, "p n"], times: int) -> Float[Array, "p n"]:
    """Newton-Schulz, X <- (3I - X X^T) X / 2: singular values 1 + e become 1 - 3 e^2/2 - e^3/2.

    The loop of `_cayley_sgd_step` leaves singular values up to 0.014 off 1 after five iterations,
    which would add up over the steps (the authors' code normalizes rows each step and takes a QR in
    one of a hundred). A correction squares that distance and costs two products: no drift.
    """
    for _ in range(times):
        x = (3 * x - _matmul(_matmul(x, x.mT), x)) / 2
    return x
