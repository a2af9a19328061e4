"""Intervals of accumulators, channel by channel: reached exactly, never passed, and held against
what runs reach."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pairwise
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.graph.graph import is_identity
from qnpu_jax.graph.ops import FullyConnected
from qnpu_jax.integer import intermediates, model
from qnpu_jax.integer.accumulators import (
    ChannelBounds,
    channel_bounds,
    linear_interval,
    needed_bits,
    product,
    proved_bounds,
)
from qnpu_jax.integer.intermediates import NO_SUM, proved_intermediates
from qnpu_jax.proof import widths
from qnpu_sim import kernels, op_constants
from qnpu_sim.observe import Range, observed_accumulators, observed_ranges
from qnpu_sim.op_constants import QuantizedType, Weights
from qnpu_sim.program import compile_model, run
from qnpu_sim.rounding import PROFILES

REF = PROFILES["litert_ref"]
ZERO_POINTS = st.sampled_from([-128, -5, 0, 7, 127]) | st.integers(-128, 127)
WEIGHTS = {4: (-8, 7), 8: (-128, 127)}
BIASES = {32: st.integers(-(2**31), 2**31 - 1), 64: st.integers(-(2**63), 2**63 - 1)}


@st.composite
def linears(draw):
    """(w, b, dtype of the input, zero point): 4 and 8-bit weights, 8 and 16-bit inputs, biases up
    to the ends of their type."""
    dtype, bias = draw(st.sampled_from([("int8", 32), ("int16", 32), ("int16", 64)]))
    rows, k = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    low, high = WEIGHTS[draw(st.sampled_from([4, 8]))]
    weights = st.integers(low, high) | st.sampled_from([low, high])
    w = draw(st.lists(st.lists(weights, min_size=k, max_size=k), min_size=rows, max_size=rows))
    ends = st.integers(-(2**10), 2**10) | BIASES[bias]
    b = draw(st.lists(ends, min_size=rows, max_size=rows))
    zero = draw(ZERO_POINTS) if dtype == "int8" else 0
    return np.asarray(w, np.int8), np.asarray(b, f"int{bias}"), dtype, zero


def exact(w: np.ndarray, b: np.ndarray, x: np.ndarray, zero: int) -> list[int]:
    """Accumulators of all rows by Python's integers."""
    terms = [[int(v) * (int(c) - zero) for v, c in zip(row, x, strict=True)] for row in w]
    return [sum(row) + int(c) for row, c in zip(terms, b, strict=True)]


def interval(dtype: str, zero: int) -> tuple[int, int]:
    limits = np.iinfo(dtype)
    return int(limits.min) - zero, int(limits.max) - zero


def extreme(w: np.ndarray, dtype: str, *, highest: bool) -> np.ndarray:
    """The input that brings a row of w to its end."""
    limits = np.iinfo(dtype)
    return np.where((w > 0) == highest, limits.max, limits.min).astype(dtype)


@given(linears())
def test_an_input_reaches_both_ends_of_every_channel(linear):
    w, b, dtype, zero = linear
    low, high = linear_interval(w, b, *interval(dtype, zero))
    for j, row in enumerate(w):
        assert exact(w, b, extreme(row, dtype, highest=True), zero)[j] == high[j]
        assert exact(w, b, extreme(row, dtype, highest=False), zero)[j] == low[j]


@given(linears(), st.integers(0, 2**32 - 1))
def test_no_input_passes_an_end_nor_does_a_sum_on_its_way(linear, seed):
    """A sum that starts at its bias, in any order, with the zero point in the terms or in the
    bias."""
    w, b, dtype, zero = linear
    rng = np.random.default_rng(seed)
    low, high = linear_interval(w, b, *interval(dtype, zero))
    limits = np.iinfo(dtype)
    for codes in (
        rng.integers(limits.min, limits.max, w.shape[1], dtype, endpoint=True),
        rng.choice(np.asarray([limits.min, limits.max], dtype), w.shape[1]),
    ):
        order = rng.permutation(w.shape[1])
        for row, start, lowest, highest in zip(w, b, low, high, strict=True):
            acc = int(start)
            folded = acc - zero * int(row.sum(dtype=np.int64))
            for k in order:
                acc += int(row[k]) * (int(codes[k]) - zero)
                folded += int(row[k]) * int(codes[k])
                assert lowest <= acc <= highest and lowest <= folded <= highest
            assert acc == folded


