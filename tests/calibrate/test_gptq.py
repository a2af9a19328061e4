"""Rounding with the data in view: less error on the data, and codes that freezing reproduces."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax.calibrate.gptq import (
    GptqSettings,
    GraphLayer,
    gptq,
    in_layers,
    linears_by_input,
)
from qnpu_jax.calibrate.input_moments import input_moments
from qnpu_jax.config import BitPlan
from qnpu_jax.fakequant.fake_quant import fake_quant
from qnpu_jax.fakequant.passes import passes
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.graph.qparams import quantize
from qnpu_jax.graph.scales import resolve
from qnpu_jax.integer.freeze import freeze

PLAN = BitPlan((("layers.0.mlp.up.weight", 8), *tiny.PLANS["w4a8"].rules))
"""One weight of one layer at 8 bits, all other linears at 4."""


@cache
def model():
    """Decoder, float parameters, free and resolved scales, windows."""
    _, params, free = tiny.calibrated("gqa_llama3", "w4a8")
    # Biases of its own, and inputs of the second layer that are correlated more than by chance.
    params = {n: x + jnp.float32(0.01) if n.endswith("bias") else x for n, x in params.items()}
    config, _ = tiny.prepared("gqa_llama3")
    dec = decoder(config, PLAN, tiny.TOKENS, len(tiny.PREFIX))
    windows = tiny.random_ids((12, tiny.TOKENS), seed=1)
    return dec, params, free, resolve(dec, free), windows


@cache
def fitted(factors: tuple[float, ...] = (1.0,), exact: bool = True, asymmetric: float = 0.0):
    dec, params, _, scales, windows = model()
    settings = GptqSettings(factors=factors, exact=exact, asymmetric=asymmetric, batch=6)
    return gptq(dec, params, scales, windows, settings)


def chosen_names() -> list[tuple[GraphLayer, str]]:
    layer = model()[0].layer
    names = [n for group in linears_by_input(layer, in_layers) for n in group.weights]
    return [(GraphLayer(layer, i), n) for i in range(layer.layers) for n in names]


def test_linears_are_grouped_by_what_they_read_in_execution_order():
    dec = model()[0]
    groups = linears_by_input(dec.layer, in_layers)
    leaves = [[n.split(".")[1] for n in g.weights] for g in groups]
    assert leaves == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert all(
        b == w.replace("weight", "bias") for g in groups for w, b in zip(*g[1:], strict=True)
    )
    assert linears_by_input(dec.head, in_layers) == ()
    assert linears_by_input(dec.head, lambda name: name == "head.weight")[0].weights == ("weight",)


def residuals(params, scales) -> list[np.ndarray]:
    """Residual stream after each layer."""
    dec, _, _, _, windows = model()
    found = passes(dec, params, jnp.asarray(windows[:6]), lambda _: (), scales)
    return [np.asarray(env["mlp.residual"]) for g, _, env in found if g is dec.layer]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    pairwise.often([{}, {"factors": (1.0, 0.8, 0.9)}, {"asymmetric": 1.0}], [{}]),
)
def test_the_layers_lose_less_than_by_rounding_to_nearest(settings):
    _, params, _, scales, _ = model()
    new = fitted(**settings)
    exact = residuals(params, {})
    by_nearest = residuals(params, scales)
    by_gptq = residuals(new.params, scales | new.scales)
    for x, a, b in zip(exact, by_nearest, by_gptq, strict=True):
        assert np.square(b - x).sum() < np.square(a - x).sum()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"factors": (1.0, 0.8, 0.9)}])
def test_freezing_and_fake_quantization_find_the_codes_again(settings):
    dec, _, free, _, _ = model()
    exact, loose = fitted(**settings), fitted(**settings, exact=False)
    frozen = [freeze(dec, f.params, free | f.scales, tiny.PREFIX) for f in (exact, loose)]
    moved = 0
    for at, name in chosen_names():
        spec, full = dec.layer[name], "layers." + name
        scale = np.asarray(exact.scales[full].scale[at.layer])[:, None]
        codes = frozen[0].codes[full][at.layer]
        np.testing.assert_array_equal(codes, frozen[1].codes[full][at.layer])
        np.testing.assert_allclose(exact.params[full][at.layer], codes * scale, rtol=1e-6)
        qmax = np.float32(2 ** (tiny.bits_of(dec.layer, name, at.layer) - 1) - 1)
        w, s = exact.params[full][at.layer], jnp.asarray(scale)
        on_grid = fake_quant(w, s, jnp.float32(0), -qmax, qmax)
        np.testing.assert_array_equal(np.rint(on_grid / scale), codes)
        moved += (
            quantize(model()[1][full][at.layer], scale, np.int64(0), spec, at.layer) != codes
        ).sum()
    assert moved > 100, "GPTQ found nothing but the nearest codes"


def test_bits_are_those_of_the_tensor_in_its_layer():
    """8 bits use codes that 4 bits do not have, in that tensor and layer alone."""
    dec, _, free, _, _ = model()
    codes = freeze(dec, fitted().params, free, tiny.PREFIX).codes
    for at, name in chosen_names():
        own = codes["layers." + name][at.layer]
        wide = (at.layer, name) == (0, "mlp.up.weight")
        assert (np.abs(own).max() > 7) == wide, (at.layer, name)


@pytest.mark.slow
def test_only_what_is_chosen_changes():
    dec, params, _, scales, windows = model()
    down = "layers.mlp.down"
    only_down = GptqSettings(batch=6, only=lambda name: name == f"{down}.weight")
    new = gptq(dec, params, scales, windows, only_down)
    changed = {n for n, x in params.items() if not np.array_equal(x, new.params[n])}
    assert changed == {f"{down}.weight", f"{down}.bias"}
    assert new.scales.keys() == {f"{down}.weight"}
    only_head = GptqSettings(batch=6, only=lambda name: name == "head.weight")
    head = gptq(dec, params, scales, windows, only_head)
    changed = {n for n, x in params.items() if not np.array_equal(x, head.params[n])}
    assert changed == {"head.weight", "head.bias"}


def test_the_same_input_gives_the_same_bits_and_is_left_alone():
    dec, params, _, scales, windows = model()
    own = {n: np.array(x) for n, x in params.items()}
    again = gptq(dec, own, scales, windows, GptqSettings(factors=(1.0,), batch=6))
    jax.tree.map(np.testing.assert_array_equal, again, fitted())
    jax.tree.map(np.testing.assert_array_equal, own, dict(params))


def mean_errors(params, scales, reference) -> list[float]:
    """|E[W x_q + b - W_q x_q - b_q]| over the same without the means, largest of each tensor."""
    dec, _, _, _, windows = model()
    groups = linears_by_input(dec.layer, in_layers)

    def keep(graph):
        return tuple(g.input for g in groups) if graph is dec.layer else ()

    out = []
    for graph, i, env in passes(dec, params, jnp.asarray(windows), keep, scales):
        for g in groups if graph is dec.layer else ():
            x = np.asarray(env[g.input], np.float64).reshape(-1, graph[g.input].shape[-1])
            for w, b in zip(g.weights, g.biases, strict=True):
                at = GraphLayer(graph, i)
                real, bias = at.get(reference, (w,)), at.get(reference, (b,))
                s = np.asarray(scales["layers." + w].scale[i])[:, None]
                codes = quantize(at.get(params, (w,)), s, np.int64(0), graph[w], i)
                error = x @ (real - codes * s).T + bias - at.get(params, (b,))
                out.append(np.abs(error.mean(0)).max() / error.std())
    return out


@pytest.mark.slow
def test_biases_take_the_mean_error_of_the_outputs():
    _, params, _, scales, _ = model()
    assert min(mean_errors(params, scales, params)) > 0.01, "rounded to nearest"
    assert max(mean_errors(fitted().params, scales, params)) < 1e-4  # 288 tokens in float32


def test_a_token_counts_for_so_many_usual_ones_at_most():
    """One that is a hundred times as long as the others would be ten thousand of them."""
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)  # each as long as the next
    x[0, 0] *= 100
    read = [{"x": jnp.asarray(x[:2])}, {"x": jnp.asarray(x[2:])}]
    limited, whole = (input_moments("x", read, [], loudest) for loudest in (4.0, 1e9))
    weights = np.ones((3, 5))
    weights[0, 0] = 4 / 100**2
    flat, w = x.reshape(-1, 4).astype(np.float64), weights.reshape(-1, 1)
    for found, by in ((limited, w), (whole, np.ones_like(w))):
        expected = ((by * flat).T @ flat / by.sum(), (by * flat).sum(0) / by.sum())
        for one, other in zip((found.gram, found.mean_q), expected, strict=True):
            # Sums over ten tokens in float32.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert np.trace(limited.gram) < 2 < 600 < np.trace(whole.gram)
    silent = input_moments("x", [{"x": jnp.zeros((1, 2, 4), jnp.float32)}], [], 4.0)
    assert not np.asarray(silent.gram).any(), "weights of 1, not a division by 0"
