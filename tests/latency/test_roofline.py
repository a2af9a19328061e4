"""The estimate of an NPU's time: its terms by hand, and what its fit is worth."""

import dataclasses
import math

import numpy as np
import pytest
import tiny

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.latency import roofline
from qnpu_jax.latency.published import Both
from qnpu_jax.latency.roofline import Fit, Memory, Published, RooflineEstimate, Soc

LLAMA_1B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_positions=2048,
    tie_embeddings=True,
)
LLAMA_3B = dataclasses.replace(
    LLAMA_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128
)
LLAMA_8B = dataclasses.replace(
    LLAMA_1B, hidden_size=4096, intermediate_size=14336, num_layers=32, head_dim=128
)
QWEN_06B = dataclasses.replace(
    LLAMA_1B, vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28,
    num_heads=16, head_dim=128,
)  # fmt: skip
QWEN_17B = dataclasses.replace(QWEN_06B, hidden_size=2048, intermediate_size=6144)
QWEN_4B = dataclasses.replace(
    QWEN_06B, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32
)
"""Qwen3, but for the norms of its heads, which have no weights to multiply with."""
ROUND = Soc("round", Memory(1e-3, 9e9, (0.1, -0.25)), Fit((1e12, 2e12, 3e12)))
"""1 ms a call, 9 GB/s and 2 TMAC/s."""


def test_a_fit_by_hand():
    points = Fit((1.0, 2.0, 6.0))
    assert points.mean == 3.0
    assert points.spread == math.sqrt((4 + 1 + 9) / 2)
    assert points.errors == (4.0 / 1 - 1, 3.5 / 2 - 1, 1.5 / 6 - 1)
    assert points.worst == 3.0


def test_a_single_point_promises_nothing():
    assert Fit((5.0,)).spread == Fit((5.0,)).worst == math.inf


def test_the_slower_of_memory_and_compute_decides():
    memory = roofline.estimate(ROUND, 9e6, {16: 1_000_000})
    assert memory == RooflineEstimate(2e-3, "memory", 0.25)
    compute = roofline.estimate(ROUND, 9e6, {16: 4_000_000_000})
    assert compute == RooflineEstimate(3e-3, "compute", 1.5)  # 1 predicted as 2.5


def test_macs_of_8_bit_activations_take_the_published_share():
    half = {16: 2_000_000_000, 8: 2_400_000_000}
    assert roofline.estimate(ROUND, 0, half).seconds == pytest.approx(1e-3 + 1e-3 + 1e-3)


def test_macs_of_other_widths_are_refused():
    with pytest.raises(
        UserError, match=r"activations of \[32\] bits: no rate is known; expected \["
    ):
        roofline.estimate(ROUND, 0, {32: 1, 8: 1})


def test_a_fit_takes_decode_for_memory_and_prefill_for_the_rate():
    """2 ms and 1e9 bytes/s: two points give the line, a third off it by as much as it weighs."""
    rows = [Published("s", "a", 2e6, 250.0, 1000, 128 / 3e-3), Published("s", "b", 1e6, 1000 / 3)]
    found = roofline.fit("s", rows)
    assert found.memory.start == pytest.approx(2e-3)
    assert found.memory.bandwidth == pytest.approx(1e9)
    assert found.rate.points == (pytest.approx(1000 * 128 / 1e-3),)  # a chunk of 3 ms, 2 to start
    # Each from the other alone, which has no start: 4 ms for 2e6 bytes is 2 ms for 1e6, not 3.
    assert found.memory.errors == pytest.approx((2 * 3 / 4 - 1, 4 / 2 / 3 - 1))
    assert found.memory.worst == pytest.approx(0.5)
    assert Memory(0.0, 1.0).worst == math.inf


def test_a_start_is_never_below_nothing():
    rows = [Published("s", "a", 1e6, 1000.0), Published("s", "b", 4e6, 200.0)]
    found = roofline.fit("s", rows).memory
    assert found.start == 0.0
    # Least squares of relative errors through 0: x = sum(a) / sum(a^2), a = bytes / seconds.
    assert found.bandwidth == pytest.approx((1e18 + 0.64e18) / 1.8e9)


