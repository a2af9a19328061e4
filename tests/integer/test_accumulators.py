"""Accumulator bounds are proved from the weights, reached by an input, and never passed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from qnpu_jax.config import BitPlan, ModelConfig, bit_plan
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.graph.ops import BatchMatmul, FullyConnected
from qnpu_jax.graph.qparams import QParams
from qnpu_jax.graph.scales import is_free
from qnpu_jax.integer.accumulators import Bound, check_accumulators, overflowing, proved_bounds
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.integer.model import QTensor
from qnpu_sim.observe import observed_accumulators
from qnpu_sim.program import compile_model, run

plans = pytest.mark.parametrize("plan", tiny.OFTEN)


def bounds_of(name: str, plan: str) -> dict[str, Bound]:
    model = tiny.quantized(name, plan)
    bounds = proved_bounds(model.decoder(8), model.tensors)
    return {b.tensor: b for b in bounds}


@given(st.integers(-(2**70), 0), st.integers(0, 2**70))
def test_needed_bits_are_the_fewest_that_hold_the_interval(low, high):
    n = Bound("x", "FULLY_CONNECTED", low, high, 32, 8).needed
    assert -(2 ** (n - 1)) <= low and high <= 2 ** (n - 1) - 1
    assert n == 1 or low < -(2 ** (n - 2)) or high > 2 ** (n - 2) - 1


@pytest.mark.parametrize(("low", "high", "fits"), [(-(2**31), 2**31 - 1, True), (0, 2**31, False)])
def test_check_stops_at_one_beyond_32_bits(low, high, fits):
    bound = Bound("layers.3.mlp.down", "FULLY_CONNECTED", low, high, 32, 16)
    if fits:
        check_accumulators([bound])
    else:
        with pytest.raises(UserError, match=r"^layers\.3\.mlp\.down: .* 2147483648, .* 33 bits"):
            check_accumulators([bound])


@given(st.lists(st.tuples(st.integers(-(2**40), 0), st.integers(0, 2**40))), st.integers(2, 64))
def test_what_overflows_a_width_is_what_passes_its_ends(ends, bits):
    bounds = [
        Bound(f"x{i}", "FULLY_CONNECTED", low, high, 32, 8) for i, (low, high) in enumerate(ends)
    ]
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert overflowing(bounds, bits) == [b for b in bounds if b.low < smallest or b.high > largest]


@pytest.mark.parametrize(
    ("tensor", "op", "input_bits", "way_out"),
    [
        ("layers.3.mlp.down", "FULLY_CONNECTED", 16, "give layers.3.mlp.down.bias 64 bits"),
        (
            "layers.3.mlp.down",
            "FULLY_CONNECTED",
            8,
            "give layers.3.mlp.down 16 bits and layers.3.mlp.down.bias 64 bits",
        ),
        ("head.logits", "FULLY_CONNECTED", 8, "give head.logits 16 bits and head.bias 64 bits"),
        (
            "layers.0.attn.kv1.mixed",
            "BATCH_MATMUL",
            8,
            "choose a shorter length, or give layers.0.attn.kv1.mixed 16 bits",
        ),
    ],
)
def test_the_way_out_is_one_that_the_kernels_have(tensor, op, input_bits, way_out):
    with pytest.raises(UserError) as error:
        check_accumulators([Bound(tensor, op, 0, 2**31, 32, input_bits)])
    assert str(error.value).endswith(f"; {way_out} in the bit plan")


def test_there_is_a_bound_for_every_product_of_every_layer():
    dec = tiny.quantized("mqa_linear_bias", "w8a8").decoder(8)
    names = set()
    for graph in dec.graphs:
        for layer in range(graph.layers):
            products = (n for n in graph.nodes if isinstance(n.op, FullyConnected | BatchMatmul))
            names |= {graph.global_name(layer, n.output) for n in products}
    assert bounds_of("mqa_linear_bias", "w8a8").keys() == names
    assert len(names) == 3 * (7 + 2 + 2) + 2


@plans
def test_bounds_know_their_op_and_the_width_of_its_input(plan):
    """LiteRT's 64-bit accumulators go with 16-bit inputs; freezing narrows those of the linears,
    which these small models do not need."""
    for bound in bounds_of("mqa_linear_bias", plan).values():
        product = bound.tensor.endswith((".squares", ".scores", ".mixed"))
        assert bound.available == (64 if product and bound.input_bits == 16 else 32)
        assert bound.op == ("BATCH_MATMUL" if product else "FULLY_CONNECTED")


@plans
def test_an_input_reaches_the_bound_of_every_linear(plan):
    """Both ends, with codes that the input's type has, summed in 64 bits."""
    model = tiny.quantized("mqa_linear_bias", plan)
    bounds = bounds_of("mqa_linear_bias", plan)
    reached = 0
    for graph in model.decoder(8).graphs:
        for layer in range(graph.layers):
            for node in graph.nodes:
                if not isinstance(node.op, FullyConnected):
                    continue
                x = node.inputs[0]
                w, b = (model.constants(graph, layer)[n].astype(np.int64) for n in node.inputs[1:])
                zero = model.tensors[graph.prefix + x].zero_point
                zero = int(zero[layer] if zero.ndim else zero)
                limit = 2 ** (tiny.bits_of(graph, x, layer) - 1)

                def acc(codes, w=w, b=b, zero=zero):
                    """One input per row of w."""
                    return ((codes - zero) * w).sum(1) + b

                largest = acc(np.where(w > 0, limit - 1, -limit)).max()
                smallest = acc(np.where(w > 0, -limit, limit - 1)).min()
                bound = bounds[graph.global_name(layer, node.output)]
                assert (bound.low, bound.high) == (smallest, largest)
                reached += 1
    assert reached == 3 * 7 + 1


