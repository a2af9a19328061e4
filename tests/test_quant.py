"""Quantizers: their grid, their error and their gradients, against the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnpu_jax.config import QuantSpec
from qnpu_jax.graph import TensorSpec
from qnpu_jax.quant import code_range, expand, fake_quant, from_range, quantize

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


def lsq(x: float, s: float, z: float, qmin: float, qmax: float) -> tuple[float, float, float]:
    """d xhat / d(x, s, z), case by case as published, with the offset in codes. A value is inside
    the range if its code is: the half step beyond the last code counts as inside, as in the forward
    pass.

    Reference: Esser et al., LSQ (arXiv 1902.08153), eq. 3; Bhalgat et al., LSQ+ (arXiv
    2004.09576), eqs. 5 and 6.
    """
    u = x / s
    code = np.rint(u) + z
    if code < qmin:
        return 0.0, qmin - z, -s
    if code > qmax:
        return 0.0, qmax - z, -s
    return 1.0, np.rint(u) - u, 0.0


@pytest.mark.parametrize(("s", "z"), [(0.25, 0.0), (0.5, 3.0), (1.0, -8.0)])
def test_gradients_are_the_published_ones(s, z):
    # 47 points per code, none on a rounding tie; the outermost codes are hit exactly as well.
    x = np.concatenate([np.arange(-20 * 47, 20 * 47) / 47 * s, (np.arange(-8, 8) - z) * s])
    x = x[np.abs(x / s % 1 - 0.5) > 1e-3].astype(np.float32)
    low, high = jnp.float32(-8), jnp.float32(7)
    gradient = jax.vmap(jax.grad(fake_quant, (0, 1, 2)), (0, None, None, None, None))
    got = gradient(jnp.asarray(x), jnp.float32(s), jnp.float32(z), low, high)
    expected = np.asarray([lsq(float(v), s, z, -8, 7) for v in x])
    # u = x / s up to 20 is rounded to float32 twice, and multiplied by d(1/s) = 1/s^2 and s.
    np.testing.assert_allclose(np.stack(got, 1), expected, atol=4 * 20 * 2**-23)


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
