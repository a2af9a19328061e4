"""What learning can move: nothing at first, every group with a gradient, and what
is learned is what is frozen."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import pairwise
import pytest

from qnpu_jax.errors import UserError
from qnpu_jax.fakequant.fake_quant import fake_quant
from qnpu_jax.fakequant.forward import Reading
from qnpu_jax.graph.layered import local
from qnpu_jax.graph.qparams import code_range
from qnpu_jax.graph.scales import bias_scales, is_free, resolve
from qnpu_jax.learn.losses import Batch, objective
from qnpu_jax.learn.parameters import (
    R1,
    R2,
    ZERO_POINT_UNIT,
    ThetaKey,
    group_of,
    initial_theta,
    learned_scales,
    merge_theta,
    student_reading,
    student_scales,
    theta_units,
)
from qnpu_jax.recipes import GROUPS, Stage

ADAM, SGD = Stage(optimizer="adam"), Stage(optimizer="sgd")
plans = pytest.mark.parametrize("plan", ["w4a8", "mixed"])
optimizers = pytest.mark.parametrize("stage", [ADAM, SGD], ids=["adam", "sgd"])
IDS = learnable.random_ids(2, seed=1)
ROTATED_TENSORS = {
    "layers.attn.input", "layers.attn.v", "layers.attn.kv0.mixed", "layers.attn.o",
    "layers.mlp.input", "layers.mlp.down", "head.input",
}  # fmt: skip
"""method.md, section 1: inputs of q/k/v, o, gate/up and the head; outputs of v, o, down."""


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def on_device(params) -> dict[str, jax.Array]:
    return {n: jnp.asarray(x) for n, x in params.items()}


def prepared(dec, student: Reading) -> dict[str, np.ndarray]:
    """The parameters that a student computes with, by global name."""
    out: dict[str, np.ndarray] = {}
    for graph in dec.graphs:
        values = local(student.params, graph.prefix)
        prepare = functools.partial(student.prepare, graph)
        layered = jax.vmap(prepare) if graph is dec.layer else prepare
        out |= {graph.prefix + n: np.asarray(x) for n, x in layered(values).items()}
    return out


# --- What there is to learn ---


@pytest.mark.slow
@pytest.mark.parametrize("plan", pairwise.often(["w4a8", "mixed"], ["w4a8"]))
@pytest.mark.nightly
def test_initial_changes_nothing(plan):
    dec, params, free = learnable.made(plan)
    base = learnable.base_of(dec, params, free)
    student = student_reading(dec, ADAM, base, initial_theta(dec, free, GROUPS))
    plain = Reading(params, resolve(dec, free))
    same(dict(student.scales), dict(plain.scales))
    same(prepared(dec, student), {n: np.asarray(x) for n, x in params.items()})
    got, expected = (learnable.logits_of(dec, r, IDS[0]) for r in (student, plain))
    np.testing.assert_array_equal(got, expected)  # x I, x / 1, x + 0 and s exp(0) are exact


@plans
def test_every_tensor_that_can_move_is_in_its_group(plan):
    dec, params, free = learnable.made(plan)
    of: dict[str, set[ThetaKey]] = {g: set() for g in GROUPS}
    theta = initial_theta(dec, free, GROUPS)
    for key in theta:
        of[group_of(key)].add(key)
    activations = {n for n in free if n not in params}
    assert of["rotation"] == {("rotation", "r1"), ("rotation", "r2")} == {R1, R2}
    assert of["diagonal"] == {("diagonal", n) for n in ("up_down", "v_o", "q_k")}
    scales = {k.tensor for g in ("rotated", "unrotated") for k in of[g] if k.kind == "scale"}
    assert scales == activations
    assert {k.tensor for k in of["rotated"] if k.kind == "scale"} == ROTATED_TENSORS
    scaled = {n for n in free if n in params and n.endswith("weight")}
    assert of["weights"] == {("weight_scale", n) for n in scaled}
    linears = {n for n in params if n.endswith("weight") and n.startswith("layers.")}
    assert of["rounding"] == {("rounding", n) for n in linears} and len(linears) == 7
    offsets = {("bias", f"layers.attn.rope.{x}_offset") for x in "qk"}
    assert of["biases"] == offsets | {("bias", n.replace("weight", "bias")) for n in linears}
    assert of["prefix"] == {("prefix", f"layers.attn.prefix_{x}") for x in "kv"}
    for (kind, tensor), x in theta.items():
        if kind in ("rounding", "bias", "prefix"):
            assert x.shape == params[tensor].shape
        elif kind not in ("rotation", "diagonal"):
            assert x.shape == free[tensor].scale.shape


def test_a_key_is_named_as_in_messages():
    assert f"{ThetaKey('bias', 'layers.attn.q.bias')}: diverged" == (
        "bias/layers.attn.q.bias: diverged"
    )


def test_zero_points_are_of_asymmetric_tensors_of_8_bits():
    dec, _, free = learnable.made("mixed")
    names = {k.tensor for k in initial_theta(dec, free, GROUPS) if k.kind == "zero_point"}
    expected = set()
    for graph in dec.graphs:
        for spec in graph.named("activation"):
            quant = spec.quant
            if quant and is_free(graph, spec.name) and not quant.symmetric and min(quant.bits) < 16:
                expected.add(graph.prefix + spec.name)
    assert names == expected
    assert {"layers.mlp.act", "head.logits"} <= names
    assert "layers.attn.v" not in names
    assert ThetaKey("scale", "layers.attn.v") in initial_theta(dec, free, ["rotated"])


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_that_does_not_learn_has_no_parameters(group):
    dec, _, free = learnable.made()
    names = initial_theta(dec, free, [group])
    assert names and {group_of(n) for n in names} == {group}
    rest = initial_theta(dec, free, [g for g in GROUPS if g != group])
    assert rest.keys() == initial_theta(dec, free, GROUPS).keys() - names.keys()


def test_units_are_the_range_of_what_they_add_to():
    dec, params, free = learnable.made("mixed")
    found = theta_units(dec, free)
    theta = initial_theta(dec, free, ["biases", "prefix"])
    assert found.keys() == theta.keys()
    assert all(np.broadcast_shapes(found[n].shape, x.shape) == x.shape for n, x in theta.items())
    scales = resolve(dec, free)
    down = np.asarray(scales["layers.mlp.down"].scale)
    reach = down * [128, 32768]  # of layer 1, 16 bits
    np.testing.assert_array_equal(found[ThetaKey("bias", "layers.mlp.down.bias")], reach[:, None])
    cache = np.asarray(scales["layers.attn.k_cache"].scale) * 128
    expected = cache[:, None, None, None]
    np.testing.assert_array_equal(found[ThetaKey("prefix", "layers.attn.prefix_k")], expected)
    theta = {n: jnp.ones_like(x) for n, x in theta.items()}
    after, _ = merge_theta(dec, ADAM, params, free, theta)
    moved = after["layers.mlp.down.bias"] - np.asarray(params["layers.mlp.down.bias"])
    np.testing.assert_allclose(moved, np.broadcast_to(reach[:, None], moved.shape), rtol=1e-5)


@plans
def test_zero_points_are_codes_and_0_at_16_bits(plan):
    dec, _, free = learnable.made(plan)
    theta = learnable.random_theta(dec, free, ["rotated", "unrotated"])
    theta = {k: 20 * x if k.kind == "zero_point" else x for k, x in theta.items()}
    ends = set()
    for name, q in learned_scales(dec, ADAM, free, theta).items():
        graph = next(g for g in dec.graphs if name.startswith(g.prefix))
        spec = graph[name.removeprefix(graph.prefix)]
        z = np.atleast_1d(np.asarray(q.zero_point))
        if spec.kind == "param" or not spec.quant:
            assert not z.any()
            continue
        qmin, qmax = code_range(spec)
        np.testing.assert_array_equal(z, np.rint(z))
        assert (z >= qmin).all() and (z <= qmax).all(), name
        assert not z[np.asarray(spec.quant.bits) >= 16].any(), name
        ends |= set(z)
    assert {-128, 127} <= ends, "random zero points were to reach both ends"


def test_only_rotated_tensors_are_quantized_where_the_stage_says_so():
    dec, _, free = learnable.made()
    stage = dataclasses.replace(ADAM, quantized="rotated")
    some, every = (set(student_scales(dec, s, free, {})) for s in (stage, ADAM))
    weights = {n for n in every if n.endswith("weight")}
    assert len(weights) == 9
    # The others are views of these, and the cache of v: reshaped, sliced, concatenated.
    roots = {g.prefix + n: g.prefix + root for g in dec.graphs for n, root in g.ties.items()}
    assert some == weights | {n for n in every if roots[n] in ROTATED_TENSORS}
    assert not some & {"layers.attn.k", "layers.mlp.act", "layers.attn.k_cache", "head.logits"}


# --- What is learned is what is frozen ---


@pytest.mark.slow
@plans
@optimizers
def test_merged_is_what_the_student_computes_with(plan, stage):
    dec, params, free = learnable.made(plan)
    theta = learnable.random_theta(dec, free)
    student = student_reading(dec, stage, learnable.base_of(dec, params, free), theta)
    after, scales = merge_theta(dec, stage, params, free, theta)
    resolved = resolve(dec, scales)
    same(dict(student.scales), resolved | bias_scales(dec, resolved))
    got = prepared(dec, student)
    assert got.keys() == after.keys()
    for name, x in after.items():
        # Products in float32 against float64: sums of up to 24 terms, twice (R1 and R2).
        np.testing.assert_allclose(got[name], x, rtol=0, atol=4e-6 * np.abs(x).max(), err_msg=name)
        if name != "head.bias":
            assert np.abs(x - np.asarray(params[name])).max() > 1e-2 * np.abs(x).max(), name
    logits, expected, start = (
        learnable.logits_of(dec, r, IDS[0])
        for r in (student, Reading(on_device(after), dict(student.scales)), Reading(params, {}))
    )
    # A value that float32 rounding carries over the border of two codes may move others with it,
    # but few of 3,000 are that near to one.
    assert np.abs(logits - expected).mean() <= 1e-2 * np.abs(expected - start).mean()


def test_merged_rotations_and_diagonals_leave_the_float_model():
    dec, params, free = learnable.made()
    theta = learnable.random_theta(dec, free, ["rotation", "diagonal"])
    after, scales = merge_theta(dec, ADAM, params, free, theta)
    same(scales, dict(free))
    got, expected = (
        learnable.logits_of(dec, Reading(on_device(p), {}), IDS[0]) for p in (after, params)
    )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5)  # float32, two layers deep
    hidden = np.asarray(params["embed.weight"]) - after["embed.weight"]
    assert np.abs(hidden).max() > 0.1, "the rotation moved nothing"


@pytest.mark.parametrize("key", [R1, R2], ids=str)
def test_a_rotation_that_is_not_orthogonal_is_not_merged(key):
    dec, params, free = learnable.made()
    theta = initial_theta(dec, free, ["rotation"])
    theta[key] = theta[key].at[..., 0, 1].add(0.01)
    with pytest.raises(UserError, match=r"^R[12].*: not orthogonal: expected max .*; orthonorm"):
        merge_theta(dec, ADAM, params, free, theta)


def test_a_factor_that_is_not_finite_is_not_merged():
    dec, params, free = learnable.made()
    theta = initial_theta(dec, free, ["diagonal"])
    key = ThetaKey("diagonal", "v_o")
    theta[key] = theta[key].at[0, 0, 3].set(jnp.nan)
    with pytest.raises(UserError, match=r"^v_o: expected finite factors above 0"):
        merge_theta(dec, ADAM, params, free, theta)


# --- Gradients ---


def gradient(
    stage: Stage, theta, plan: str = "w4a8", warm: float = 0.0
) -> dict[ThetaKey, np.ndarray]:
    dec, params, free = learnable.made(plan)
    base, batch = learnable.base_of(dec, params, free), Batch(jnp.asarray(IDS))
    with jax.disable_jit():
        found = jax.grad(lambda t: objective(dec, stage, base, t, batch, jnp.float32(warm)))(theta)
    return {n: np.asarray(g) for n, g in found.items()}


@pytest.fixture(scope="module")
def gradients():
    """Of every parameter, through everything quantized, where ranges of tensors with a zero point
    are small enough to clip: zero points have no other gradient."""
    dec, _, free = learnable.made()
    theta = learnable.random_theta(dec, free)
    for key in [k for k in theta if k.kind == "zero_point"]:
        theta[ThetaKey("scale", key.tensor)] -= 0.5
    return gradient(dataclasses.replace(ADAM, hidden_mse=0.1), theta)


@pytest.mark.slow
def test_the_loss_reaches_every_parameter(gradients):
    dec, _, free = learnable.made()
    assert gradients.keys() == initial_theta(dec, free, GROUPS).keys()
    assert all(np.isfinite(g).all() for g in gradients.values())
    still = {n for n, g in gradients.items() if not g.any()}
    points = {k for k in gradients if k.kind == "zero_point"}
    assert still <= points and 2 * len(still) < len(points), "a tensor without a clipped value"
    stacked = (
        ThetaKey("scale", "layers.mlp.act"),
        R2,
        ThetaKey("diagonal", "q_k"),
        ThetaKey("rounding", "layers.mlp.up.weight"),
    )
    assert all(g.any() for key in stacked for g in gradients[key]), "both layers"


@pytest.mark.slow
@pytest.mark.nightly
def test_what_is_not_quantized_learns_no_scale():
    dec, _, free = learnable.made()
    stage = dataclasses.replace(ADAM, quantized="rotated")
    theta = initial_theta(dec, free, ["rotated", "unrotated", "weights"])
    found = gradient(stage, theta)
    for key, g in found.items():
        moves, group = np.abs(g).max() > 0, group_of(key)
        assert moves or group == "unrotated" or key.kind == "zero_point", key
        assert not moves or group != "unrotated", key


def published(x, q, s, z, qmin, qmax) -> tuple[float, float]:
    """dL/ds and dL/dz of Quant.npu, section 1 of method.md, for dL/dxhat = q; float64."""
    u = x / s + z
    inside = (np.rint(u) >= qmin) & (np.rint(u) <= qmax)
    ds = np.where(inside, np.rint(u) - u, np.where(u < qmin, qmin - z, qmax - z))
    return float((q * ds).sum()), float((q * np.where(inside, 0, -s)).sum())


@pytest.mark.slow
def test_sgd_steps_scale_and_zero_point_as_published():
    dec, _, free = learnable.made()
    name, layer, rate = "layers.mlp.gate", 1, 5e-6
    x, q = np.random.default_rng(0).normal(0, 3, (2, learnable.TOKENS, 24))
    s, z = (
        np.asarray(v)[layer].astype(np.float64) for v in (free[name].scale, free[name].zero_point)
    )
    theta = initial_theta(dec, free, ["unrotated"])

    def loss(theta):
        at = learned_scales(dec, SGD, free, theta)[name]
        args = (at.scale[layer], at.zero_point[layer], np.float32(-128), np.float32(127))
        return jnp.sum(fake_quant(jnp.asarray(x, jnp.float32), *args) * jnp.asarray(q, jnp.float32))

    found = jax.grad(loss)(theta)
    ds, dz = published(x, q, s, z, -128, 127)
    assert abs(dz) > 0, "nothing was clipped"
    factor = 1 / np.sqrt(learnable.TOKENS * 24 * 127)
    step = -rate * s * float(found[ThetaKey("scale", name)][layer])
    assert step == pytest.approx(-rate * factor * ds, rel=1e-4)  # sums of float32
    moved = -rate * float(found[ThetaKey("zero_point", name)][layer]) * ZERO_POINT_UNIT
    assert moved == pytest.approx(-rate * factor * dz, rel=1e-5)
    assert all(not g.any() for key, g in found.items() if key.tensor != name)


@pytest.mark.slow
def test_sgd_steps_a_weights_scale_by_its_input_features():
    dec, params, free = learnable.made()
    name, layer, channel = "layers.mlp.down.weight", 0, 5
    w = np.asarray(params[name])[layer, channel].astype(np.float64)
    q = np.random.default_rng(0).normal(size=24)
    s = float(free[name].scale[layer, channel])

    def loss(theta):
        scale = learned_scales(dec, SGD, free, theta)[name].scale[layer, channel]
        w_fq = fake_quant(
            jnp.asarray(w, jnp.float32), scale, np.float32(0), np.float32(-7), np.float32(7)
        )
        return jnp.sum(w_fq * jnp.asarray(q, jnp.float32))

    found = jax.grad(loss)(initial_theta(dec, free, ["weights"]))[ThetaKey("weight_scale", name)]
    ds, _ = published(w, q, s, 0.0, -7, 7)
    # -rate * found is the relative change of s.
    assert float(found[layer, channel]) * s == pytest.approx(ds / np.sqrt(24 * 7), rel=1e-4)


def test_an_sgd_step_beyond_zero_leaves_a_positive_scale_that_can_come_back():
    dec, _, free = learnable.made()
    name = "layers.mlp.gate"
    theta = initial_theta(dec, free, ["unrotated"])
    key = ThetaKey("scale", name)
    theta[key] = jnp.full_like(theta[key], -5.0)
    other = {key: jnp.full_like(theta[key], -0.25)}

    def scale(theta):
        return learned_scales(dec, SGD, free, theta)[name].scale

    np.testing.assert_allclose(scale(theta), free[name].scale / 1024, rtol=1e-6)
    np.testing.assert_allclose(scale(other), free[name].scale * 0.75, rtol=1e-6)
    found = jax.grad(lambda theta: scale(theta).sum())(theta)[key]
    assert (np.asarray(found) > 0).all()


@optimizers
def test_a_channel_of_zeros_learns_nothing_and_breaks_nothing(stage):
    dec, params, free = learnable.made()
    name = "layers.mlp.down.weight"
    params = dict(params) | {name: jnp.asarray(params[name]).at[0, 5].set(0)}
    scale = np.array(free[name].scale)
    scale[0, 5] = np.finfo(np.float32).tiny * 2.0**40  # what `from_range` gives it
    free = dict(free) | {name: dataclasses.replace(free[name], scale=scale)}
    theta = initial_theta(dec, free, ["weights"])

    def loss(theta):
        found = learned_scales(dec, stage, jax.tree.map(jnp.asarray, free), theta)[name].scale[0, 5]
        return jnp.sum(
            fake_quant(params[name][0, 5], found, np.float32(0), np.float32(-7), np.float32(7))
        )

    found = jax.grad(loss)(theta)[ThetaKey("weight_scale", name)]
    assert np.isfinite(found).all() and not found[0, 5].any()
