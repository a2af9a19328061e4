"""Learning rotations: they stay orthogonal, take the published step, and reach known optima."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qnpu_jax.learn.orthogonal import (
    _cayley_sgd_step,
    cayley,
    cayley_sgd,
    on_orthogonal_group,
    orthogonality_error,
)

COSINE = functools.partial(optax.cosine_decay_schedule, decay_steps=2000)
OPTIMIZERS: dict[str, Any] = {
    "cayley_sgd": lambda: cayley_sgd(COSINE(0.1)),
    "cayley_adam": lambda: on_orthogonal_group(optax.adam(COSINE(2e-2))),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.cache
def orthogonal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Random orthogonal matrices."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=shape))[0].astype(dtype)


def skew(n: int, size: float, seed: int = 0) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(n, n)) * size
    return (a - a.T).astype(np.float32)


def error(r) -> float:
    """max |R R^T - I| in float64."""
    r = np.asarray(r, np.float64)
    return float(np.abs(r @ np.swapaxes(r, -1, -2) - np.eye(r.shape[-2])).max())


def run(optimizer: Any, params, gradient, steps: int):
    """Parameters and optimizer state after `steps` steps along gradient(params, key)."""

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(gradient(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    return scan((params, optimizer.init(params)))


# --- The Cayley transform ---


def test_cayley_is_the_formula_and_a_rotation():
    a = skew(12, 0.3)
    eye = np.eye(12)
    expected = np.linalg.inv(eye - a.astype(np.float64)) @ (eye + a)
    np.testing.assert_allclose(cayley(jnp.asarray(a)), expected, atol=1e-6)  # float32 solve
    assert np.linalg.det(cayley(jnp.asarray(a))) == pytest.approx(1, abs=1e-5)


def test_cayley_turns_a_plane_by_twice_the_arctangent():
    t = 0.7
    a = jnp.asarray([[0, -np.tan(t / 2)], [np.tan(t / 2), 0]], jnp.float32)
    rotation = [[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]
    np.testing.assert_allclose(cayley(a), rotation, atol=1e-6)


@pytest.mark.parametrize(("n", "size"), [(16, 0.01), (16, 1), (16, 10), (576, 0.003), (576, 0.3)])
def test_cayley_is_orthogonal_to_float32(n, size):
    r = cayley(jnp.asarray(skew(n, size)))
    assert error(r) <= 5e-6
    # The check itself multiplies in float32: n roundings of products up to 1/n on average.
    assert abs(float(orthogonality_error(r)) - error(r)) <= 3e-6


@pytest.mark.slow
def test_cayley_batches_and_differentiates():
    a = np.stack([skew(5, 0.4, seed) for seed in range(6)]).reshape(2, 3, 5, 5)
    r = cayley(jnp.asarray(a))
    np.testing.assert_allclose(r[1, 2], cayley(jnp.asarray(a[1, 2])), atol=1e-6)
    # Central differences in float64 of sum(W * cayley(A + hD)), error h^2.
    w, d, h = (np.random.default_rng(i).normal(size=(5, 5)) for i in (1, 2, 0))
    d, h, a0 = d - d.T, 1e-5, a[0, 0].astype(np.float64)
    eye = np.eye(5)
    f = [np.sum(w * np.linalg.solve(eye - b, eye + b)) for b in (a0 + h * d, a0 - h * d)]
    got = jax.grad(lambda a: jnp.sum(jnp.asarray(w, jnp.float32) * cayley(a)))(jnp.asarray(a[0, 0]))
    assert np.sum(got * d) == pytest.approx((f[0] - f[1]) / (2 * h), rel=1e-4)


def test_orthogonality_error_is_the_largest():
    r = np.stack([np.eye(4), np.eye(4) * np.sqrt(1.5)]).astype(np.float32)
    assert float(orthogonality_error(r)) == pytest.approx(0.5)
    assert float(orthogonality_error(jnp.asarray(orthogonal(6, 6)[:4]))) <= 1e-6  # rows, p < n


# --- Both optimizers ---


@pytest.mark.slow
@each_optimizer
@pytest.mark.nightly
def test_2000_noisy_steps_do_not_drift(name):
    """A pull that lasts (so that R goes far) under noise four times as large."""
    pull = jax.random.normal(jax.random.key(1), (3, 16, 16))

    def gradient(_, key):
        return pull + 4 * jax.random.normal(key, pull.shape)

    start = jnp.asarray(orthogonal(3, 16, 16))
    r, _ = run(OPTIMIZERS[name](), start, gradient, 2000)
    assert np.abs(r - start).max() > 0.3
    assert error(r) <= 1e-5


@pytest.mark.slow
@each_optimizer
def test_large_matrices_stay_orthogonal(name):
    r, _ = run(
        OPTIMIZERS[name](),
        jnp.asarray(orthogonal(576, 576)),
        lambda r, key: jax.random.normal(key, r.shape),
        2,
    )
    assert error(r) <= 1e-5


@each_optimizer
def test_procrustes_converges_to_its_solution(name):
    """min |X B - C|^2: X = U V^T with U S V^T = C B^T."""
    rng = np.random.default_rng(3)
    b = rng.normal(size=(8, 32))
    # Turns of up to 100 degrees from the start: more would test the chart, not the optimizer.
    c = np.asarray(cayley(jnp.asarray(skew(8, 0.2)))) @ b + 0.3 * rng.normal(size=(8, 32))
    u, _, vt = np.linalg.svd(c @ b.T)
    b, c = jnp.asarray(b, jnp.float32), jnp.asarray(c, jnp.float32)

    def gradient(x, _):
        return jax.grad(lambda x: jnp.mean((x @ b - c) ** 2))(x)

    x, _ = run(OPTIMIZERS[name](), jnp.eye(8), gradient, 2000)
    np.testing.assert_allclose(x, u @ vt, atol=2e-6)


@pytest.mark.slow
@each_optimizer
@pytest.mark.nightly
def test_a_pytree_with_leading_axes_is_each_matrix_alone(name):
    """As a training step has them: R1 and the layers' R2, under multi_transform beside a scale."""
    params = {
        "r1": jnp.asarray(orthogonal(6, 6)),
        "r2": jnp.asarray(orthogonal(2, 3, 4, 4)),
        "scale": jnp.float32(0.5),
    }
    target = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    labels = {"r1": "rotation", "r2": "rotation", "scale": "scale"}
    optimizer = optax.multi_transform(
        {"rotation": OPTIMIZERS[name](), "scale": optax.sgd(0.1)}, labels
    )
    got, _ = run(optimizer, params, lambda *_: target, 3)
    assert got["scale"] == pytest.approx(0.5 - 3 * 0.1 * float(target["scale"]))
    last = jax.tree.map(lambda x: x[1, 2], (params["r2"], got["r2"], target["r2"]))
    alone, _ = run(OPTIMIZERS[name](), last[0], lambda *_: last[2], 3)
    np.testing.assert_allclose(last[1], alone, atol=1e-6)