def test_small_models_need_the_start():
    """A bandwidth alone is 34% off for the smallest model."""
    memory = roofline.soc("SM8750").memory
    assert len(memory.errors) == 9
    assert memory.bandwidth == pytest.approx(54.9e9, rel=0.002)
    assert memory.start == pytest.approx(1.46e-3, rel=0.005)
    assert 0.14 < memory.worst < 0.145
    rms = math.sqrt(sum(e**2 for e in memory.errors) / 9)
    assert rms == pytest.approx(0.0756, abs=0.0005)
    small = next(r for r in roofline.PUBLISHED if r.model == "SmolLM2-135M" and r.soc == "SM8750")
    others = [r for r in roofline.PUBLISHED if r.soc == "SM8750" and r is not small]
    # Least squares of relative errors through 0: x = sum(a) / sum(a^2), a = bytes / seconds.
    a = np.array([r.bytes_per_token * r.decode for r in others])
    predicted = small.bytes_per_token * a.sum() / np.square(a).sum()
    assert predicted * small.decode - 1 == pytest.approx(-0.336, abs=5e-4)


@pytest.mark.parametrize("name", ["SM8750", "SM8850", "QCS9075", "SA8255"])
def test_errors_are_those_of_the_hat_matrix(name):
    """Leave-one-out residuals of a linear least squares are r / (1 - h), h the diagonal of
    A (A^T A)^-1 A^T. So are ours, as in these fits no start is cut at 0."""
    rows = [r for r in roofline.PUBLISHED if r.soc == name]
    seconds = np.array([1 / r.decode for r in rows])
    a = np.array([[1.0, r.bytes_per_token / 1e9] for r in rows]) / seconds[:, None]
    hat = a @ np.linalg.inv(a.T @ a) @ a.T
    residuals = (np.ones(len(rows)) - hat.sum(1)) / (1 - np.diag(hat))
    np.testing.assert_allclose(roofline.soc(name).memory.errors, -residuals, rtol=1e-9)
    assert roofline.soc(name).memory.start > 0


def test_a_chunk_takes_the_time_to_the_first_token():
    """1B on a Galaxy S25: 31.467 ms. Genie's 1,782.5 tokens a second are those of 56 tokens."""
    row = next(r for r in roofline.PUBLISHED if (r.soc, r.model) == ("SM8750", "Llama-3.2-1B"))
    assert row.prefill == pytest.approx(128 / 31.467e-3)
    assert row.prefill is not None and row.prefill / 1782.53 == pytest.approx(128 / 56, rel=0.01)


def test_how_much_slower_float16_is_by_hand():
    found = roofline.slower([
        Both("a", "m", (40.0, 20.0), (10.0, 30.0)),
        Both("a", "n", (40.0, 10.0), (10.0, 10.0)),
        Both("b", "m", (10.0, 10.0), (10.0, 40.0)),
    ])  # fmt: skip
    assert found.decode == Fit((3.0, 1.0)) and found.prefill == Fit((2.0, 4.0))
    assert found.decode.errors == (1 / 3 - 1, 3 / 1 - 1)


def test_rates_of_float16_activations_are_converted_and_their_error_grows():
    floats = [r for r in roofline.PUBLISHED if r.activations == "float16"]
    assert {r.soc for r in floats} == {"SA8295"}
    ours = roofline.soc("SA8295")
    as_they_are = roofline.fit("x", [dataclasses.replace(r, activations="int16") for r in floats])
    times = roofline.SLOWER.decode.mean
    assert 2.1 < times < 2.3
    assert ours.memory.bandwidth == pytest.approx(times * as_they_are.memory.bandwidth)
    assert ours.memory.errors == pytest.approx(as_they_are.memory.errors)
    worst = (1 + ours.memory.worst) * (1 + roofline.SLOWER.decode.worst) - 1
    assert ours.decode_error == pytest.approx(worst)
    assert as_they_are.decode_error == as_they_are.memory.worst


