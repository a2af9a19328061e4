"""The estimate of an NPU's time: its terms by hand, and what its fit is worth."""

import dataclasses
import math

import pytest
import tiny

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.latency import roofline
from qnpu_jax.latency.roofline import Fit, Published, RooflineEstimate, Soc

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
ROUND = Soc("round", Fit((8e9, 10e9)), Fit((1e12, 2e12, 3e12)))
"""9 GB/s and 2 TMAC/s."""


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
    assert memory == RooflineEstimate(1e-3, "memory", 0.25)  # 8 predicted as 10
    compute = roofline.estimate(ROUND, 9e6, {16: 4_000_000_000})
    assert compute == RooflineEstimate(2e-3, "compute", 1.5)  # 1 predicted as 2.5


def test_macs_of_8_bit_activations_take_the_published_share():
    half = {16: 2_000_000_000, 8: 2_400_000_000}
    assert roofline.estimate(ROUND, 0, half).seconds == pytest.approx(1e-3 + 1e-3)


def test_macs_of_other_widths_are_refused():
    with pytest.raises(
        UserError, match=r"activations of \[32\] bits: no rate is known; expected \["
    ):
        roofline.estimate(ROUND, 0, {32: 1, 8: 1})


def test_a_fit_takes_decode_for_bandwidth_and_prefill_for_the_rate():
    rows = [Published("s", "a", 2e9, 5.0, 1000, 3.0), Published("s", "b", 1e9, 6.0)]
    assert roofline.fit("s", rows) == Soc("s", Fit((1e10, 6e9)), Fit((3000.0,)))


def test_the_bandwidth_is_that_of_the_notes():
    """50.2 +- 4.7 GB/s and 12% are what npu.md claims of these six rates."""
    bandwidth = roofline.soc("SM8750").bandwidth
    assert len(bandwidth.points) == 6
    assert bandwidth.mean == pytest.approx(50.2e9, rel=0.002)
    assert bandwidth.spread == pytest.approx(4.7e9, rel=0.01)
    assert 0.12 < bandwidth.worst < 0.1225


def test_validation_predicts_each_rate_from_the_others():
    rows = roofline.validation()
    assert [(r.soc, r.phase, r.points) for r in rows].count(("SM8750", "decode", 5)) == 6
    errors = {(r.soc, r.model, r.phase): r.error for r in rows}
    assert len(errors) == len(rows) == 8 + 5
    # 677 MB at the mean of the other five bandwidths, 51.04 GB/s, is 75.4 tokens/s for 67.2.
    assert errors["SM8750", "Llama-3.2-1B", "decode"] == pytest.approx(0.122, abs=5e-4)
    # 8 Gen 3, each from the other: 3907 * 12 / (677 * 59), then 7.505 * 468 / (1.236 * 1877).
    assert errors["SM8650", "Llama-3.2-1B", "decode"] == pytest.approx(0.174, abs=5e-4)
    assert errors["SM8650", "Llama-3.2-1B", "prefill"] == pytest.approx(0.514, abs=5e-4)
    worst = {p: max(abs(r.error) for r in rows if r.phase == p) for p in ("decode", "prefill")}
    assert worst["decode"] < 0.18 and worst["prefill"] < 0.52


def test_an_estimate_names_the_error_of_its_fit():
    for name, phase in (("SM8750", "memory"), ("SM8650", "compute")):
        soc = roofline.soc(name)
        macs = {16: 10**15} if phase == "compute" else {16: 0}
        got = roofline.estimate(soc, 1e6, macs)
        kind = {"memory": "decode", "compute": "prefill"}[phase]
        errors = [abs(r.error) for r in roofline.validation() if (r.soc, r.phase) == (name, kind)]
        assert got.limit == phase and got.error == pytest.approx(max(errors))


def test_an_soc_without_measurements_is_refused():
    message = r"SM8350: no published measurement to estimate from; expected one of \['SM8650', "
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
    [(LLAMA_1B, "Llama-3.2-1B"), (LLAMA_3B, "Llama-3.2-3B"), (LLAMA_8B, "Llama-3-8B")],
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
