"""Rotations: Hadamard matrices exact in integers; folding and rotating leave the logits of a float
forward alone.
"""

import dataclasses
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.models.llama import ATTENTION, MLP
from qnpu_jax.transform import fold
from qnpu_jax.transform.hadamard import hadamard, has_hadamard, random_hadamard, random_orthogonal
from qnpu_jax.transform.rotate import Rotation, random_rotation, rotate, rotate_parameter

ORDERS = [core << k for core in (1, 12, 20, 28, 36) for k in range(8) if core << k <= 1600]
CONFIG = ModelConfig(
    family="llama", vocab_size=50, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=8, max_positions=32, biases=(*ATTENTION, *MLP),
)  # fmt: skip
IDS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 9)


def checkpoint(config=CONFIG, biases=True, tied=False, dtype: DTypeLike = np.float64):
    rng = np.random.default_rng(7)
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
    h, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {"attn.q": (h, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, h)}
    shapes |= {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    params = {f"layers.{n}.weight": rng.normal(0, 0.3, (layers, *s)) for n, s in shapes.items()}
    if biases:
        params |= {
            f"layers.{n}.bias": rng.normal(0, 0.5, (layers, s[0])) for n, s in shapes.items()
        }
    params |= {f"layers.{n}.norm.gamma": rng.uniform(0.2, 3, (layers, d)) for n in ("attn", "mlp")}
    params |= {
        "head.norm.gamma": rng.uniform(0.2, 3, d),
        "embed.weight": rng.normal(0, 1, (config.vocab_size, d)),
    }
    if not tied:
        params["head.weight"] = rng.normal(0, 0.3, (config.vocab_size, d))
    return {n: p.astype(dtype) for n, p in params.items()}


def rms_norm(x, gamma, eps):
    """A checkpoint's norm with its gamma; the graph's unit norm where it has none."""
    if gamma is not None:
        return gamma * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + x.shape[-1] * eps)


def rope(x, theta):
    """Hugging Face's half-split rotary embedding; x (heads, T, K)."""
    t, k = x.shape[1:]
    angle = np.arange(t)[:, None] / theta ** (np.arange(0, k, 2) / k)
    cos, sin = (np.concatenate([fn(angle)] * 2, -1) for fn in (np.cos, np.sin))
    rotated = np.concatenate([-x[..., k // 2 :], x[..., : k // 2]], -1)
    return x * cos + rotated * sin


def attention(config, linear, x, scale):
    t = len(x)
    split = lambda y: y.reshape(t, -1, config.head_dim).transpose(1, 0, 2)  # noqa: E731
    q, k = (rope(split(linear(n, x)), config.kinds[0].rope_theta) for n in ("attn.q", "attn.k"))
    k, v = (np.repeat(y, config.queries_per_kv_head, 0) for y in (k, split(linear("attn.v", x))))
    scores = q @ k.transpose(0, 2, 1) * scale + np.triu(np.full((t, t), -np.inf), 1)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return linear("attn.o", ((p / p.sum(-1, keepdims=True)) @ v).transpose(1, 0, 2).reshape(t, -1))


def forward(config, params, ids):
    """Logits (T, V) in float64, of a checkpoint (it has gammas) or of the graph's parameters (they
    have none).
    """
    params = {n: np.asarray(p, np.float64) for n, p in params.items()}
    raw, eps, x = "head.norm.gamma" in params, config.rms_norm_eps, params["embed.weight"][ids]
    for i in range(config.num_layers):
        layer = {
            n.removeprefix("layers."): p[i] for n, p in params.items() if n.startswith("layers.")
        }
        late = {f"attn.{x}": layer.get(f"attn.rope.{x}_offset", np.zeros(1)).ravel() for x in "qk"}
        linear = lambda n, y, p=layer, b=late: (  # noqa: E731
            y @ p[f"{n}.weight"].T + p.get(f"{n}.bias", 0) + b.get(n, 0)
        )
        y = rms_norm(x, layer.get("attn.norm.gamma"), eps)
        x = x + attention(config, linear, y, config.head_dim**-0.5 if raw else 1)
        y = rms_norm(x, layer.get("mlp.norm.gamma"), eps)
        gate = linear("mlp.gate", y)
        x = x + linear("mlp.down", gate / (1 + np.exp(-gate)) * linear("mlp.up", y))
    head = params.get("head.weight", params["embed.weight"])
    return rms_norm(x, params.get("head.norm.gamma"), eps) @ head.T + params.get("head.bias", 0)


def relative_error(got, expected):
    return np.max(np.abs(got - expected)) / np.ptp(expected)


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_is_exact_in_integers(order):
    h = hadamard(order)
    assert h.dtype == np.int64
    assert h.shape == (order, order)
    assert np.all(np.abs(h) == 1)
    h = h.astype(
        np.float64
    )  # BLAS; every partial sum is an integer below 2^53, so the product is exact
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@given(st.integers(-3, 5000))
def test_orders(order):
    assert has_hadamard(order) == any(
        order == c << k for c in (1, 12, 20, 28, 36) for k in range(14)
    )


@pytest.mark.parametrize("order", [0, 3, 6, 44])
def test_order_without_construction(order):
    with pytest.raises(UserError, match=f"order {order}.*random_orthogonal"):
        hadamard(order)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 8, 12, 40, 56, 64, 144]), st.integers(0, 2**32))
