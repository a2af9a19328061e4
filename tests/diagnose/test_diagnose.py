"""Where precision is lost: sums against NumPy by hand, charges against what they must add up to."""

from functools import cache

import jax.numpy as jnp
import kinds
import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax.diagnose import attribution, run, tensor_errors
from qnpu_jax.diagnose.summary import Tally
from qnpu_jax.fakequant.forward import forward
from qnpu_jax.fakequant.passes import passes
from qnpu_jax.graph.qparams import QParams
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.integer.model import IntegerModel
from qnpu_jax.measure.perplexity import fake_quant_logits
from qnpu_jax.proof.simulated import Simulated

IDS = tiny.random_ids((tiny.TOKENS,), seed=5)
PLANS = pairwise.often(("w8a8", "w4a16", "mixed"), ("w8a8",))
RUINED = "layers.1.mlp.act"


def read(model: IntegerModel):
    """Constants, simulated codes and what `measure` finds in one window."""
    constants = tensor_errors.Constants.of(model, tiny.TOKENS)
    tensors = Simulated(model, tiny.TOKENS).tensors(IDS)
    return constants, tensors, tensor_errors.measure_window(constants, IDS, tensors)


@cache
def measured(plan: str):
    return read(tiny.quantized("gqa_llama3", plan))


def real(model: IntegerModel, codes: np.ndarray, name: str, layer: int) -> np.ndarray:
    """Codes of a layer's tensor in real numbers, float64."""
    tensor = model.decoder(1).layer.at(model.tensors[f"layers.{name}"], layer)
    return (codes.astype(np.float64) - float(tensor.zero_point)) * float(tensor.scale)


# One tensor.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inputs", "op"),
    [
        ("mlp.act", ("mlp.silu", "mlp.up"), np.multiply),
        ("attn.residual", ("attn.o", "input.residual"), np.add),
        ("attn.rope.q_cos", ("attn.rope.q",), None),
    ],
)
@pytest.mark.parametrize("layer", pairwise.often([0, 1], [1]))
def test_an_op_alone_by_hand(name, inputs, op, layer):
    model = tiny.quantized("gqa_llama3", "w8a8")
    _, tensors, found = measured("w8a8")
    codes = {n: np.asarray(tensors.get(f"layers.{layer}.{n}", 0)) for n in (name, *inputs)}
    before = f"layers.{layer - 1}.mlp.residual" if layer else "embed.residual"
    codes["input.residual"] = np.asarray(tensors[before])
    x = [real(model, codes[n], n, layer) for n in inputs]
    if op is None:  # by the cosines, which are codes too
        dec = model.decoder(tiny.TOKENS)
        x.append(real(model, model.inputs(dec)["rope.cos"], "rope.cos", layer))
    expected = (op or np.multiply)(*x)
    got = real(model, codes[name], name, layer)
    sums = found.sums[f"layers.{layer}.{name}"]
    assert sums.own_signal == pytest.approx(np.sum(expected**2), rel=1e-5)
    # float32 sums of float32 differences: the noise of 16 bits is 1e-5 of what is subtracted
    assert sums.own_noise == pytest.approx(np.sum((got - expected) ** 2), rel=2e-2)
    assert sums.count == got.size
    low, high = codes[name].min(), codes[name].max()
    assert (sums.lowest, sums.highest) == (low, high)
    ends = np.iinfo(codes[name].dtype)
    assert sums.ends == np.sum((codes[name] == ends.min) | (codes[name] == ends.max))


def test_clipped_codes_are_counted_exactly():
    """Ten values far above the range, as simulated, of a tensor whose inputs are what they were."""
    model, constants = tiny.quantized("gqa_llama3", "w8a8"), measured("w8a8")[0]
    tensors = dict(measured("w8a8")[1])
    up = np.array(tensors["layers.1.mlp.up"])
    silu = np.array(tensors["layers.1.mlp.silu"])
    up.reshape(-1)[:10] = 127
    silu.reshape(-1)[:10] = 127
    tensors |= {"layers.1.mlp.up": up, "layers.1.mlp.silu": silu}
    product = real(model, up, "mlp.up", 1) * real(model, silu, "mlp.silu", 1)
    scale, zero = (
        model.tensors["layers.mlp.act"].scale[1],
        model.tensors["layers.mlp.act"].zero_point[1],
    )
    code = product / scale + zero
    expected = int(np.sum((code > 127.5) | (code < -128.5)))
    assert expected >= 10
    assert tensor_errors.measure_window(constants, IDS, tensors).sums[RUINED].clipped == expected