def test_bounds_of_attention_products():
    """K times the largest and the smallest product; 128 times the 8-bit codes where a 16-bit
    operand was widened from them; a square is never negative."""
    model = tiny.quantized("gqa_llama3", "w8a8")
    bounds, k = bounds_of("gqa_llama3", "w8a8"), 24
    dec = model.decoder(8)

    def products(x: str, y: str, layer: int) -> list[int]:
        zero = [int(model.tensors["layers." + n].zero_point[layer]) for n in (x, y)]
        ends = [(-128 - z, 127 - z) for z in zero]
        return [a * b for a in ends[0] for b in ends[1]]

    for layer in range(2):
        score = bounds[f"layers.{layer}.attn.kv1.scores"]
        ends = products("attn.q_pos", "attn.k_cache", layer)
        assert (score.low, score.high) == (k * 128**2 * min(ends), k * 128**2 * max(ends))
        assert score.available == 64
        mixed = bounds[f"layers.{layer}.attn.kv1.mixed"]
        ends = products("attn.kv1.probs", "attn.v_cache", layer)
        assert (mixed.low, mixed.high) == (dec.keys * min(ends), dec.keys * max(ends))
        assert mixed.available == 32
        squares = bounds[f"layers.{layer}.attn.norm.squares"]
        assert (squares.low, squares.high) == (0, 48 * 32768**2) and squares.available == 64


@pytest.mark.slow
@plans
def test_what_is_observed_stays_inside_what_is_proved(plan):
    model = tiny.quantized("gqa_llama3", plan)
    dec = model.decoder(8)
    tensors = run(compile_model(model, dec), tiny.random_ids((8,), 9), lambda _: True)
    codes = jax.tree.map(np.asarray, tensors)
    bounds = {b.tensor: b for b in proved_bounds(dec, model.tensors)}
    observed = observed_accumulators(model, dec, codes)
    assert observed.keys() == bounds.keys()
    for name, largest in observed.items():
        assert 0 < largest <= max(-bounds[name].low, bounds[name].high), name
    share = max(observed[n] / max(-bounds[n].low, bounds[n].high) for n in observed)
    assert share > 0.05, "bounds that no run comes near prove little"


# An accumulator that can overflow.

WIDE = ModelConfig(
    family="llama", vocab_size=8, hidden_size=8, intermediate_size=520, num_layers=2, num_heads=1,
    num_kv_heads=1, head_dim=8, max_positions=32,
)  # fmt: skip
"""520 weights of 127 and codes of -32768 sum to 2.16e9 > 2^31."""


def wide_model(plan: BitPlan):
    """Freezes a model all of whose weights have the code 127."""
    dec = decoder(WIDE, plan, 4)
    params, free = {}, {}
    for graph in dec.graphs:
        for t in graph.tensors:
            stack = (2,) if graph.layered else ()
            if t.kind == "param":
                fill = np.zeros if t.name.endswith("bias") else np.ones
                params[graph.prefix + t.name] = fill(stack + t.shape, np.float32)
            if is_free(graph, t.name):
                shape = stack if t.quant.axis is None else (*stack, t.shape[t.quant.axis])
                scale = np.full(shape, 1 / 127, np.float32)
                free[graph.prefix + t.name] = QParams(scale=scale, zero_point=np.zeros_like(scale))
    return freeze(dec, params, jax.tree.map(jnp.asarray, free), ())


def with_bias(bits: int, *rules: tuple[str, int]) -> BitPlan:
    plan = bit_plan(8, 16).rules
    return BitPlan((*rules, *((p, bits if p == "*.bias" else b) for p, b in plan)))


def test_an_overflow_is_refused_with_tensor_bound_and_remedy():
    reach = 520 * 127 * 32768
    assert reach > 2**31
    expected = (
        rf"^layers\.0\.mlp\.down: its accumulator can reach {reach}, which needs 33 bits;"
        r" expected at most 32; give layers\.0\.mlp\.down\.bias 64 bits in the bit plan"
    )
    with pytest.raises(UserError, match=expected):
        wide_model(with_bias(32))


def test_a_64_bit_bias_is_the_remedy():
    assert wide_model(with_bias(64)).codes["layers.mlp.down.bias"].dtype == np.int64
    remedy = [(f"layers.{i}.mlp.down.bias", 64) for i in range(2)]
    model = wide_model(with_bias(32, *remedy))
    assert model.codes["layers.mlp.up.bias"].dtype == np.int32
    with pytest.raises(UserError, match=r"^layers\.1\.mlp\.down: its accumulator can reach"):
        wide_model(with_bias(32, *remedy[:1]))


def test_the_last_width_that_fits_is_accepted():
    assert 516 * 127 * 32768 < 2**31 <= 517 * 127 * 32768
    for k in (516, 517):
        d = decoder(dataclasses.replace(WIDE, intermediate_size=k), with_bias(32), 4)
        tensors = {
            g.prefix + t.name: QTensor(
                scale=np.float32(1), zero_point=np.zeros(2 if g.layered else (), np.int32)
            )
            for g in d.graphs
            for t in g.tensors
        }
        for graph in d.graphs:
            for t in graph.named("param"):
                shape = ((2,) if graph.layered else ()) + t.shape
                bias = t.name.endswith("bias")
                codes = np.zeros(shape, np.int32) if bias else np.full(shape, 127, np.int8)
                name = graph.prefix + t.name
                tensors[name] = dataclasses.replace(tensors[name], codes=codes)
        if k == 516:
            check_accumulators(proved_bounds(d, tensors))
        else:
            with pytest.raises(UserError, match=r"mlp\.down: its accumulator can reach 2151"):
                check_accumulators(proved_bounds(d, tensors))
