"""Quantizers: their grid, their error and their gradients, against the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnpu_jax.config import QuantSpec
from qnpu_jax.fakequant.fake_quant import fake_quant, lsq_factor, round_ste, scale_gradient
from qnpu_jax.graph.graph import TensorSpec
from qnpu_jax.graph.qparams import code_range, expand, from_range, quantize

BITS = st.sampled_from([2, 4, 8, 16])
EXPONENT = st.floats(-12, 12)
SEEDS = st.integers(0, 2**32 - 1)


def activation(bits: int, symmetric: bool = False) -> TensorSpec:
    return TensorSpec("x", (64,), "activation", QuantSpec((bits,), symmetric))


@st.composite
def ranges(draw):
    """Values with their bits, and the parameters that span them."""
    bits, symmetric = draw(BITS), draw(st.booleans())
    rng = np.random.default_rng(draw(SEEDS))
    x = (rng.normal(rng.normal() * 2, 1, 64) * 2.0 ** draw(EXPONENT)).astype(np.float32)
    return x, bits, symmetric, from_range(x.min(), x.max(), np.asarray(bits), symmetric)


def fake_quantized(x, q, spec) -> np.ndarray:
    qmin, qmax = (jnp.asarray(v[0]) for v in code_range(spec))
    y = fake_quant(jnp.asarray(x), jnp.asarray(q.scale), jnp.asarray(q.zero_point), qmin, qmax)
    return np.asarray(y)


def test_code_ranges_are_those_of_the_kernels():
    weight = TensorSpec("w", (4,), "param", QuantSpec((2, 4, 8), True))
    np.testing.assert_array_equal(code_range(weight), [[-1, -7, -127], [1, 7, 127]])
    activations = TensorSpec("x", (4,), "activation", QuantSpec((2, 4, 8, 16)))
    expected = [[-2, -8, -128, -32768], [1, 7, 127, 32767]]
    np.testing.assert_array_equal(code_range(activations), expected)


@given(ranges())
def test_values_inside_the_range_err_by_at_most_half_a_step(case):
    x, bits, symmetric, q = case
    codes = quantize(x, q.scale, q.zero_point, activation(bits, symmetric))
    scale, zero = float(q.scale), float(q.zero_point)
    error = np.abs((codes - zero) * scale - x.astype(np.float64))
    # The rounded zero point may leave out half a step at one end, where codes saturate (a second
    # half); the float32 scale adds 2^-24 of each code.
    limit = 0.5 if symmetric or bits == 16 else 1.0
    qmax = 2.0 ** (bits - 1) - 1
    if symmetric or bits == 16:
        assert np.abs(x).max() <= scale * qmax * (1 + 2**-23)
    assert error.max() <= scale * (limit + 2 ** (bits - 23))


@given(ranges())
def test_fake_quant_is_quantize_and_back(case):
    x, bits, symmetric, q = case
    spec = activation(bits, symmetric)
    y = fake_quantized(x, q, spec)
    codes = np.rint(y.astype(np.float64) / float(q.scale)) + float(q.zero_point)
    expected = quantize(x, q.scale, q.zero_point, spec)
    # x / s is rounded to float32 before it is rounded to a code: only values within 2^-23 of it
    # of a tie may land on the other side.
    u = x.astype(np.float64) / float(q.scale)
    tie = np.abs(np.abs(u - np.floor(u)) - 0.5) <= np.abs(u) * 2**-23
    assert np.all((codes == expected) | tie)
    assert np.abs(codes - expected).max() <= 1


@given(ranges())
def test_the_grid_stays_where_it_is(case):
    x, bits, symmetric, q = case
    spec = activation(bits, symmetric)
    once = fake_quantized(x, q, spec)
    np.testing.assert_array_equal(fake_quantized(once, q, spec), once)
    codes = quantize(x, q.scale, q.zero_point, spec)
    real = (codes - float(q.zero_point)) * np.float64(q.scale)
    np.testing.assert_array_equal(quantize(real, q.scale, q.zero_point, spec), codes)


@given(ranges())
def test_zero_is_a_code(case):
    _, bits, symmetric, q = case
    qmin, qmax = (v[0] for v in code_range(activation(bits, symmetric)))
    assert qmin <= q.zero_point <= qmax and q.zero_point == np.rint(q.zero_point)
    assert np.all(fake_quantized(np.zeros(64, np.float32), q, activation(bits, symmetric)) == 0)


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), BITS)
def test_symmetric_and_16_bit_zero_points_are_0(a, b, bits):
    lo, hi = min(a, b), max(a, b)
    assert from_range(lo, hi, np.asarray(bits), True).zero_point == 0
    assert from_range(lo, hi, np.asarray(16), False).zero_point == 0


@given(st.floats(2**-20, 1e4, width=32), st.sampled_from([2, 4, 8]))
def test_weights_leave_the_lowest_code_out(bound, bits):
    q = from_range(-bound, bound, np.asarray(bits), True, narrow=True)
    qmax = 2 ** (bits - 1) - 1
    assert q.scale == np.float32(bound / qmax) and q.zero_point == 0
    spec = TensorSpec("w", (3,), "param", QuantSpec((bits,), True))
    codes = quantize(np.asarray([-2 * bound, -bound, bound]), q.scale, q.zero_point, spec)
    np.testing.assert_array_equal(codes, [-qmax, -qmax, qmax])


def test_an_all_zero_tensor_has_a_usable_scale():
    q = from_range(0.0, 0.0, np.asarray(8), False)
    assert np.isfinite(q.scale) and q.scale > 0 and np.isfinite(1 / q.scale)
    np.testing.assert_array_equal(fake_quantized(np.zeros(3, np.float32), q, activation(8)), 0)


def test_asymmetric_range_uses_every_code():
    q = from_range(np.asarray([-1.0, 0.0, -3.0]), np.asarray([3.0, 5.1, 0.0]), np.asarray(8), False)
    np.testing.assert_allclose(q.scale, [4 / 255, 5.1 / 255, 3 / 255], rtol=2**-23)
    np.testing.assert_array_equal(q.zero_point, [-64, -128, 127])


def lsq(x, s, z, qmin, qmax, masked=True) -> np.ndarray:
    """d xhat / d(x, s, z) as published, with the offset in codes, in float64: (3, ...). A value is
    inside the range if its code is: the half step beyond the last code counts as inside, as in the
    forward pass.

    Reference: Esser et al., LSQ (arXiv 1902.08153), eqs. 3 and 5; Bhalgat et al., LSQ+ (arXiv
    2004.09576), eqs. 5 and 6.
    """
    x, s, z = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (x, s, z)))
    u = x / s
    code = np.rint(u) + z
    cases = [code < qmin, code > qmax]
    dx = np.select(cases, [0, 0] if masked else [1, 1], 1)
    ds = np.select(cases, [qmin - z, qmax - z], np.rint(u) - u)
    return np.stack([dx, ds, np.select(cases, [-s, -s], 0)])


def off_ties(s: float, z: float) -> np.ndarray:
    """Values on both sides of [-8, 7], clear of ties: 47 per code, and the codes themselves."""
    x = np.concatenate([np.arange(-20 * 47, 20 * 47) / 47 * s, (np.arange(-8, 8) - z) * s])
    return x[np.abs(x / s % 1 - 0.5) > 1e-3].astype(np.float32)


LOW, HIGH = np.float32(-8), np.float32(7)
SCALE_ZERO = pytest.mark.parametrize(("s", "z"), [(0.25, 0.0), (0.5, 3.0), (1.0, -8.0)])
# u = x / s up to 20 is rounded to float32, as is its distance to the code.
ATOL = 4 * 20 * 2**-23


@pytest.mark.parametrize("masked", [True, False])
@SCALE_ZERO
def test_gradients_are_the_published_ones(s, z, masked):
    x = off_ties(s, z)

    def f(x, s, z):
        return fake_quant(x, s, z, LOW, HIGH, masked=masked)

    got = jax.vmap(jax.grad(f, (0, 1, 2)), (0, None, None))(x, jnp.float32(s), jnp.float32(z))
    np.testing.assert_allclose(np.stack(got), lsq(x, s, z, -8, 7, masked), atol=ATOL)


@SCALE_ZERO
def test_gradients_are_differences_of_the_piecewise_surrogate(s, z):
    """The quantizer itself is a staircase, flat almost everywhere. Straight-through means the
    derivative of what is left when the rounding residual r = round(u) - u and the choice of piece
    are held: (u + r) s inside, (qmin - z) s or (qmax - z) s outside. That is linear in x, s and z,
    so central differences are exact but for float64 rounding."""
    x = off_ties(s, z).astype(np.float64)
    residual, code = np.rint(x / s) - x / s, np.rint(x / s) + z

    def surrogate(x, s, z):
        clipped = np.where(code < -8, (-8 - z) * s, (7 - z) * s)
        return np.where((code < -8) | (code > 7), clipped, x + residual * s)

    at, h = np.asarray([np.zeros_like(x) + v for v in (x, s, z)]), 1e-3
    step = [h * np.eye(3)[i].reshape(3, 1) for i in range(3)]
    slopes = [(surrogate(*(at + d)) - surrogate(*(at - d))) / (2 * h) for d in step]
    gradient = jax.vmap(jax.grad(fake_quant, (0, 1, 2)), (0, None, None, None, None))
    got = gradient(jnp.asarray(x, jnp.float32), jnp.float32(s), jnp.float32(z), LOW, HIGH)
    np.testing.assert_allclose(np.stack(got), slopes, atol=ATOL)


def test_the_gradient_of_x_is_the_slope_under_dither():
    """Dither (uniform over one step) averages the staircase to a clipped line, whose slope the
    masked straight-through gradient must be, beyond half a step from the ends: there the line bends
    where the code does not."""
    s, dither = 0.5, ((np.arange(64) + 0.5) / 64 - 0.5).astype(np.float32)
    u = np.asarray([-20, -11, -9.3, -6.7, -1, 0, 0.4, 5.2, 8.6, 30], np.float32)

    def mean(x):  # of the actual forward pass
        noisy = (x[:, None] + s * dither[None, :]).astype(np.float32)
        return fake_quant(jnp.asarray(noisy), jnp.float32(s), jnp.float32(0), LOW, HIGH).mean(1)

    h = s * np.float32(
        0.25
    )  # a multiple of the dither's spacing: differences of the mean are exact
    slope = (mean(u * s + h) - mean(u * s - h)) / (2 * h)
    gradient = jax.vmap(jax.grad(fake_quant), (0, None, None, None, None))
    got = gradient(jnp.asarray(u * s), jnp.float32(s), jnp.float32(0), LOW, HIGH)
    np.testing.assert_allclose(got, slope, atol=1e-6)  # a mean of 64 float32 codes


SHAPES = [((), ()), ((1,), ()), ((3, 1), (3, 1)), ((3, 1), ()), ((1, 5), (3, 1)), ((3, 5), (1, 1))]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("scale_shape", "zero_shape"), SHAPES)
def test_gradients_are_summed_over_what_broadcasts(scale_shape, zero_shape, masked):
    rng = np.random.default_rng(len(scale_shape))
    x = rng.normal(0, 4, (3, 5)).astype(np.float32)
    g = rng.normal(size=(3, 5)).astype(np.float32)
    s = rng.uniform(0.3, 1, scale_shape).astype(np.float32)
    z = rng.integers(-3, 3, zero_shape).astype(np.float32)

    def loss(x, s, z, low, high):
        return jnp.sum(g * fake_quant(x, s, z, low, high, masked=masked))

    args = (jnp.asarray(x), jnp.asarray(s), jnp.asarray(z), jnp.asarray(LOW), jnp.asarray(HIGH))
    with jax.numpy_rank_promotion("allow"):  # a scale of (1,), as an op's caller may have it
        got = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*args)
    dx, ds, dz = g * lsq(x, s, z, -8, 7, masked)
    for d, value, like in zip(got, (dx, ds, dz), (x, s, z), strict=False):
        full = np.broadcast_shapes((1,) * (2 - like.ndim) + like.shape)
        axes = tuple(i for i, n in enumerate(full) if n == 1)
        expected = value.sum(axes, keepdims=True).reshape(like.shape)
        assert d.shape == like.shape and d.dtype == like.dtype
        np.testing.assert_allclose(d, expected, atol=15 * 8 * 2**-23)  # 15 terms of up to 8
    assert got[3] == 0 and got[4] == 0


@pytest.mark.slow
def test_transformations_agree_with_a_loop():
    """vmap (x alone, then all), scan and checkpoint: the same value and gradients as one by one."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(0, 4, (4, 6)), jnp.float32)
    s = jnp.asarray(rng.uniform(0.3, 1, 4), jnp.float32)
    z = jnp.asarray(rng.integers(-3, 3, 4), jnp.float32)
    low, high = np.full(4, LOW), np.full(4, HIGH)

    def one(x, s, z, low, high):
        return jnp.sum(fake_quant(x, s, z, low, high) ** 2)

    gradient = jax.value_and_grad(one, (0, 1, 2))
    single = jax.jit(gradient)

    def loop(s, z):
        return jax.tree.map(lambda *v: np.stack(v), *map(single, x, s, z, low, high))

    def assert_close(got, expected):  # sums of at most 24 terms, in another order
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), got, expected)

    expected = loop(s, z)
    assert_close(jax.vmap(gradient)(x, s, z, low, high), expected)

    value, (dx, ds, dz) = loop(s[:1].repeat(4), z[:1].repeat(4))
    over_x = jax.vmap(gradient, (0, None, None, None, None))
    assert_close(jax.jit(over_x)(x, s[0], z[0], LOW, HIGH), (value, (dx, ds, dz)))

    @jax.jit
    def batch(x, s, z):  # the scale is outside of vmap: its gradient is the batch's sum
        return jnp.sum(jax.vmap(one, (0, None, None, None, None))(x, s, z, LOW, HIGH))

    assert_close(jax.grad(batch, (0, 1, 2))(x, s[0], z[0]), (dx, ds.sum(), dz.sum()))

    @jax.jit
    def scanned(x, s, z):
        step = jax.checkpoint(lambda total, v: (total + one(*v), None))
        return jax.lax.scan(step, jnp.float32(0), (x, s, z, low, high))[0]

    got = jax.value_and_grad(scanned, (0, 1, 2))(x, s, z)
    assert_close(got, (expected[0].sum(), expected[1]))