def test_sqnr_is_against_the_float_pass():
    """Evaluated another way: `passes` on the same constants."""
    constants, tensors, found = measured("w8a8")
    model = tiny.quantized("gqa_llama3", "w8a8")
    tables = {n: jnp.asarray(x) for n, x in constants.tables.items()}
    names = ("attn.q", "mlp.act")
    steps = passes(
        constants.decoder,
        constants.params,
        jnp.asarray(IDS[None]),
        lambda g: names if g.layered else (),
        tables=tables,
    )
    env = {}
    for graph, layer, env in steps:
        for name in names if graph.layered else ():
            sums = found.sums[f"layers.{layer}.{name}"]
            ref = np.asarray(env[name][0], np.float64)
            got = real(model, np.asarray(tensors[f"layers.{layer}.{name}"]), name, layer)
            noise = np.sum((got - ref) ** 2)
            expected = 10 * np.log10(np.sum(ref**2) / noise)
            assert tensor_errors.decibels(sums.signal, sums.noise) == pytest.approx(
                expected, abs=0.01
            )
    assert found.float_logits == pytest.approx(np.asarray(env["logits"][0]), abs=1e-5)


@pytest.mark.slow
def test_kinds_of_layers_read_their_own_tables():
    """The scan of `attribution` and the layer by layer of `tensor_errors`, without an error in any
    tensor, are the float model."""
    constants, _, found = read(kinds.quantized("three", "w8a8"))
    expected = np.asarray(forward(constants.decoder, constants.params, jnp.asarray(IDS)))
    # Tables are rounded to 16 bits here: 1 in 65,534 of a cosine.
    assert np.abs(found.float_logits - expected).max() <= 1e-3 * np.ptp(expected)
    got = np.asarray(attribution.without(constants, IDS, {}))
    # The same float32 sums in another order, on logits near 5.
    np.testing.assert_allclose(got, found.float_logits, atol=1e-4)


def test_decibels():
    assert tensor_errors.decibels(1000.0, 10.0) == pytest.approx(20.0)
    assert tensor_errors.decibels(1.0, 0.0) is None


def test_sums_of_two_windows():
    def sums(x: float) -> tensor_errors.Sums:
        return tensor_errors.Sums(
            count=x, signal=x, noise=x, own_signal=x, own_noise=x, ends=x, clipped=x,
            lowest=-x, highest=2 * x,
        )  # fmt: skip

    assert sums(1.0).merged(sums(4.0)) == sums(5.0)._replace(lowest=-4.0, highest=8.0)
    assert sums(4.0).merged(sums(1.0)) == sums(5.0)._replace(lowest=-4.0, highest=8.0)


@pytest.mark.parametrize("plan", PLANS)
def test_copies_lose_nothing_and_the_rest_is_charged(plan):
    constants, _, found = measured(plan)
    rounding = tensor_errors.rounding_tensors(constants.decoder)
    assert 0 < len(rounding) < len(found.sums)
    for name, sums in found.sums.items():
        if name not in rounding:
            assert sums.own_noise <= 1e-12 * sums.own_signal, name
            assert sums.clipped == 0, name
    assert set(found.errors) == {stacked for stacked, _ in rounding.values()}


def test_masked_keys_do_not_count():
    constants, _, found = measured("w8a8")
    mask = np.asarray(constants.tables["mask"])
    visible = int(np.sum(mask == 0))
    assert 0 < visible < mask.size
    for name in ("scores", "masked"):
        sums = found.sums[f"layers.0.attn.kv0.{name}"]
        assert sums.count == visible
        assert sums.clipped == 0
    assert found.sums["layers.0.attn.kv0.softmax"].count == mask.size