@pytest.mark.slow
@each_optimizer
def test_schedules_count_the_steps(name):
    """A rate that is 0 from the second step on: the second step stands still."""
    rate = optax.piecewise_constant_schedule(0.1, {1: 0.0})
    optimizer = cayley_sgd(rate) if name == "cayley_sgd" else on_orthogonal_group(optax.adam(rate))
    start = jnp.asarray(orthogonal(5, 5))
    g = jax.random.normal(jax.random.key(0), (5, 5))
    once, twice = (run(optimizer, start, lambda *_: g, n)[0] for n in (1, 2))
    assert np.abs(once - start).max() > 1e-2
    np.testing.assert_allclose(twice, once, atol=1e-6)


@each_optimizer
def test_params_are_needed(name):
    optimizer = OPTIMIZERS[name]()
    r = jnp.eye(3)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(r, optimizer.init(r))


# --- Cayley-SGD ---


def numpy_step(x, g, v, lr, momentum, project_first=True, iterations=5):
    """The equations in float64: V is projected before the loop (the paper) or after (its code)."""
    v = momentum * v - g.T
    m = v @ x
    w_hat = m - x.T @ (x @ m) / 2
    w = w_hat - w_hat.T
    tangent = w @ x.T
    a = min(lr, 1 / (np.abs(w).sum(0).max() + 1e-8))
    y = x.T + a * (tangent if project_first else v)
    for _ in range(iterations):
        y = x.T + a * w @ (x.T + y) / 2
    return y.T, tangent