def test_random_hadamard(order, seed):
    r = random_hadamard(order, seed)
    np.testing.assert_allclose(r @ r.T, np.eye(order), atol=1e-12)
    np.testing.assert_array_equal(np.abs(r), np.full((order, order), 1 / np.sqrt(order)))
    np.testing.assert_array_equal(r, random_hadamard(order, seed))


def test_random_hadamard_signs_do_not_change():
    """Checkpoints record the seed alone: the signs drawn from it are a format."""
    np.testing.assert_array_equal(np.sign(random_hadamard(8, 0)[0]), GOLDEN_SIGNS)


GOLDEN_SIGNS = [1, 1, 1, -1, -1, -1, -1, -1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_random_orthogonal(order, seed):
    r = random_orthogonal(order, seed)
    np.testing.assert_allclose(r @ r.T, np.eye(order), atol=1e-12)
    np.testing.assert_array_equal(r, random_orthogonal(order, seed))


def r1_of(rotation: Rotation) -> np.ndarray:
    assert rotation.r1 is not None
    return np.asarray(rotation.r1)


def test_random_rotation():
    a, again, other = (random_rotation(CONFIG, seed) for seed in (0, 0, 1))
    r1 = r1_of(a)
    assert r1.shape == (24, 24)
    assert a.r2.shape == (3, 8, 8)
    np.testing.assert_array_equal(np.abs(r1), np.full((24, 24), 1 / np.sqrt(24)))  # 24 = 12 * 2
    np.testing.assert_array_equal(r1, r1_of(again))
    np.testing.assert_array_equal(a.r2, again.r2)
    assert not np.array_equal(r1, r1_of(other))
    assert not np.array_equal(a.r2[0], a.r2[1])
    odd = r1_of(random_rotation(replace(CONFIG, hidden_size=44), 0))
    np.testing.assert_allclose(odd @ odd.T, np.eye(44), atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_folding_and_rotation_keep_the_logits(tied, biases):
    config = replace(CONFIG, tie_embeddings=tied)
    raw = checkpoint(config, biases, tied)
    expected = forward(config, raw, IDS)
    rotation = random_rotation(config, 5)
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-4)):
        folded = fold.fold_norms(config, raw, dtype)
        rotated = rotate(config, folded, rotation, dtype)
        assert relative_error(forward(config, folded, IDS), expected) < tolerance
        assert relative_error(forward(config, rotated, IDS), expected) < tolerance
        assert {p.dtype for p in (*folded.values(), *rotated.values())} == {np.dtype(dtype)}


def test_folded_names_and_shapes():
    raw = checkpoint(biases=False)
    folded = fold.fold_norms(CONFIG, raw)
    names = {n for n in raw if not n.endswith("gamma")}
    biases = {n.replace("weight", "bias") for n in names if n != "embed.weight"}
    offsets = {"layers.attn.rope.q_offset": (3, 1, 4, 8), "layers.attn.rope.k_offset": (3, 1, 2, 8)}
    assert folded.keys() == names | biases | offsets.keys()
    assert all(folded[n].shape == shape for n, shape in offsets.items())
    assert all(folded[n].shape == raw[n].shape for n in names)
    assert all(folded[n].shape == folded[n.replace("bias", "weight")].shape[:-1] for n in biases)
    assert not any(folded[n].any() for n in biases | offsets.keys())