@pytest.mark.slow
@given(linears())
def test_the_simulators_kernel_reaches_the_ends(linear):
    """Scales of 1 make the accumulator the code, and a zero point moves its end to code 0."""
    w, b, dtype, zero = linear
    low, high = linear_interval(w, b, *interval(dtype, zero))
    # Of one shape, so that one compiled kernel serves all; a weight of 0 adds nothing.
    padded = np.pad(w, ((0, 0), (0, 40 - w.shape[1])))
    one = np.float32(1)
    for row, bias, *ends in zip(padded, b, low, high, strict=True):
        for end, highest in zip(ends, (False, True), strict=True):
            if not -(2**31) < end < 2**31:  # codes of neither profile go farther
                continue
            x = extreme(row, dtype, highest=highest)
            of_x = QuantizedType(one, zero, 8 * x.dtype.itemsize)
            weights = Weights(row[None], bias[None], np.ones(1))
            made = op_constants.prepare_fully_connected(of_x, weights, QuantizedType(one), REF)
            moved = made._replace(zero_point=np.asarray(-end, np.int32))
            with jax.enable_x64():
                code = kernels.fully_connected(jnp.asarray(x[None]), jnp.asarray(row[None]), moved)
            assert int(code[0, 0]) == 0


@given(st.tuples(*[st.integers(-300, 0), st.integers(0, 300)] * 2))
def test_products_of_intervals_are_reached_and_not_passed(ends):
    a, b, c, d = ends
    x, y = (a, b), (c, d)
    low, high = product(x, y)
    corners = [u * v for u in x for v in y]
    assert low in corners and high in corners
    for u in np.linspace(a, b, 5).astype(int):
        assert all(low <= u * v <= high for v in np.linspace(c, d, 5).astype(int))
        assert 0 <= u * u <= product(x, x, square=True)[1]
    assert product(x, x, square=True) == (0, max(v * v for v in x))


@pytest.mark.parametrize("plan", tiny.OFTEN)
def test_channels_of_a_model_make_up_the_bounds_of_its_ops(plan):
    model = tiny.quantized("mqa_linear_bias", plan)
    dec = model.decoder(8)
    channels = channel_bounds(dec, model.tensors)
    assert [c.bound for c in channels] == proved_bounds(dec, model.tensors)
    found = {c.tensor: c for c in channels}
    for graph in dec.graphs:
        for layer in range(graph.layers):
            for node in graph.nodes:
                if isinstance(node.op, FullyConnected):
                    own = found[graph.global_name(layer, node.output)]
                    assert len(own.low) == graph[node.output].shape[1]
                    assert max(own.needed) == own.bound.needed


@pytest.mark.slow
@pytest.mark.parametrize("plan", pairwise.often([*tiny.PLANS], ["w8a8", "mixed"]))
def test_what_runs_reach_lies_within_what_is_proved(plan):
    quantized = tiny.quantized("gqa_llama3", plan)
    dec = quantized.decoder(8)
    program = compile_model(quantized, dec)
    ids = tiny.random_ids((2, 8), 9)
    observed = observed_ranges(quantized, program, ids)
    rows = widths.join(channel_bounds(dec, quantized.tensors), observed)
    assert all(row.holds for row in rows)
    assert all(row.seen <= row.needed <= row.proved.available for row in rows)
    singly = [observed_accumulators(quantized, dec, _codes(program, text)) for text in ids]
    for row in rows:
        assert row.reached == max(found[row.tensor] for found in singly)
    assert observed["layers.0.attn.norm.squares"].low.min() >= 0


