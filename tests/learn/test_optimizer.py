"""One optimizer for all groups: each at its rate, rotations orthogonal, offsets within reach."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import optax
import pytest

from qnpu_jax.learn.optimizer import clip_by_usual_norm, optimizer
from qnpu_jax.learn.orthogonal import orthogonality_error
from qnpu_jax.learn.parameters import R1, R2, Theta, group_of, initial_theta
from qnpu_jax.recipes import GROUPS, Stage


def run(
    stage: Stage, theta: Theta, steps: int, gradient: Any, total: int | None = None
) -> list[Theta]:
    """Parameters after each of `steps` steps along gradient(step)."""
    tx = optimizer(stage, total or steps)

    @jax.jit
    def step(theta: Theta, state: Any, g: Theta):
        updates, state = tx.update(g, state, theta)
        return optax.apply_updates(theta, updates), state

    state, out = tx.init(theta), [theta]
    for i in range(steps):
        theta, state = step(theta, state, gradient(i))
        out.append(theta)
    return out


def noise(theta: Theta, seed: int) -> Theta:
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=x.shape), x.dtype) for n, x in theta.items()}


def every_group(**settings: Any) -> tuple[Stage, Theta]:
    """One parameter of each kind in each group, and both rotations."""
    dec, _, free = learnable.made()
    theta = initial_theta(dec, free, GROUPS)
    some = {(key.kind, group_of(key)): key for key in theta}
    kept = {key: theta[key] for key in (R1, R2, *some.values())}
    assert {group_of(n) for n in kept} == set(GROUPS)
    return Stage(learn=learnable.ALL, **settings), kept


@pytest.mark.slow
@pytest.mark.parametrize("rotation", ["adam", "cayley_sgd"])
def test_rotations_stay_orthogonal_beside_all_else(rotation):
    stage, theta = every_group(rotation_optimizer=rotation)
    steps = run(stage, theta, 30, lambda i: noise(theta, i))
    for key, x in steps[-1].items():
        assert np.isfinite(x).all()
        assert np.abs(np.asarray(x) - np.asarray(theta[key])).max() > 1e-3, f"{key} did not move"
        if key.kind == "rotation":
            assert float(orthogonality_error(x)) <= 1e-5  # the bound


@pytest.mark.slow
def test_each_group_has_its_own_rate_and_a_cosine_to_zero():
    """Adam's step along a gradient that never changes is its rate."""
    stage, theta = every_group()
    rates = {g: 0.001 * (i + 1) for i, g in enumerate(GROUPS)}
    stage = dataclasses.replace(stage, learn=tuple(rates.items()))
    one = jax.tree.map(jnp.ones_like, theta)
    steps = run(stage, theta, 12, lambda _: one)
    cosine = (1 + np.cos(np.pi * np.arange(12) / 12)) / 2
    for name in theta:
        if (group := group_of(name)) in ("rotation", "rounding"):
            continue
        at = np.asarray([np.asarray(x[name]).ravel()[0] for x in steps])
        # float32 parameters, and Adam's epsilon beside a gradient of 1.
        np.testing.assert_allclose(-np.diff(at), rates[group] * cosine, rtol=1e-3, atol=1e-8)


@pytest.mark.slow
def test_sgd_steps_by_rate_times_gradient():
    stage, theta = every_group(optimizer="sgd")
    g = noise(theta, 0)
    after = run(stage, theta, 1, lambda _: g, total=1000)[1]
    for name in theta:
        if group_of(name) not in ("rotation", "rounding"):
            np.testing.assert_allclose(after[name], -0.01 * g[name], rtol=1e-6)


def test_rounding_goes_as_far_as_the_stage_allows():
    stage, theta = every_group()
    stage = dataclasses.replace(stage, learn=(("rounding", 0.3),))
    theta = {n: x for n, x in theta.items() if group_of(n) == "rounding"}
    up = {n: 1e-6 * jnp.ones_like(x) for n, x in theta.items()}  # signs count, not sizes
    for steps in (10, 40):
        reached = run(stage, theta, steps, lambda _: up)[-1]
        for x in reached.values():
            # The sum of a cosine from its peak is half the steps and a half: 0.3 (1 + 1/steps).
            np.testing.assert_allclose(x, -0.3 * (1 + 1 / steps), rtol=1e-4)


def test_offsets_can_learn_by_adam():
    stage, theta = every_group()
    stage = dataclasses.replace(stage, learn=(("rounding", 0.3),), rounding_optimizer="adam")
    theta = {n: x for n, x in theta.items() if group_of(n) == "rounding"}
    up = {n: 1e-3 * jnp.ones_like(x) for n, x in theta.items()}
    for x in run(stage, theta, 1, lambda _: up, total=1000)[-1].values():
        np.testing.assert_allclose(x, -0.3, rtol=1e-4)  # the first step of Adam is its rate


def test_groups_that_do_not_learn_are_refused():
    stage, theta = every_group()
    stage = dataclasses.replace(stage, learn=(("rotation", 0.1),))
    with pytest.raises(ValueError, match="label"):
        optimizer(stage, 10).init(theta)


def test_a_gradient_counts_for_twice_the_usual_at_most():
    """By hand: norms 5, 5, 500, 5 of one parameter of two entries."""
    tx = clip_by_usual_norm()
    along = np.asarray([3.0, 4.0], np.float32)
    state: Any = tx.init({"x": jnp.asarray(along)})
    out = []
    with jax.numpy_dtype_promotion("standard"):
        for size in (1, 1, 100, 1):
            update: Any
            update, state = tx.update({"x": jnp.asarray(along * size)}, state)
            out.append(np.asarray(update["x"]))
    np.testing.assert_array_equal(out[0], along)
    np.testing.assert_array_equal(out[1], along)
    np.testing.assert_allclose(out[2], 2 * along, rtol=1e-6)  # float32
    np.testing.assert_array_equal(out[3], along)


def test_a_gradient_after_none_passes_whole():
    """What has no gradient at first is no group that never learns."""
    tx = clip_by_usual_norm()
    zero, one = {"x": jnp.zeros(3)}, {"x": jnp.ones(3)}
    state: Any = tx.init(zero)
    with jax.numpy_dtype_promotion("standard"):
        for g in (zero, zero, one, zero):
            update: Any
            update, state = tx.update(g, state)
            np.testing.assert_array_equal(update["x"], g["x"])


def test_a_broken_window_moves_adam_by_little_more_than_any_other():
    stage, theta = every_group()
    theta = {key: x for key, x in theta.items() if group_of(key) == "biases"}
    stage = dataclasses.replace(stage, learn=(("biases", 0.01),))
    sizes = [1.0] * 40 + [1000.0] + [1.0] * 9
    one = jax.tree.map(jnp.ones_like, theta)
    steps = run(stage, theta, 50, lambda i: jax.tree.map(lambda x: x * sizes[i], one), 10_000)
    (key,) = list(theta)[:1]
    at = np.asarray([np.asarray(x[key]).ravel()[0] for x in steps])
    moved = np.abs(np.diff(at))
    # A gradient of twice the usual beside 1 - b1 = .1: 1.1 in the first moment.
    assert moved[40] < 1.1 * moved[39]
