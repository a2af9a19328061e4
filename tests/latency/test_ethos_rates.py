"""Rates fitted to vela's estimates: equations, errors, and models that they have not seen."""

import numpy as np
import pytest
import tiny

from qnpu_jax.graph.decoder import decoder
from qnpu_jax.latency import ethos_rates, roofline
from qnpu_jax.latency.ethos_rates import FITS, REPORTS, ArmFit, Report

MADE = ArmFit(2e-6, 4e9, {8: 5e-12, 16: 2e-11})


def report(tokens: int, ops: int, macs: tuple[int, int], moved: float) -> Report:
    """What MADE takes."""
    asked = Report("x", "r", 1, tokens, ops, macs, moved, 1.0)
    return asked._replace(seconds=MADE.seconds(asked))


def made() -> list[Report]:
    sizes = ((200, 10**8, 10**9), (500, 10**9, 0), (900, 0, 10**10), (300, 10**9, 10**9))
    return [
        report(tokens, ops, (8 * a, b), 1e5 * ops**1.2)
        for ops, a, b in sizes
        for tokens in (1, 128)
    ]


def test_seconds_by_hand():
    step = Report("x", "r", 1, 1, 1000, (10**9, 0), 4e6, 0.0)
    assert MADE.seconds(step) == pytest.approx(2e-3 + 1e-3)  # a step waits for bytes, not for MACs
    chunk = step._replace(tokens=128, macs=(10**9, 10**8))
    assert MADE.seconds(chunk) == pytest.approx(2e-3 + 1e-3 + 5e-3 + 2e-3)


def test_rates_that_made_the_reports_are_found_again():
    found = ethos_rates.fit(made())
    assert found.op == pytest.approx(MADE.op)
    assert found.bandwidth == pytest.approx(MADE.bandwidth)
    assert found.mac == pytest.approx(MADE.mac)
    assert max(found.errors) < 1e-9


@pytest.mark.parametrize("name", FITS)
def test_errors_of_decode_are_those_of_the_hat_matrix(name):
    rows = [r for r in REPORTS if r.accelerator == name and r.tokens == 1]
    a = np.array([[r.ops, r.moved / 1e5] for r in rows])
    a = a / np.array([r.seconds for r in rows])[:, None]
    hat = a @ np.linalg.inv(a.T @ a) @ a.T
    residuals = (1 - hat.sum(1)) / (1 - np.diag(hat))
    assert FITS[name].errors[0] == pytest.approx(np.abs(residuals).max(), rel=1e-6)


@pytest.mark.parametrize("name", FITS)
def test_an_error_of_prefill_is_that_of_the_worst_left_out(name):
    rows = [r for r in REPORTS if r.accelerator == name]
    errors = [
        ethos_rates.fit([r for r in rows if r is not out]).seconds(out) / out.seconds - 1
        for out in rows
        if out.tokens > 1
    ]
    assert FITS[name].errors[1] == pytest.approx(max(map(abs, errors)))


def test_they_are_in_order():
    small, large = FITS["ethos-u85-256"], FITS["ethos-u85-2048"]
    for f in (small, large):
        assert f.mac[8] < f.mac[16]
    assert small.mac[8] > 2 * large.mac[8]
    # At most the design's 12 GB/s of DRAM, with 1% for what vela's coder saves of 8-bit weights.
    assert 0.9 * 12e9 < large.bandwidth < 1.01 * 12e9


# Arm's estimates of all 30 layers, learned weights and a prefix (benchmarks/README.md).
WHOLE = {
    ("w8a8", 128): 96.48e-3, ("w8a8", 1): 19.86e-3, ("w4a8", 128): 95.29e-3, ("w4a8", 1): 15.31e-3,
    ("w8a8i8", 128): 73.83e-3, ("w8a8i8", 1): 19.04e-3, ("w4a8i8", 128): 72.67e-3,
    ("w4a8i8", 1): 14.50e-3,
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "tokens"), WHOLE)
def test_a_model_five_times_as_deep_is_predicted_as_well(recipe, tokens):
    dec = decoder(tiny.SMOLLM2, tiny.PLANS[recipe], tokens, 2, 512 - tokens, "last")
    macs, fit = roofline.macs(dec), FITS["ethos-u85-2048"]
    asked = Report(
        "ethos-u85-2048", recipe, 30, tokens, sum(len(g.nodes) * g.layers for g in dec.graphs),
        (macs.get(8, 0), macs.get(16, 0)), roofline.least_bytes(dec), WHOLE[recipe, tokens],
    )  # fmt: skip
    # Steps of decode waited for bytes in the small models too; a prefill's ops differ more.
    worst = 0.05 if tokens == 1 else 0.16
    assert abs(fit.seconds(asked) / asked.seconds - 1) < worst
