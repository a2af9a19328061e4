"""Rounding once: codes on their grid, a stored form that comes back byte for byte, and no model
from bad numbers."""

import dataclasses
import json

import jax
import numpy as np
import pairwise
import pytest
import safetensors.numpy
import tiny

from qnpu_jax.config import BitPlan
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import MASK_CODE, decoder
from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.ops import FullyConnected
from qnpu_jax.graph.qparams import QParams
from qnpu_jax.graph.scales import MASK_SCALE
from qnpu_jax.integer.accumulators import proved_bounds
from qnpu_jax.integer.freeze import check_bits, freeze
from qnpu_jax.integer.model import HELD, activation_scales, dequantize
from qnpu_jax.integer.storage import load, save

plans = pytest.mark.parametrize("plan", pairwise.often([*tiny.PLANS], ["w8a8", "mixed"]))
FILES = ("integer_model.json", "integer_model.safetensors")


def rows(graph: Graph, array: np.ndarray) -> np.ndarray:
    return array if graph.layered else array[None]


@pytest.mark.slow
@plans
def test_weights_and_prefix_are_within_half_a_step(plan):
    dec, params, _ = tiny.calibrated("mqa_linear_bias", plan)
    model = tiny.quantized("mqa_linear_bias", plan)
    real = dequantize(model)
    for graph in dec.graphs:
        for spec in graph.named("param"):
            name = graph.prefix + spec.name
            if name.endswith("bias"):
                continue
            codes = model.codes[name]
            assert codes.dtype == HELD[max(spec.quant.bits)]
            for layer, bits in enumerate(spec.quant.bits):
                c, w, r, s = (
                    rows(graph, np.asarray(x))[layer]
                    for x in (codes, params[name], real[name], model.tensors[name].scale)
                )
                qmax = 2 ** (bits - 1) - 1
                assert -qmax <= c.min() and c.max() <= qmax
                step = np.float64(s).reshape(s.shape + (1,) * (c.ndim - s.ndim))
                np.testing.assert_array_equal(r, (c * step).astype(np.float32))
                inside = np.abs(w) <= qmax * step
                # Scales are float32 and w / s is taken in float64: a tie is off by 2^-24 of a code.
                error = np.abs(c - w.astype(np.float64) / step)
                assert error[inside].max() <= 0.5 + 2**-24 * qmax
                np.testing.assert_array_equal(np.abs(c[~inside]), qmax)


@plans
def test_biases_are_rounded_to_the_accumulators_grid(plan):
    dec, params, _ = tiny.calibrated("mqa_linear_bias", plan)
    model = tiny.quantized("mqa_linear_bias", plan)
    for graph in dec.graphs:
        for node in graph.nodes:
            if isinstance(node.op, FullyConnected):
                x, w, b = (graph.prefix + n for n in node.inputs)
                scale = (
                    model.tensors[x].scale[..., None].astype(np.float64) * model.tensors[w].scale
                )
                np.testing.assert_array_equal(model.tensors[b].scale, scale.astype(np.float32))
                exact = np.asarray(params[b], np.float64) / model.tensors[b].scale
                np.testing.assert_array_equal(model.codes[b], np.rint(exact))


def test_biases_are_as_wide_as_their_layer_has_them():
    dec, params, free = tiny.calibrated("mqa_linear_bias", "mixed")
    bias = np.array(params["layers.mlp.down.bias"])
    bias[1, 0] = 1e7  # its code passes 2^31
    model = freeze(dec, {**params, "layers.mlp.down.bias": bias}, free, tiny.PREFIX)
    layer = model.decoder(8).layer
    widths = [model.constants(layer, i)["mlp.down.bias"].dtype for i in range(3)]
    assert widths == [np.int32, np.int64, np.int32]
    for i in range(3):
        stored = model.codes["layers.mlp.down.bias"][i]
        np.testing.assert_array_equal(model.constants(layer, i)["mlp.down.bias"], stored)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "bits"), [("w8a8s8", 8), ("w8a8", 16)])