def test_sums_by_blocks_of_channels_are_those_of_all_at_once(monkeypatch):
    quantized = tiny.quantized("gqa_llama3", "w8a8")
    program = compile_model(quantized, quantized.decoder(8))
    ids = tiny.random_ids((1, 8), 9)
    whole = observed_ranges(quantized, program, ids)
    monkeypatch.setattr(model, "BLOCK", 64)  # of any linear some rows
    for name, seen in observed_ranges(quantized, program, ids).items():
        np.testing.assert_array_equal(seen, whole[name])


def _codes(program, ids: np.ndarray) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, run(program, ids, lambda _: True))


def test_a_run_that_passes_its_bound_is_found():
    bounds = ChannelBounds("layers.3.mlp.down", "FULLY_CONNECTED", (-9, 0), (5, 7), 32, 8)
    (row,) = widths.join([bounds], {bounds.tensor: Range(np.asarray([-9, 0]), np.asarray([5, 7]))})
    assert row.holds and (row.kind, row.needed, row.seen) == ("mlp.down", 5, 5)
    assert (row.fitting(4), row.fitting(5), row.reach, row.reached) == (1, 2, 9, 9)
    assert not dataclasses.replace(row, high=(5, 8)).holds
    assert not dataclasses.replace(row, low=(-10, 0)).holds


def test_kinds_join_layers_and_heads():
    bounds = [
        ChannelBounds(f"layers.{i}.attn.kv{j}.mixed", "BATCH_MATMUL", (-1,), (2**i,), 32, 8)
        for i in (0, 20)
        for j in (0, 1)
    ]
    bounds += [ChannelBounds("head.logits", "FULLY_CONNECTED", (0, 0), (1, 2**30), 32, 8)]
    seen = {b.tensor: (np.asarray(b.low), np.asarray(b.low)) for b in bounds}
    rows = widths.join(bounds, seen)
    head, mixed = widths.kinds(rows)
    assert (head.name, head.channels, head.needed, head.fitting[24]) == ("head.logits", 2, 32, 1)
    assert (mixed.name, mixed.channels, mixed.needed) == ("attn.kv*.mixed", 4, 22)
    assert mixed.fitting == {16: 2, 20: 2, 24: 4, 32: 4}
    assert [r.tensor for r in widths.widest(rows, 2)] == ["head.logits", "layers.20.attn.kv0.mixed"]


# What other ops hold before they round.


@pytest.mark.slow
@pytest.mark.parametrize("plan", tiny.PLANS)
def test_every_op_is_proved_or_said_to_sum_nothing(plan):
    """By TFLite's names of all that the written file holds."""
    model = tiny.quantized("mqa_linear_bias", plan)
    dec = model.decoder(8)
    between = proved_intermediates(dec, model.tensors)
    proved = {b.tensor for b in proved_bounds(dec, model.tensors)}
    proved |= {i.tensor for i in between}
    names = {"Embedding": "GATHER", "Concat": "CONCATENATION"}
    for graph in dec.graphs:
        for layer in range(graph.layers):
            for node in graph.nodes:
                kind = type(node.op).__name__
                name = graph.global_name(layer, node.output)
                known = names.get(kind, kind.upper()) in NO_SUM
                assert is_identity(graph, node, layer) or known != (name in proved), name
    assert all(i.needed <= 32 for i in between)


def test_sums_of_softmax_follow_its_tables():
    """Its largest term is exp(0), what the table says of the row's maximum."""
    scale = np.float32(0.01)
    top = {8: (op_constants.prepare_softmax_int8(scale, REF).exp[0].astype(np.int64) + 2**11) >> 12}
    top[16] = op_constants.prepare_softmax_int16(scale, REF).exp.max()
    for plan, bits in (("w8a8", 16), ("w8a8i8", 8)):
        model = tiny.quantized("gqa_llama3", plan)
        dec = model.decoder(8)
        sums = [i for i in proved_intermediates(dec, model.tensors) if i.op == "SOFTMAX"]
        assert len(sums) == 2 * 2
        assert {(i.low, i.high) for i in sums} == {(int(top[bits]), dec.keys * int(top[bits]))}