def test_validation_predicts_each_rate_from_the_others():
    rows = roofline.validation()
    assert [(r.soc, r.phase, r.points) for r in rows].count(("SM8750", "decode", 8)) == 9
    errors = {(r.soc, r.model, r.phase): r.error for r in rows}
    assert len(errors) == len(rows) == 34 + 32
    assert errors["SM8750", "SmolLM2-135M", "decode"] == pytest.approx(0.0407, abs=5e-4)
    # 8 Gen 3: the others' line is steeper and starts lower.
    assert errors["SM8650", "SmolLM2-135M", "decode"] == pytest.approx(-0.194, abs=5e-4)
    worst = {p: max(abs(r.error) for r in rows if r.phase == p) for p in ("decode", "prefill")}
    assert 0.4 < worst["decode"] < 0.5 and 0.6 < worst["prefill"] < 0.7


def test_an_estimate_names_the_error_of_its_fit():
    for name, phase in (("SM8750", "memory"), ("SM8650", "compute")):
        soc = roofline.soc(name)
        macs = {16: 10**15} if phase == "compute" else {16: 0}
        got = roofline.estimate(soc, 1e6, macs)
        kind = {"memory": "decode", "compute": "prefill"}[phase]
        # Of seconds, as it stands beside seconds; those of `validation` are of rates.
        rows = [r for r in roofline.validation() if (r.soc, r.phase) == (name, kind)]
        assert got.limit == phase
        if phase == "memory":
            errors = [r.measured / r.predicted - 1 for r in rows]
            assert got.error == pytest.approx(max(map(abs, errors)))


def test_an_soc_without_measurements_is_refused():
    message = r"SM8350: no published measurement to estimate from; expected one of \['QCS9075', "
    with pytest.raises(UserError, match=message):
        roofline.soc("SM8350")


def test_macs_and_bytes_by_hand():
    """Hidden 48, MLP 96, 2 layers, 4 heads on 2 KV heads of 24, vocabulary 96; 1 token, 10 keys."""
    dec = tiny.quantized("gqa_llama3", "w8a8").decoder(1, 7, "last")
    matrices = 48 * (96 + 48 + 48) + 96 * 48 + 3 * 48 * 96
    head = 48 * 96
    norm, scores = 48, 4 * 24 * 10
    assert roofline.macs(dec) == {
        8: 2 * (matrices + scores) + head,
        16: 2 * (2 * norm + scores) + norm,
    }
    biases, prefix, cache, new = 4 * 480, 2 * 2 * 2 * 24, 2 * 2 * 7 * 24, 2 * 2 * 24
    layer = matrices + biases + prefix + cache + new
    assert roofline.least_bytes(dec) == 48 + 2 * layer + head + 4 * 96


def test_layers_have_widths_of_their_own():
    plain, mixed = (
        roofline.macs(tiny.quantized("gqa_llama3", plan).decoder(3, 7, "last"))
        for plan in ("w8a8", "mixed")
    )
    down = 3 * 96 * 48
    assert mixed == {8: plain[8] - down, 16: plain[16] + down}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA_1B, "Llama-3.2-1B"),
        (LLAMA_3B, "Llama-3.2-3B"),
        (LLAMA_8B, "Llama-3-8B"),
        (QWEN_06B, "Qwen3-0.6B"),
        (QWEN_17B, "Qwen3-1.7B"),
        (QWEN_4B, "Qwen3-4B"),
    ],
)
def test_published_macs_are_those_of_the_graphs(config, name):
    found = sum(roofline.macs(decoder(config, tiny.PLANS["w4a16"], 1, cache=1023)).values())
    c = config
    attention = 2 * c.num_layers * c.num_heads * c.head_dim * 1024
    norms = (2 * c.num_layers + 1) * c.hidden_size
    used = {r.macs for r in roofline.PUBLISHED if r.model == name}
    assert used == {found - attention - norms}


@pytest.mark.parametrize(("plan", "compiled"), [("w8a8", 62.1e6), ("w4a16", 33.3e6)])
def test_least_bytes_are_just_below_the_compiler_s(plan, compiled):
    """Bytes per layer that Qualcomm's compiler counts at a context of 1,024 (npu.md, section 1)."""
    two, one = (
        roofline.least_bytes(
            decoder(dataclasses.replace(LLAMA_1B, num_layers=n), tiny.PLANS[plan], 1, cache=1023)
        )
        for n in (2, 1)
    )
    assert 0.94 * compiled < two - one < compiled
