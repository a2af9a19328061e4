"""What learning minimises, against formulas written out in NumPy and against its own parts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import pytest

from qnpu_jax.fakequant.forward import Reading, token_nll
from qnpu_jax.learn import losses, train
from qnpu_jax.learn.losses import (
    Batch,
    TopK,
    held_out_kl,
    hidden_error,
    kl,
    objective,
    top_k,
    top_k_kl,
)
from qnpu_jax.learn.parameters import R1, ThetaKey, initial_theta, merge_theta, student_reading
from qnpu_jax.recipes import Effort, Stage

KL = dataclasses.replace(learnable.ROTATED, learn=())
IDS = jnp.asarray(learnable.random_ids(4, seed=2))
COLD, WARM = jnp.float32(0), jnp.float32(1)


def logits(seed: int, shape: tuple[int, int] = (5, 9)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 3, shape), jnp.float32)


def softmax(x: Any) -> np.ndarray:
    """float64."""
    e = np.exp(np.asarray(x, np.float64))
    return e / e.sum(axis=-1, keepdims=True)


def by_hand(teacher: Any, student: Any) -> np.ndarray:
    """KL of each row, float64."""
    p, q = softmax(teacher), softmax(student)
    return (p * (np.log(p) - np.log(q))).sum(axis=-1)


# --- Of logits ---


def test_kl_is_the_formula():
    a, b = logits(0), logits(1)
    np.testing.assert_allclose(kl(a, b), by_hand(a, b), rtol=1e-5)
    assert not np.allclose(kl(a, b), kl(b, a), rtol=0.1), "teacher and student are told apart"
    np.testing.assert_allclose(kl(a, b), kl(a + 7, b - 3), rtol=1e-4)  # logits up to a constant


def test_kl_of_a_model_to_itself_is_0():
    np.testing.assert_array_equal(kl(logits(0), logits(0)), 0)
    found = top_k_kl(top_k(logits(0), 4), logits(0))
    np.testing.assert_allclose(found, 0, atol=1e-6)  # renormalised twice in float32


@pytest.mark.parametrize("k", [9, 100], ids=["all", "more-than-there-are"])
def test_kl_over_all_tokens_is_kl(k):
    a, b = logits(0), logits(1)
    np.testing.assert_allclose(top_k_kl(top_k(a, k), b), kl(a, b), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_kl_over_the_likeliest_is_renormalised(k):
    a, b = logits(0), logits(1)
    chosen = np.argsort(-np.asarray(a), axis=-1)[:, :k]
    expected = by_hand(*(np.take_along_axis(np.asarray(x), chosen, -1) for x in (a, b)))
    found = top_k(a, k)
    np.testing.assert_array_equal(found.ids, chosen)
    np.testing.assert_allclose(found.log_p, np.log(np.sort(softmax(a))[:, ::-1][:, :k]), rtol=1e-5)
    np.testing.assert_allclose(top_k_kl(found, b), expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(top_k_kl(found, b)) >= 0).all() and (expected[0] > 0 or k == 1)


def test_hidden_error_is_relative_in_every_layer():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    y = x + np.asarray([0.1, -0.2], np.float32)[:, None, None]
    expected = np.mean([(0.1**2 * 12) / (x[0] ** 2).sum(), (0.2**2 * 12) / (x[1] ** 2).sum()])
    assert float(hidden_error(jnp.asarray(y), jnp.asarray(x))) == pytest.approx(expected, rel=1e-4)
    large = np.asarray([1, 1000], np.float32)[:, None, None]  # massive activations of one layer
    found = hidden_error(jnp.asarray(y * large), jnp.asarray(x * large))
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(hidden_error(jnp.asarray(x), jnp.asarray(x))) == 0


# --- Of the model ---


def setting(**changes: Any):
    """Decoder, base and a random rotation."""
    dec, params, free = learnable.made()
    theta = learnable.random_theta(dec, free, ["rotation", "rotated", "weights"])
    return dec, learnable.base_of(dec, params, free, **changes), theta


def loss(stage: Stage, base, theta, ids=IDS, warm=COLD, cached: TopK | None = None) -> float:
    with jax.disable_jit():
        return float(objective(learnable.made()[0], stage, base, theta, Batch(ids, cached), warm))


def student_logits(stage: Stage, base, theta) -> list[np.ndarray]:
    dec = learnable.made()[0]
    return [learnable.logits_of(dec, student_reading(dec, stage, base, theta), x) for x in IDS]


def teacher_logits(base) -> list[np.ndarray]:
    return [learnable.logits_of(learnable.made()[0], Reading(base.teacher, {}), x) for x in IDS]


@pytest.mark.slow
@pytest.mark.nightly
def test_cross_entropy_is_that_of_the_next_token():
    _, base, theta = setting()
    stage = dataclasses.replace(KL, loss="ce")
    pairs = zip(student_logits(stage, base, theta), IDS, strict=True)
    nll = [token_nll(jnp.asarray(x), ids) for x, ids in pairs]
    assert loss(stage, base, theta) == pytest.approx(np.mean(nll), rel=1e-5)


@pytest.mark.slow
def test_kl_is_from_the_float_teacher_to_the_student():
    dec, base, theta = setting()
    pairs = zip(teacher_logits(base), student_logits(KL, base, theta), strict=True)
    expected = np.mean([by_hand(a, b) for a, b in pairs])
    assert expected > 0.01
    assert loss(KL, base, theta) == pytest.approx(expected, rel=1e-4)
    with jax.disable_jit():
        found = held_out_kl(dec, dataclasses.replace(KL, top_k=4, loss="ce"), base, theta, IDS)
    by_window = [
        by_hand(a, b).mean()
        for a, b in zip(teacher_logits(base), student_logits(KL, base, theta), strict=True)
    ]
    np.testing.assert_allclose(
        found, by_window, rtol=1e-4, err_msg="the whole vocabulary's, whatever learns"
    )


@pytest.mark.slow
def test_the_cached_teacher_is_the_teacher():
    _, base, theta = setting()
    stage = dataclasses.replace(KL, top_k=4)
    kept = [top_k(jnp.asarray(x), 4) for x in teacher_logits(base)]
    cached = TopK(*(jnp.stack(column) for column in zip(*kept, strict=True)))
    expected = loss(stage, base, theta)
    assert loss(stage, base, theta, cached=cached) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(loss(KL, base, theta), rel=1e-2)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_loss_of_a_batch_is_the_mean_of_its_sequences():
    _, base, theta = setting()
    for stage, warm in (
        (dataclasses.replace(KL, hidden_mse=0.3, warmup=0.5), WARM),
        (dataclasses.replace(KL, loss="ce"), COLD),
    ):
        singles = [loss(stage, base, theta, x[None], warm) for x in IDS]
        assert np.std(singles) > 1e-3
        assert loss(stage, base, theta, IDS, warm) == pytest.approx(np.mean(singles), rel=1e-5)


def test_weights_of_the_losses_add_up():
    _, base, theta = setting()
    hidden = loss(dataclasses.replace(KL, loss="hidden"), base, theta)
    both = loss(dataclasses.replace(KL, hidden_mse=0.25), base, theta)
    assert hidden > 1e-3
    assert both == pytest.approx(loss(KL, base, theta) + 0.25 * hidden, rel=1e-5)


@pytest.fixture
def float_student(monkeypatch):
    """A student that quantizes nothing."""

    def unquantized(*args: Any, **kwargs: Any) -> Reading:
        return dataclasses.replace(student_reading(*args, **kwargs), scales={})

    monkeypatch.setattr(losses, "student_reading", unquantized)


@pytest.mark.slow
@pytest.mark.usefixtures("float_student")
def test_a_rotated_float_student_makes_no_error():
    """Its residual stream is x B R1, where B is what earlier stages have merged."""
    dec, params, free = learnable.made()
    first = learnable.random_theta(dec, free, ["rotation"], seed=1)
    after, _ = merge_theta(dec, KL, params, free, first)
    basis = np.asarray(first[R1])
    theta = learnable.random_theta(dec, free, ["rotation", "diagonal"], seed=2)
    hidden = dataclasses.replace(KL, loss="hidden")
    for moving, turned in ((theta, basis), (initial_theta(dec, free, []), basis)):
        base = learnable.base_of(dec, after, free, teacher=dict(params), basis=turned)
        # Relative squares: float32 leaves 1e-6 of a residual of two layers.
        assert loss(hidden, base, moving) < 1e-11
        assert abs(loss(KL, base, moving)) < 1e-6
        wrong = learnable.base_of(dec, after, free, teacher=dict(params))
        assert loss(hidden, wrong, moving) > 0.1


# --- Gradients ---


@pytest.mark.slow
@pytest.mark.nightly
def test_local_errors_reach_scales_only():
    dec, params, free = learnable.made()
    stage = dataclasses.replace(KL, warmup=0.5)
    groups = ("rotation", "diagonal", "rotated", "weights", "biases", "rounding")
    theta, base = learnable.random_theta(dec, free, groups), learnable.base_of(dec, params, free)

    def gradient(warm: jax.Array) -> dict[ThetaKey, np.ndarray]:
        with jax.disable_jit():
            found = jax.grad(lambda t: objective(dec, stage, base, t, Batch(IDS), warm))(theta)
        return {n: np.asarray(g) for n, g in found.items()}

    cold, warm = gradient(COLD), gradient(WARM)
    for key, g in warm.items():
        if key.kind in ("scale", "weight_scale") and key.tensor.startswith("layers."):
            assert np.abs(g - cold[key]).max() > 0, key
        elif key.kind != "zero_point":
            np.testing.assert_array_equal(g, cold[key], err_msg=str(key))
    added = loss(stage, base, theta, warm=WARM) - loss(stage, base, theta)
    assert added > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "cached"])
def test_a_batch_in_parts_has_the_gradient_of_the_batch(monkeypatch, parts, kept):
    """Of any loss that is a mean over sequences, as the objective is; what was kept of the teacher
    goes with its sequence."""

    name = ThetaKey("scale", "x")

    def mean(dec, stage, base, theta, batch, warm):
        x, (ids, cached) = theta[name], batch
        target = jnp.float32(2)
        if cached is not None:
            target = cached.log_p[:, 0, 0] + cached.ids[:, 0, 1].astype(jnp.float32)
        return jnp.mean(jnp.square(ids.astype(jnp.float32) @ x - target)) + warm * jnp.sum(x)

    monkeypatch.setattr(train, "objective", mean)
    dec, params, free = learnable.made()
    base = learnable.base_of(dec, params, free)
    theta = {name: jnp.linspace(-1, 1, learnable.TOKENS)}
    stage = Stage(learn=(("unrotated", 1e-3),), optimizer="sgd")
    values = jnp.arange(4 * learnable.TOKENS * 3).reshape(4, learnable.TOKENS, 3)
    cached = TopK(values.astype(jnp.float32), values) if kept else None
    found = []
    for cut in (1, parts):
        effort = Effort("test", steps=10, batch=4, length=learnable.TOKENS, accumulate=cut)
        run = train.compile_stage(dec, stage, effort, 10)
        state = train.initial_state(stage, jax.tree.map(jnp.array, theta), 10)
        state, value, norms = run.step(state, base, Batch(IDS, cached), WARM)
        found.append((state.theta, value, norms))
    assert not np.allclose(found[0][0][name], theta[name])
    # Sums of the same terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)