def test_the_value_is_the_equation_with_positive_zeros():
    x = jnp.asarray([-0.1, -0.0, 0.1, 1e30, -1e30, np.inf, np.nan], jnp.float32)
    one, zero = jnp.float32(1), jnp.float32(0)
    for f in (fake_quant, jax.jit(fake_quant)):
        y = np.asarray(f(x, one, zero, LOW, HIGH))
        np.testing.assert_array_equal(y, [0, 0, 0, 7, -8, 7, np.nan])
        assert not np.signbit(y[:3]).any()


def test_scale_gradient_is_the_identity_with_a_scaled_gradient():
    x = jnp.asarray([0.1, -3.0, 7.0], jnp.float32)
    per_value = np.asarray([1.0, 2.0, 0.5], np.float32)
    for factor in (0.25, np.float64(0.25), jnp.float32(0.25), per_value):
        y, pull_back = jax.vjp(lambda x, f=factor: scale_gradient(x, f), x)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(pull_back(x)[0], x * np.asarray(factor, np.float32))
    jitted = jax.jit(jax.grad(lambda x, f: jnp.sum(scale_gradient(x, f))))
    np.testing.assert_array_equal(jitted(x, jnp.float32(0.25)), np.full(3, 0.25))


def test_lsq_factor():
    assert lsq_factor(576, 127) == pytest.approx(1 / np.sqrt(576 * 127))
    layers = lsq_factor(64, np.asarray([7, 127, 32767], np.float32))
    np.testing.assert_allclose(layers, 1 / np.sqrt(64 * np.asarray([7, 127, 32767])), rtol=2**-22)