@pytest.mark.parametrize(("p", "n"), [(8, 8), (5, 8)])
@pytest.mark.parametrize("lr", [1e-3, 10.0])  # below the bound on a, and above
def test_steps_are_the_published_ones(p, n, lr):
    x = orthogonal(n, n)[:p]
    gradients = np.random.default_rng(1).normal(size=(3, p, n)).astype(np.float32)
    optimizer: Any = cayley_sgd(lr, corrections=0)
    update = jax.jit(optimizer.update)
    got, state = x, optimizer.init(x)
    expected, v = x.astype(np.float64), np.zeros((n, p))
    for g in gradients:
        updates, state = update(jnp.asarray(g), state, got)
        got = np.add(got, updates)
        expected, v = numpy_step(expected, g.astype(np.float64), v, lr, 0.9)
        np.testing.assert_allclose(got, expected, atol=2e-6)  # float32, three steps
        np.testing.assert_allclose(state.momentum, v, atol=1e-5)
    assert state.steps == 3


@pytest.mark.parametrize("lr", [1e-3, 10.0])
def test_the_corrected_step_is_the_exact_cayley_step(lr):
    """(I - aW/2)^-1 (I + aW/2) X^T, which the loop approaches from either start."""
    x = orthogonal(8, 8, dtype=np.float64)
    g = np.random.default_rng(1).normal(size=(8, 8))
    exact, _ = numpy_step(x, g, np.zeros((8, 8)), lr, 0.0, iterations=60)
    assert error(exact) <= 1e-14
    optimizer: Any = cayley_sgd(lr)
    x32, g32 = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)
    updates, _ = optimizer.update(g32, optimizer.init(x32), x32)
    got = x32 + updates
    assert error(got) <= 1e-6
    # Five halvings leave at most 0.447 / 2^5 in the direction as well, here far less.
    np.testing.assert_allclose(got, exact, atol=2e-3)
    code, _ = numpy_step(x, g, np.zeros((8, 8)), lr, 0.0, project_first=False)
    np.testing.assert_allclose(code, exact, atol=2e-2)


def test_the_worst_step_is_corrected():
    """One plane, a |W| = 1: the loop converges at its slowest."""
    x = jnp.eye(2)
    g = jnp.asarray([[0.0, 1.0], [-1.0, 0.0]])
    raw, _ = _cayley_sgd_step(x, -100 * g.mT, jnp.float32(1e3), 5, 1e-8)
    assert 5e-3 < error(raw) < 0.03
    optimizer: Any = cayley_sgd(1e3)
    updates, _ = optimizer.update(100 * g, optimizer.init(x), x)
    assert error(x + updates) <= 1e-6


# --- R0 cayley(A) ---


@pytest.mark.slow
def test_adam_keeps_the_skew_matrix_skew_to_the_last_bit():
    """Its moments of an antisymmetric gradient are antisymmetric and symmetric; A starts at 0."""
    optimizer = on_orthogonal_group(optax.adamw(1e-2))
    start = jnp.asarray(orthogonal(7, 7))
    _, state = run(optimizer, start, lambda r, key: jax.random.normal(key, r.shape), 20)
    assert np.abs(state.skew).max() > 1e-2
    np.testing.assert_array_equal(state.skew, -state.skew.mT)
    adam = state.inner[0]
    np.testing.assert_array_equal(adam.mu, -adam.mu.mT)
    np.testing.assert_array_equal(adam.nu, adam.nu.mT)


@pytest.mark.slow
def test_the_gradient_of_the_skew_matrix_is_that_of_the_loss():
    """SGD's first step on A is -lr times the skew gradient, at A = 0: R0^T G - G^T R0."""
    r0, g = orthogonal(6, 6), np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    optimizer: Any = on_orthogonal_group(optax.sgd(0.1))
    state = optimizer.init(jnp.asarray(r0))
    updates, state = optimizer.update(jnp.asarray(g), state, jnp.asarray(r0))
    np.testing.assert_allclose(state.skew, -0.1 * (r0.T @ g - g.T @ r0), atol=1e-6)
    np.testing.assert_allclose(r0 + updates, r0 @ np.asarray(cayley(state.skew)), atol=1e-6)


def test_state_shares_no_buffer_with_the_parameters():
    """A training step donates both."""
    optimizer = OPTIMIZERS["cayley_adam"]()
    r = jnp.asarray(orthogonal(4, 4))
    state = optimizer.init(r)
    step = jax.jit(lambda r, state: optimizer.update(r, state, r), donate_argnums=(0, 1))
    updates, _ = step(r, state)
    assert np.isfinite(updates).all()