def test_biases_of_queries_and_keys_are_late():
    raw = checkpoint()
    folded = fold.fold_norms(CONFIG, raw, np.float64)
    for letter, scale in (("q", CONFIG.head_dim**-0.5), ("k", 1)):
        assert not folded[f"layers.attn.{letter}.bias"].any()
        offset = folded[f"layers.attn.rope.{letter}_offset"].reshape(CONFIG.num_layers, -1)
        np.testing.assert_allclose(offset, raw[f"layers.attn.{letter}.bias"] * scale, rtol=1e-15)


def test_arguments_are_not_changed():
    raw = checkpoint(dtype=np.float32)
    before = {n: p.copy() for n, p in raw.items()}
    folded = fold.fold_norms(CONFIG, raw)
    folded_before = {n: p.copy() for n, p in folded.items()}
    rotated = rotate(CONFIG, folded, random_rotation(CONFIG, 0))
    for got, kept in ((raw, before), (folded, folded_before)):
        for name in kept:
            np.testing.assert_array_equal(got[name], kept[name])
    assert not any(np.shares_memory(rotated[n], folded[n]) for n in rotated)


def test_which_biases_rotate():
    folded = fold.fold_norms(CONFIG, checkpoint(), np.float64)
    rotation = random_rotation(CONFIG, 0)
    rotated = rotate(CONFIG, folded, rotation, np.float64)
    for i in range(CONFIG.num_layers):
        v = folded["layers.attn.v.bias"][i].reshape(2, 8)
        expected = np.concatenate([rotation.r2[i].T @ head for head in v])
        np.testing.assert_allclose(rotated["layers.attn.v.bias"][i], expected, atol=1e-12)
        for name in ("layers.attn.o.bias", "layers.mlp.down.bias"):
            np.testing.assert_allclose(
                rotated[name][i], r1_of(rotation).T @ folded[name][i], atol=1e-12
            )
    for name in (
        "layers.attn.rope.q_offset",
        "layers.attn.rope.k_offset",
        "layers.attn.q.bias",
        "layers.attn.k.bias",
        "layers.mlp.gate.bias",
        "layers.mlp.up.bias",
        "head.bias",
    ):
        np.testing.assert_array_equal(rotated[name], folded[name])


def with_prefix(params):
    rng = np.random.default_rng(9)
    shape = (CONFIG.num_layers, CONFIG.num_kv_heads, 3, CONFIG.head_dim)
    keys, values = (rng.normal(0, 1, shape) for _ in "kv")
    values = values.swapaxes(2, 3)
    return params | {"layers.attn.prefix_k": keys, "layers.attn.prefix_v": values}


def test_learning_and_the_final_merge_rotate_alike():
    """Traced float32 gives the float64 merge: products of 24 terms, each within 2^-24."""
    params = with_prefix(fold.fold_norms(CONFIG, checkpoint(), np.float64))
    rotation = random_rotation(CONFIG, 4)
    expected = rotate(CONFIG, params, rotation, np.float64)
    assert expected.keys() == params.keys()
    r1, r2 = (jnp.asarray(r, jnp.float32) for r in (rotation.r1, rotation.r2))
    for name, x in params.items():
        x = jnp.asarray(x, jnp.float32)
        if name.startswith("layers."):
            layers = jax.vmap(partial(rotate_parameter, name), in_axes=(0, None, 0))
            got = jax.jit(layers)(x, r1, r2)
        else:
            got = jax.jit(partial(rotate_parameter, name))(x, r1)
        assert got.dtype == np.float32
        tolerance = 24 * 2**-23 * np.abs(params[name]).max()
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=tolerance, err_msg=name)