def test_round_ste_rounds_half_to_even_and_passes_gradients():
    x = jnp.asarray([-1.5, -0.5, 0.5, 1.5, 2.5, 0.3, 1e9], jnp.float32)
    y, pull_back = jax.vjp(jax.jit(round_ste), x)
    np.testing.assert_array_equal(y, [-2, 0, 0, 2, 2, 0, 1e9])
    np.testing.assert_array_equal(pull_back(x)[0], x)
    assert jax.grad(lambda v: round_ste(v) ** 2)(jnp.float32(1.4)) == 2  # 2 round(v)


def test_per_channel_scales_broadcast_along_their_axis():
    spec = TensorSpec("w", (2, 3), "param", QuantSpec((8,), True, axis=0))
    assert expand(np.asarray([1.0, 2.0]), spec).shape == (2, 1)
    spec = TensorSpec("w", (2, 3), "param", QuantSpec((8,), True, axis=1))
    assert expand(np.asarray([1.0, 2.0, 3.0]), spec).shape == (1, 3)
    assert expand(np.asarray(1.0), activation(8)).shape == ()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_scale_gradient_of_a_tensor_does_not_cancel(bits):
    """ds sums values below 1/2; as the difference of two sums of codes, float32 would lose them."""
    rng = np.random.default_rng(bits)
    x, g = rng.normal(size=(2, 256, 576)).astype(np.float32)
    g += np.float32(0.3) * x  # as a loss gives it, which makes both sums large
    qmax = np.float32(2 ** (bits - 1) - 1)
    s = np.float32(np.abs(x).max() / qmax)

    def total(s):
        y = fake_quant(jnp.asarray(x), s, jnp.float32(0), jnp.float32(-qmax - 1), jnp.float32(qmax))
        return jnp.sum(y * g)

    got = float(jax.jit(jax.grad(total))(jnp.float32(s)))
    codes = np.rint(x / s).astype(np.float64)
    step = codes - x.astype(np.float64) / s
    # Each term carries the rounding of code * s, 2^-24 of the code, and |g|; they add up at random.
    noise = qmax * 2**-24 * np.sqrt(np.sum(g.astype(np.float64) ** 2))
    # 147,456 float32 additions of terms of up to 0.5 |g|.
    sums = 2**-24 * np.sum(np.abs(g * step))
    assert abs(got - np.sum(g * step)) <= 3 * (noise + sums)