def test_a_sum_of_too_many_exponentials_is_refused():
    model = tiny.quantized("gqa_llama3", "w8a8i8")
    sums = proved_intermediates(model.decoder(126), model.tensors)  # 128 keys
    intermediates.check_intermediates(sums)
    # As of 4,096 keys, which are more than this model has.
    longer = [dataclasses.replace(i, high=32 * i.high) for i in sums if i.op == "SOFTMAX"]
    with pytest.raises(UserError, match=r"softmax.*33 bits.*at most 32; choose a shorter length"):
        intermediates.check_intermediates(longer)


@pytest.mark.parametrize(
    ("values", "bits"), [((0, 0), 1), ((-1, -1), 1), ((-9, -5), 5), ((4, 4), 4)]
)
def test_intervals_away_from_zero_need_no_more_than_their_ends(values, bits):
    assert needed_bits(*values) == bits


# The command.


def test_proof_prints_tables_and_writes_all_rows(qnpu, here):
    text = ["--text", "text.txt"]
    status, out, err = qnpu("proof", "out", "--prefill", "8", "--tokens", "20", *text)
    assert (status, err) == (0, "")
    tables = [line for line in out.splitlines() if "│" in line or "┃" in line]
    assert max(map(len, tables)) <= 80
    for name in ("attn.q", "attn.kv*.scores", "head.logits", "SOFTMAX", "of text.txt"):
        assert name in out
    found = json.loads((here / "out" / "accumulators.json").read_text())
    assert found["format"] == 1 and found["text"]["tokens"] == 16 and found["prefill"] == 8
    rows = {row["tensor"]: row for row in found["rows"]}
    q = rows["layers.1.attn.q"]
    assert len(rows) == 2 * (7 + 2 + 4) + 2 and q["channels"] == 32
    assert (
        sum(q["histogram"].values()) == len(q["proved"]["low"]) == len(q["observed"]["high"]) == 32
    )
    for row in found["rows"]:
        low, high = (np.asarray(row["proved"][end]) for end in ("low", "high"))
        assert (low <= row["observed"]["low"]).all() and (row["observed"]["high"] <= high).all()
    assert (here / "out" / "accumulators.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_proof_replaces_what_it_wrote_and_the_folder_can_be_made_again(qnpu, here):
    proof = ("proof", "out", "--prefill", "4", "--tokens", "4", "--widest", "0")
    assert qnpu(*proof)[0] == 0
    first = {p.name: p.read_bytes() for p in (here / "out").glob("accumulators.*")}
    assert len(first) == 2
    status, out, _ = qnpu(*proof)
    assert status == 0 and "widest linears" not in out
    assert first == {p.name: p.read_bytes() for p in (here / "out").glob("accumulators.*")}
    assert not list((here / "out").glob(".*"))
    artifacts.check_writable(here / "out", overwrite=True)


def test_proof_without_matplotlib_says_so(qnpu, here, monkeypatch):
    monkeypatch.setattr("qnpu_jax.proof.figure.installed", lambda: False)
    status, _, err = qnpu("proof", "out", "--prefill", "4", "--tokens", "4")
    assert status == 0 and "pip install 'qnpu[figures]'" in err
    assert not (here / "out" / "accumulators.svg").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(refused, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    monkeypatch.setattr(
        "qnpu_jax.integer.storage.load", lambda _: pytest.fail("worked before it looked")
    )
    assert refused("proof", "out").startswith("out: cannot be written (Permission denied)")


def test_mistakes_are_one_line(refused):
    assert refused("proof", "none").startswith("none/report.json: missing")
    assert refused("proof", "out", "--prefill", "0").startswith("prefill: 0 is too short")
    assert refused("proof", "out", "--tokens", "5").startswith("tokens: 5 are too few")
    assert refused("proof", "out", "--text", "none.txt").startswith("none.txt: ")
    assert "positions" in refused("proof", "out", "--prefill", "600", "--tokens", "600")