def test_the_mask_hides_any_score(plan, bits):
    """The highest score and a mask's code add up to no more than the lowest code, in real units."""
    dec, params, free = tiny.calibrated("gqa_llama3", plan)
    name, top = "layers.attn.kv1.scores", 2 ** (bits - 1)
    for scale in (1e-4, 0.03, 0.9, 1.1, 40.0):
        q = QParams(scale=np.asarray([0.1, scale], np.float32), zero_point=free[name].zero_point)
        tensors = freeze(dec, params, free | {name: q}, tiny.PREFIX).tensors
        mask = tensors["layers.mask"].scale
        assert mask[0] == mask[1] == 2 ** np.round(np.log2(mask[0])) >= MASK_SCALE[bits]
        masked = tensors["layers.attn.kv1.masked"].scale
        lowest = -top * masked
        assert ((top - 1) * q.scale + MASK_CODE[bits] * mask <= lowest).all()


def test_64_bit_biases_are_narrowed_where_the_proof_allows():
    model = tiny.quantized("mqa_linear_bias", "w8a16")
    assert {model.codes[n].dtype for n in model.codes if n.endswith("bias")} == {np.dtype("int32")}
    bounds = proved_bounds(model.decoder(8), model.tensors)
    assert all(b.available == 32 for b in bounds if b.op == "FULLY_CONNECTED")
    assert "*.bias" not in dict(model.plan.rules)  # left without a tensor


@pytest.mark.slow
@plans
def test_freezing_the_dequantized_model_gives_the_same_codes(plan):
    dec, _, free = tiny.calibrated("gqa_llama3", plan)
    model = tiny.quantized("gqa_llama3", plan)
    again = freeze(dec, dequantize(model), free, tiny.PREFIX)
    assert again.codes.keys() == model.codes.keys()
    for name, codes in model.codes.items():
        if np.abs(codes).max() < 2**22 or not name.endswith("bias"):  # float32 holds the code
            np.testing.assert_array_equal(again.codes[name], codes, err_msg=name)


@plans
def test_every_tensor_has_scale_and_zero_point(plan):
    model = tiny.quantized("gqa_llama3", plan)
    dec = model.decoder(8, 4, "last")  # tensors of their own: a cache, and the last position
    names = {g.prefix + t.name for g in dec.graphs for t in g.tensors}
    assert model.tensors.keys() == names
    assert all(t.scale.dtype == np.float32 for t in model.tensors.values())
    for graph in dec.graphs:
        for t in graph.tensors:
            zero = model.tensors[graph.prefix + t.name].zero_point
            assert zero.dtype == np.int32
            assert zero.shape == ((graph.layers,) if graph.layered else ())
            wide = np.asarray(t.quant.bits) >= 16
            assert not np.any(rows(graph, zero)[wide]), t.name
            assert not (t.quant.symmetric and np.any(zero)), t.name
    only = {"head.last", "layers.attn.cache_k", "layers.attn.cache_v"}
    assert activation_scales(model).keys() == names - model.codes.keys() - only


@pytest.mark.parametrize(
    ("plan", "narrow", "low"),
    [
        ("w8a8i8", {"mask", "norm.eps", "rope.cos", "rope.sin"}, -127),
        ("w8a8s8", {"mask"}, -127),
        ("w8a8", set(), -32512),
        ("w8a16", set(), -32512),
    ],
)
def test_shared_inputs_are_codes_of_their_values(plan, narrow, low):
    model = tiny.quantized("gqa_llama3", plan)
    codes = model.inputs(model.decoder(5))
    for name, x in codes.items():
        assert x.dtype == (np.int8 if name in narrow else np.int16), name
    assert codes["norm.eps"].item() == (127 if "norm.eps" in narrow else 32767)
    assert codes["mask"].max() == 0
    assert set(np.unique(codes["mask"])) == {low, 0}
    if plan == "w8a16":
        np.testing.assert_array_equal(codes["keep"], np.where(codes["mask"] == 0, 32767, 0))
    np.testing.assert_array_equal(codes["mask"][0, 0], [0, 0, 0, low, low, low, low])


# What is stored.