def test_products_are_float32_in_full():
    """TF32, the default of a GPU, would make learning see other weights than the merge makes."""
    w, r1, r2 = (jnp.ones(s, jnp.float32) for s in ((24, 32), (24, 24), (8, 8)))
    traced = jax.make_jaxpr(partial(rotate_parameter, "layers.attn.o.weight"))(w, r1, r2)
    products = [e for e in traced.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2
    assert all(set(e.params["precision"]) == {jax.lax.Precision.HIGHEST} for e in products)


def test_values_of_a_prefix_rotate_and_its_keys_do_not():
    params = with_prefix(fold.fold_norms(CONFIG, checkpoint(), np.float64))
    rotation = random_rotation(CONFIG, 0)
    rotated = rotate(CONFIG, params, rotation, np.float64)
    k, v = (f"layers.attn.prefix_{x}" for x in "kv")
    np.testing.assert_array_equal(rotated[k], params[k])
    # One row of V is what v gives for one token: its bias, where its input is 0.
    biases = dict(params) | {"layers.attn.v.bias": params[v][..., 0].reshape(3, -1)}
    like = rotate(CONFIG, biases, rotation, np.float64)["layers.attn.v.bias"]
    np.testing.assert_allclose(rotated[v][..., 0].reshape(3, -1), like, atol=1e-12)


def test_a_parameter_without_a_rule_is_refused():
    r1, r2 = np.eye(24), np.eye(8)
    for name in ("attn.q.weight", "layers.attn.v.weights", "layers.attn.norm.gamma"):
        with pytest.raises(UserError, match=f"{name}: not expected"):
            rotate_parameter(name, np.ones((8, 24)), r1, r2)
    with pytest.raises(UserError, match=r"attn\.o\.weight: expected R2 of its layer"):
        rotate_parameter("layers.attn.o.weight", np.ones((24, 32)), r1)


def test_rotation_and_its_transpose_cancel():
    folded = fold.fold_norms(CONFIG, checkpoint(), np.float64)
    r = random_rotation(CONFIG, 2)
    back = Rotation(r1=r1_of(r).T, r2=np.swapaxes(r.r2, 1, 2))
    again = rotate(CONFIG, rotate(CONFIG, folded, r, np.float64), back, np.float64)
    for name in folded:
        np.testing.assert_allclose(again[name], folded[name], atol=1e-12)


def test_rotation_removes_an_outlier_channel():
    folded = fold.fold_norms(CONFIG, checkpoint())
    folded["embed.weight"][:, 5] *= 100
    rotated = rotate(CONFIG, folded, random_rotation(CONFIG, 0))
    assert np.abs(rotated["embed.weight"]).max() < 0.3 * np.abs(folded["embed.weight"]).max()


def not_orthogonal(where):
    r = random_rotation(CONFIG, 0)
    match where:
        case "R1":
            return dataclasses.replace(r, r1=r1_of(r) * 1.001)
        case "R2 of layer 2":
            return dataclasses.replace(r, r2=np.concatenate([r.r2[:2], r.r2[2:] + 0.01]))
        case _:
            return dataclasses.replace(
                r, r2=np.concatenate([np.full_like(r.r2[:1], np.nan), r.r2[1:]])
            )


@pytest.mark.parametrize("where", ["R1", "R2 of layer 2", "R2 of layer 0"])
def test_rotation_must_be_orthogonal(where):
    with pytest.raises(UserError, match=f"{where}: not orthogonal"):
        rotate(CONFIG, fold.fold_norms(CONFIG, checkpoint()), not_orthogonal(where))


def test_rotation_must_fit():
    folded, r = fold.fold_norms(CONFIG, checkpoint()), random_rotation(CONFIG, 0)
    with pytest.raises(UserError, match="R1: expected shape"):
        rotate(CONFIG, folded, dataclasses.replace(r, r1=np.eye(8)))
    with pytest.raises(UserError, match="R2: expected one per layer"):
        rotate(CONFIG, folded, dataclasses.replace(r, r2=r.r2[:2]))


def test_parameters_must_be_known():
    raw = checkpoint()
    with pytest.raises(UserError, match=r"layers\.attn\.q_norm\.gamma: not expected"):
        fold.fold_norms(CONFIG, {**raw, "layers.attn.q_norm.gamma": np.ones((3, 8))})
    with pytest.raises(UserError, match=r"head\.weight: missing"):
        fold.fold_norms(CONFIG, {n: p for n, p in raw.items() if n != "head.weight"})
    with pytest.raises(UserError, match="call `fold_norms` first"):
        rotate(CONFIG, raw, random_rotation(CONFIG, 0))
