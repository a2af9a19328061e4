"""Statistics are streamed without loss; ranges are those that their methods promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from qnpu_jax.calibrate.ranges import calibrate_activations, mse_range, weight_scales
from qnpu_jax.calibrate.statistics import BINS, Stats, collect_statistics
from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.passes import passes
from qnpu_jax.graph.qparams import from_range
from qnpu_jax.graph.tensor_classes import tensor_class

CHUNKS = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 300), st.floats(-20, 20)),
    min_size=1,
    max_size=6,
)


def drawn(chunks) -> list[np.ndarray]:
    return [
        (np.random.default_rng(seed).normal(0.3, 1, n) * 2.0**e).astype(np.float32)
        for seed, n, e in chunks
    ]


def streamed(parts) -> Stats:
    stats = Stats()
    for part in parts:
        stats.add(part, histogram=True)
    return stats


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_no_histogram_is_wide_enough_for_what_is_not_finite(value):
    with pytest.raises(UserError, match="holds NaN or Inf on the calibration text; expected"):
        streamed([np.asarray([1, value], np.float32)])


@given(CHUNKS)
def test_streaming_equals_one_pass_over_all_values(chunks):
    parts = drawn(chunks)
    x = np.concatenate(parts)
    stats, once = streamed(parts), streamed([x])
    assert (stats.low, stats.high, stats.count) == (x.min(), x.max(), x.size)
    wide = x.astype(np.float64)
    # Squares of one part are summed in float32, up to 300 of them: 300 * 2^-24 relative.
    np.testing.assert_allclose(stats.mean, wide.mean(), atol=1e-9 * np.abs(wide).max())
    power = np.mean(wide**2)
    assert abs(stats.std**2 - wide.var()) <= 300 * 2**-24 * power
    assert stats.width == once.width
    assert stats.bins is not None and once.bins is not None
    np.testing.assert_array_equal(stats.bins, once.bins)


@given(CHUNKS)
def test_every_value_is_counted_in_the_bin_it_lies_in(chunks):
    x = np.concatenate(drawn(chunks))
    stats = streamed([x])
    assert stats.bins is not None and stats.bins.sum() == x.size
    edges = (np.arange(BINS + 1) - BINS // 2) * stats.width
    np.testing.assert_array_equal(stats.bins, np.histogram(x.astype(np.float64), edges)[0])
    # A power of two, no wider than twice what the largest value needs.
    assert np.log2(stats.width) % 1 == 0
    assert np.abs(x).max() <= stats.width * BINS / 2 <= 4 * np.abs(x).max()


def test_a_wider_value_doubles_the_width_and_keeps_the_counts():
    stats = streamed([np.linspace(-1, 1, 1001, dtype=np.float32)])
    assert stats.bins is not None
    width, fine = stats.width, stats.bins.copy()
    stats.add(np.asarray([7.9], np.float32), histogram=True)
    assert stats.width == 4 * width and stats.bins.sum() == 1002
    coarse = fine.reshape(-1, 4).sum(1)
    middle = stats.bins[BINS // 2 - BINS // 8 : BINS // 2 + BINS // 8]
    np.testing.assert_array_equal(middle, coarse)


def test_zeros_first_leave_room_for_what_follows():
    stats = streamed([np.zeros(5, np.float32), np.asarray([-3.0, 2.0], np.float32)])
    assert stats.bins is not None and stats.bins.sum() == 7 and stats.bins[BINS // 2] == 5
    assert (stats.low, stats.high) == (-3, 2)


@pytest.mark.slow
@pytest.mark.nightly
def test_memory_does_not_grow_with_the_text():
    def kept(stats) -> int:
        return sum(0 if s.bins is None else s.bins.nbytes for rows in stats.values() for s in rows)

    dec, params, _ = tiny.calibrated("gqa_llama3", "w8a8")
    short, long = (
        collect_statistics(dec, params, tiny.random_ids((n, tiny.TOKENS)), batch=2) for n in (2, 12)
    )
    assert short.keys() == long.keys() and kept(short) == kept(long) > 0
    assert all(len(short[n]) == len(long[n]) for n in short)
    assert long["layers.mlp.act"][0].count == 6 * short["layers.mlp.act"][0].count


@pytest.mark.slow
def test_collect_sees_every_value_of_its_tensors():
    dec, params, _ = tiny.calibrated("gqa_llama3", "w8a8")
    ids = tiny.random_ids((3, tiny.TOKENS))
    stats = collect_statistics(dec, params, ids, batch=2)
    members = {
        "layers.mlp.act": ["mlp.act"],
        "layers.attn.kv0.mixed": ["attn.kv0.mixed", "attn.kv1.mixed"],
        "layers.attn.k_cache": ["attn.k_cache"],
    }
    seen = {name: [[] for _ in range(2)] for name in members}
    names = tuple(name for group in members.values() for name in group)
    for graph, layer, env in passes(
        dec, params, jnp.asarray(ids), lambda g: names if g is dec.layer else ()
    ):
        if graph is dec.layer:
            for name, parts in members.items():
                seen[name][layer] += [np.asarray(env[p]).ravel() for p in parts]
    prefix = np.asarray(params["layers.attn.prefix_k"])
    for name, layers in seen.items():
        for layer, parts in enumerate(layers):
            x = np.concatenate(parts)
            got = stats[name][layer]
            if name.endswith("k_cache"):
                x = np.concatenate([x, prefix[layer].ravel()])
                assert got.low <= prefix[layer].min() and prefix[layer].max() <= got.high
            assert got.count == x.size
            # Batches of 2 and 3 may sum in another order.
            np.testing.assert_allclose([got.low, got.high], [x.min(), x.max()], rtol=1e-5)


# Ranges of activations.


def error_of(x: np.ndarray, lo: float, hi: float, bits: int, symmetric: bool) -> float:
    """Root mean square of x_fq - x."""
    q = from_range(lo, hi, np.asarray(bits), symmetric)
    qmax = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(x / np.float64(q.scale)) + q.zero_point, -qmax - 1, qmax)
    return float(np.sqrt(np.mean(((codes - q.zero_point) * np.float64(q.scale) - x) ** 2)))


@settings(max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "laplace", "lognormal", "uniform"]),
    st.sampled_from([4, 8]),
    st.booleans(),
)
def test_mse_range_is_no_worse_than_min_max(seed, distribution, bits, symmetric):
    x = getattr(np.random.default_rng(seed), distribution)(size=4000).astype(np.float32)
    stats = streamed([x])
    lo, hi = mse_range(stats, bits, symmetric)
    if symmetric:
        assert lo == -hi and 0 < hi <= max(-stats.low, stats.high)
    else:
        assert min(stats.low, 0) <= lo <= 0 <= hi <= max(stats.high, 0)
    x = x.astype(np.float64)
    best, plain = (error_of(x, a, b, bits, symmetric) for a, b in ((lo, hi), (x.min(), x.max())))
    # The choice was made on bins: values move by up to half a width, twice.
    assert best <= plain + stats.width


def test_mse_range_clips_a_lone_outlier_at_4_bits():
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    stats = streamed([np.append(x, np.float32(50))])
    lo, hi = mse_range(stats, 4, False)
    assert hi < 10
    wide = np.append(x, 50.0)
    assert error_of(wide, lo, hi, 4, False) < 0.7 * error_of(wide, stats.low, stats.high, 4, False)


CLASSES = {
    ("layers.mlp.residual", 16): "wide",
    ("layers.mlp.act", 16): "wide",
    ("layers.attn.kv0.probs", 8): "probs",
    ("layers.attn.k_cache", 8): "cache",
    ("layers.attn.v_cache", 8): "cache",
    ("layers.attn.input", 8): "rotated",
    ("head.input", 8): "rotated",
    ("layers.attn.kv0.mixed", 8): "rotated",
    ("layers.mlp.down", 8): "rotated",
    ("layers.mlp.act", 8): "unrotated",
    ("layers.attn.q", 8): "unrotated",
    ("head.logits", 8): "logits",
}


def test_tensor_classes():
    assert {key: tensor_class(*key) for key in CLASSES} == CLASSES


@pytest.mark.parametrize("prefix", [(), tiny.PREFIX])
def test_ranges_follow_the_class_of_their_tensor(prefix):
    dec, params, _ = tiny.calibrated("gqa_llama3", "w8a8", prefix)
    stats = collect_statistics(dec, params, tiny.random_ids((4, tiny.TOKENS)))
    scales, report = calibrate_activations(dec, stats, "class", tame=bool(prefix))
    methods = {(r["class"], r["method"]) for r in report}
    shaped = "mse" if prefix else "minmax"  # only a prefix takes massive tokens out of the graph
    expected = {("wide", "minmax"), ("probs", "unit"), ("rotated", "mse"), ("logits", "minmax")}
    assert methods == expected | {("cache", "minmax"), ("unrotated", shaped)}
    assert len(report) == sum(q.scale.size for q in scales.values())
    np.testing.assert_array_equal(
        scales["layers.attn.kv0.probs"].scale, np.full(2, np.float32(1 / 255))
    )
    for layer, s in enumerate(stats["layers.mlp.residual"]):
        bound = max(-s.low, s.high)
        assert scales["layers.mlp.residual"].scale[layer] == np.float32(bound / 32767)


@pytest.mark.parametrize("init", ["minmax", "sigma", "mse"])
def test_a_recipes_range_holds_for_all_8_bit_tensors(init):
    dec, params, _ = tiny.calibrated("gqa_llama3", "w8a8")
    stats = collect_statistics(dec, params, tiny.random_ids((4, tiny.TOKENS)))
    scales, report = calibrate_activations(dec, stats, init, tame=True)
    assert {r["method"] for r in report if r["class"] not in ("wide", "probs")} == {init}
    s = stats["layers.attn.q"][1]
    lo, hi = {
        "minmax": (s.low, s.high),
        "sigma": (max(s.mean - 3 * s.std, s.low), min(s.mean + 3 * s.std, s.high)),
        "mse": mse_range(s, 8, False),
    }[init]
    expected = from_range(lo, hi, np.asarray(8), False)
    got = jax.tree.map(lambda a: a[1], scales["layers.attn.q"])
    assert got.scale == expected.scale and got.zero_point == expected.zero_point


# Ranges of weights.


def weight_error(w: np.ndarray, scale: np.ndarray, qmax: int) -> np.ndarray:
    codes = np.clip(np.rint(w / scale[..., None]), -qmax, qmax)
    return ((codes * scale[..., None] - w) ** 2).sum(-1)


@pytest.mark.parametrize(("plan", "qmax"), [("w8a8", 127), ("w4a8", 7)])
def test_weight_scales_by_method(plan, qmax):
    dec, params, _ = tiny.calibrated("gqa_llama3", plan)
    name = "layers.mlp.down.weight"
    w = np.asarray(params[name], np.float64)
    by = {m: weight_scales(dec, params, m) for m in ("minmax", "sigma", "mse")}
    assert all(np.all(q.zero_point == 0) for scales in by.values() for q in scales.values())
    peak = np.abs(w).max(-1)
    minmax, sigma, mse = (np.asarray(by[m][name].scale, np.float64) for m in by)
    assert minmax.shape == w.shape[:2]
    np.testing.assert_allclose(minmax, peak / qmax, rtol=2**-23)  # stored as float32
    three = np.minimum(np.abs(w.mean(-1)) + 3 * w.std(-1), peak)
    np.testing.assert_allclose(sigma, three / qmax, rtol=1e-5)  # moments of float32 weights
    # The grid ends at the peak itself; errors are compared in float32.
    assert np.all(weight_error(w, mse, qmax) <= weight_error(w, minmax, qmax) * (1 + 1e-5))
    if qmax == 7:
        gain = weight_error(w, mse, qmax).sum() / weight_error(w, minmax, qmax).sum()
        assert gain < 0.95, "at 4 bits clipping pays"


def test_the_embedding_has_one_scale_and_the_head_one_per_row():
    dec, params, free = tiny.calibrated("gqa_llama3", "w8a8")
    assert free["embed.weight"].scale.shape == ()
    assert free["head.weight"].scale.shape == (96,)
    names = {n for n in free if n.endswith("weight")}
    assert names == {n for n in params if n.endswith("weight")}
    assert names == weight_scales(dec, params, "minmax").keys()