# The KL and whom it is charged to.


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_the_simulator_is_the_float_pass_with_the_errors_added(plan):
    constants, _, found = measured(plan)
    logits = attribution.without(constants, IDS, found.errors)
    assert np.abs(found.logits - found.float_logits).max() > 1e-3
    assert logits == pytest.approx(np.asarray(found.logits), abs=1e-4)
    every = tensor_errors.rounding_tensors(constants.decoder)
    for exact in (
        attribution.without(constants, IDS, found.errors, every),
        attribution.replaced(constants, IDS, every),
    ):
        assert exact == pytest.approx(np.asarray(found.float_logits), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_charges_add_up_to_the_kl(plan):
    """And gradients at the simulator to about twice that."""
    constants, _, found = measured(plan)
    total = attribution.kl(found.float_logits, found.logits)
    args = (constants, IDS, found.float_logits, found.errors)
    assert sum(x.sum() for x in attribution.charges(*args).values()) == pytest.approx(
        total, rel=1e-3
    )
    first = sum(x.sum() for x in attribution.slopes(*args, 1.0).values())
    assert first == pytest.approx(2 * total, rel=0.15)


def test_a_slope_is_a_difference():
    """df/dt of one tensor at t = 1, against a central difference of f in that tensor alone."""
    constants, _, found = measured("w8a8")
    args = (constants, IDS, found.float_logits, found.errors)
    slope = attribution.slopes(*args, 1.0)["layers.mlp.act"][1]

    def f(factor: float) -> float:
        errors = dict(found.errors)
        errors["layers.mlp.act"] = errors["layers.mlp.act"].at[1].multiply(factor)
        return attribution.kl(found.float_logits, attribution.without(constants, IDS, errors))

    assert slope == pytest.approx((f(1.1) - f(0.9)) / 0.2, rel=0.02)


@pytest.mark.slow
@pytest.mark.nightly
def test_fake_quant_with_nothing_replaced():
    constants = measured("w8a8")[0]
    model = tiny.quantized("gqa_llama3", "w8a8")
    expected = np.asarray(fake_quant_logits(model)(IDS))
    np.testing.assert_allclose(attribution.replaced(constants, IDS), expected, atol=1e-5)


@pytest.mark.parametrize(("factor", "reason"), [(24.0, "coarse"), (1 / 24, "clipped")])
def test_a_ruined_scale_comes_out_worst(factor, reason):
    dec, params, free = tiny.calibrated("gqa_llama3", "w8a8")
    old = free["layers.mlp.act"]
    scale = np.array(old.scale)
    scale[1] *= factor
    ruined = {**free, "layers.mlp.act": QParams(scale=scale, zero_point=old.zero_point)}
    model = freeze(dec, params, ruined, tiny.PREFIX)
    constants = tensor_errors.Constants.of(model, tiny.TOKENS)
    simulator, tally = Simulated(model, tiny.TOKENS), Tally(constants)
    origin = tally.read(IDS, simulator.tensors(IDS), None)
    rows = {r.tensor: r for r in tally.rows()}
    total = tally.kl()["simulator"]
    worst = max(rows.values(), key=lambda r: r.kl or 0.0)
    assert worst.tensor == RUINED
    assert worst.kl is not None and worst.kl > 0.5 * total
    own = {n: r.own_sqnr for n, r in rows.items() if r.own_sqnr is not None}
    assert min(own, key=lambda n: own[n]) == RUINED
    assert (rows[RUINED].clipped > 0.2) == (reason == "clipped")
    assert (rows[RUINED].used < 0.1) == (reason == "coarse")
    errors = tensor_errors.measure_window(constants, IDS, simulator.tensors(IDS)).errors
    exact = attribution.kl(origin, attribution.without(constants, IDS, errors, [RUINED]))
    anew = attribution.kl(origin, attribution.replaced(constants, IDS, [RUINED]))
    assert max(exact, anew) < 0.5 * total
    other = attribution.replaced(constants, IDS, ["layers.0.mlp.act"])
    assert attribution.kl(origin, other) > 0.8 * total


def test_patterns_choose_what_rounds():
    constants = measured("w8a8")[0]
    assert run.matching(constants, ["layers.*.mlp.act"]) == [
        "layers.0.mlp.act",
        "layers.1.mlp.act",
    ]
    with pytest.raises(run.UserError, match=r"--replace layers.0.attn.q_heads: matches no"):
        run.matching(constants, ["head.logits", "layers.0.attn.q_heads"])