@pytest.mark.parametrize("plan", ["w4a8", "mixed"])
def test_save_and_load_give_the_same_bytes(tmp_path, plan):
    model = tiny.quantized("mqa_linear_bias", plan)
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    save(model, first)
    loaded = load(str(first))  # as the documentation has it
    save(loaded, second)
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert {p.name for p in first.iterdir()} == set(FILES)
    (tmp_path / "usual").touch()
    assert len({p.stat().st_mode for p in (*first.iterdir(), tmp_path / "usual")}) == 1
    for field in ("config", "plan", "prefix"):
        assert getattr(loaded, field) == getattr(model, field)
    assert loaded.tensors.keys() == model.tensors.keys()
    assert loaded.codes.keys() == model.codes.keys()
    for name, tensor in model.tensors.items():
        for field in ("codes", "scale", "zero_point"):
            got, expected = getattr(loaded.tensors[name], field), getattr(tensor, field)
            if expected is not None:
                assert got.dtype == expected.dtype and got.shape == expected.shape
                np.testing.assert_array_equal(got, expected)


@pytest.fixture
def stored(tmp_path):
    save(tiny.quantized("mha_tied", "w8a8"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(stored, name):
    (stored / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing; .*`qnpu quantize`"):
        load(stored)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_file_cut_short_is_refused(stored, name, keep):
    content = (stored / name).read_bytes()
    (stored / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match="damaged"):
        load(stored)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary", b"[1, 2]", b"null", b'{"a": 1}'])
def test_a_foreign_description_is_refused(stored, content):
    (stored / FILES[0]).write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|format .* expected 4"):
        load(stored)


def test_another_format_is_refused(stored):
    meta = json.loads((stored / FILES[0]).read_text())
    (stored / FILES[0]).write_text(json.dumps(meta | {"format": 1}))
    with pytest.raises(UserError, match=r"integer_model\.json: format 1, expected 4"):
        load(stored)


@pytest.mark.parametrize("key", ["config", "bits", "prefix"])
def test_a_description_without_a_key_is_refused(stored, key):
    meta = json.loads((stored / FILES[0]).read_text())
    del meta[key]
    (stored / FILES[0]).write_text(json.dumps(meta))
    with pytest.raises(UserError, match=key):
        load(stored)


def test_tensors_of_another_model_are_refused(stored):
    foreign = {"model.embed_tokens.weight": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(foreign, stored / FILES[1])
    with pytest.raises(UserError, match=r"has no codes/embed\.weight"):
        load(stored)


# What is refused.


def changed(name: str, value: float, plan: str = "w8a8"):
    dec, params, free = tiny.calibrated("gqa_llama3", plan)
    x = np.array(params[name])
    x.flat[-1] = value
    return dec, dict(params) | {name: x}, free


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["layers.mlp.up.weight", "layers.attn.q.bias", "head.weight", "layers.attn.prefix_k"]
)
def test_values_that_are_not_finite_are_refused_by_name(name, value):
    dec, params, free = changed(name, value)
    with pytest.raises(UserError, match=rf"{name}: holds NaN or Inf"):
        freeze(dec, params, free, tiny.PREFIX)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_is_no_scale_is_refused_by_name(value):
    dec, params, free = tiny.calibrated("gqa_llama3", "w8a8")
    name = "layers.mlp.gate"
    scale = np.asarray([0.1, value], np.float32)
    q = QParams(scale=scale, zero_point=free[name].zero_point)
    with pytest.raises(UserError, match=r"layers\.mlp\.gate: scale must be finite and positive"):
        freeze(dec, params, free | {name: q}, tiny.PREFIX)


def test_a_bias_that_does_not_fit_is_refused_in_its_own_layer():
    with pytest.raises(UserError, match=r"mlp\.down\.bias: code \d+ does not fit 32 bits; .* 64"):
        freeze(*changed("layers.mlp.down.bias", 1e9), tiny.PREFIX)
    # Of three layers the middle one has 64 bits.
    dec, params, free = tiny.calibrated("mqa_linear_bias", "mixed")
    bias = np.array(params["layers.mlp.down.bias"])
    for layer, fits in ((1, True), (2, False)):
        big = bias.copy()
        big[layer, 0] = 1e9
        with_bias = dict(params) | {"layers.mlp.down.bias": big}
        if fits:
            codes = freeze(dec, with_bias, free, tiny.PREFIX).codes["layers.mlp.down.bias"]
            assert codes[1, 0] > 2**31
        else:
            with pytest.raises(UserError, match="does not fit 32 bits"):
                freeze(dec, with_bias, free, tiny.PREFIX)


@pytest.mark.parametrize(
    ("bias", "linear"),
    [("layers.mlp.down.bias", "layers.1.mlp.down"), ("head.bias", "head.logits")],
)
def test_the_way_out_for_a_bias_beside_an_8_bit_input_is_one(bias, linear):
    dec, params, free = changed(bias, 1e9)
    wide = bias.replace("layers.", "layers.1.")
    way_out = f"; give {linear} 16 bits and {wide} 64 bits in the bit plan"
    with pytest.raises(UserError, match=rf"^{wide}: code \d+ does not fit 32 bits{way_out}$"):
        freeze(dec, params, free, tiny.PREFIX)
    plan = BitPlan(((linear, 16), (wide, 64), *dec.plan.rules))
    taken = decoder(dec.config, plan, dec.tokens, dec.prefix)
    assert freeze(taken, params, free, tiny.PREFIX).codes[bias].flat[-1] > 2**31


def test_a_bias_beside_a_row_of_zeros_has_no_scale():
    dec, params, free = changed("layers.mlp.up.bias", 1.0)
    tiny_scale = np.array(free["layers.mlp.up.weight"].scale)
    tiny_scale[-1, -1] = 1e-26
    q = QParams(scale=tiny_scale, zero_point=free["layers.mlp.up.weight"].zero_point)
    expected = (
        r"^layers\.1\.mlp\.up\.bias: code \d+ does .* layers\.1\.mlp\.up\.weight is next to 0"
    )
    with pytest.raises(UserError, match=expected):
        freeze(dec, params, free | {"layers.mlp.up.weight": q}, tiny.PREFIX)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("layers.1.*.weight", 2), "layers.1.attn.q.weight: .* 2 bits; expected 4 or 8"),
        (("head.weight", 16), "head.weight: .* 16 bits; expected 4 or 8"),
        (("embed.weight", 4), "embed.weight: .* 4 bits; expected 8"),
        (("*.gate.bias", 16), "layers.0.mlp.gate.bias: .* 16 bits; expected 32 or 64"),
        (("*.k_cache", 16), "layers.0.attn.prefix_k: .* 16 bits; expected 8"),
        (("head.logits", 32), "head.logits: .* 32 bits; expected 8 or 16"),
    ],
)
def test_bits_that_no_kernel_has_are_refused_first(rule, message):
    dec, params, free = tiny.calibrated("gqa_llama3", "w8a8")
    rules = tuple(r for r in dec.plan.rules if r[0] != rule[0])
    wrong = decoder(dec.config, BitPlan((rule, *rules)), dec.tokens, dec.prefix)
    for refuse in (check_bits, lambda d: freeze(d, params, free, tiny.PREFIX)):
        with pytest.raises(UserError, match=message):
            refuse(wrong)
    for name in tiny.PLANS:
        check_bits(decoder(dec.config, tiny.PLANS[name], dec.tokens, dec.prefix))


def test_models_do_not_share_arrays_with_their_parameters():
    dec, params, free = tiny.calibrated("gqa_llama3", "w8a8")
    mine = jax.tree.map(np.array, dict(params))
    model = freeze(dec, mine, free, tiny.PREFIX)
    before = {n: c.copy() for n, c in model.codes.items()}
    for x in mine.values():
        x[...] = 0
    for name, codes in before.items():
        np.testing.assert_array_equal(model.codes[name], codes)


def test_a_plan_is_part_of_the_stored_model(stored):
    model = load(stored)
    assert isinstance(model.plan, BitPlan) and model.plan == tiny.PLANS["w8a8"]
    other = dataclasses.replace(model, plan=tiny.MIXED)
    assert other.decoder(8) != model.decoder(8)
