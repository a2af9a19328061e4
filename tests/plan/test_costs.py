"""Costs of plans, against the graphs that these plans stage."""

import numpy as np
import pairwise
import pytest
from test_groups import between, closed

from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import Decoder, decoder
from qnpu_jax.graph.graph import is_identity
from qnpu_jax.graph.ops import Requantize
from qnpu_jax.latency import ethos_rates, roofline
from qnpu_jax.plan.costs import cost
from qnpu_jax.plan.pairs import Losses
from qnpu_jax.plan.solver import Budget, solve

CONTEXT = 200


def staged(found, up, tokens: int) -> Decoder:
    dec = found.low
    return decoder(dec.config, found.plan(up), tokens, dec.prefix, CONTEXT - tokens, "last")


def quantizes(dec: Decoder) -> int:
    """QUANTIZE ops: requantizes that change something."""
    return sum(
        isinstance(n.op, Requantize) and not is_identity(g, n, layer)
        for g in dec.graphs
        for layer in range(g.layers)
        for n in g.nodes
    )


def plans(found):
    random = np.random.default_rng(5)
    for share in (0.0, 0.03, 0.2, 0.6, 1.0):
        yield closed(found, random.random(len(found.groups)) < share)


@pairwise.parametrize(
    ("name", "low"),
    ["gqa_llama3", "gemma3_tiny", "qwen2_tiny", "olmo2_tiny"],
    ["w4a8", "w4a8s8", "w4a8i8"],
    choose=pairwise.levels,
)
def test_casts_are_the_ops_that_a_plan_has_more_or_less_of(name, low):
    """In a graph all layers have the ops of any: only plans alike in all layers can be counted."""
    found = between(name, low)
    c = cost(found, "SM8750", CONTEXT)
    random = np.random.default_rng(1)
    kinds = {m.name for g in found.groups for m in g.members[:1]}
    base = None
    for share in (0.0, 0.1, 0.4, 1.0):
        chosen = {k for k in sorted(kinds) if random.random() < share}
        up = np.array([g.members[0].name in chosen for g in found.groups])
        up = closed(found, up)
        ops = quantizes(staged(found, up, 1))
        base = ops - c.casting(up) if base is None else base
        assert ops - c.casting(up) == base, chosen


@pytest.mark.parametrize("name", ["gqa_llama3", "gemma3_tiny"])
def test_seconds_are_those_of_the_roofline_and_casts(name):
    found = between(name, "w4a8")
    c, soc = cost(found, "SM8750", CONTEXT), roofline.soc("SM8750")
    for up in plans(found):
        token, chunk = staged(found, up, 1), staged(found, up, roofline.CHUNK)
        moved = roofline.least_bytes(token)
        casting = c.op * c.casting(up)
        assert c.decode(up) - casting == pytest.approx(soc.memory.seconds(moved), rel=1e-9)
        macs = roofline.macs(chunk)
        compute = sum(n * roofline.WIDTH_TIME[b] for b, n in macs.items()) / soc.rate.mean
        expected = c.start + max(compute, moved / soc.memory.bandwidth)
        assert c.prefill(up) - casting == pytest.approx(expected, rel=1e-9)
        weights = sum(
            np.prod(t.shape) * bits / 8
            for g in token.graphs
            for t in g.named("param")
            if t.name.endswith("weight")
            for bits in t.quant.bits
        )
        assert c.bytes(up) == pytest.approx(weights)


def test_seconds_of_an_ethos_u_are_those_of_its_rates():
    """Ops and bytes of a step; of a chunk MACs beside them, not at once."""
    found, fit = between("gqa_llama3", "w4a8"), ethos_rates.FITS["ethos-u85-2048"]
    c = cost(found, "ethos-u85-2048", CONTEXT)
    assert c.error == fit.errors and c.op == fit.op
    for up in plans(found):
        token, chunk = staged(found, up, 1), staged(found, up, roofline.CHUNK)
        ops = sum(len(g.nodes) * g.layers for g in staged(found, [False] * len(up), 1).graphs)
        step = fit.op * (ops + c.casting(up)) + roofline.least_bytes(token) / fit.bandwidth
        assert c.decode(up) == pytest.approx(step, rel=1e-9)
        macs = sum(n * fit.mac[b] for b, n in roofline.macs(chunk).items())
        assert c.prefill(up) == pytest.approx(step + macs, rel=1e-9)


@pytest.mark.parametrize("soc", ["SM8750", "ethos-u85-2048", "SA8295"])
def test_what_the_solver_finds_is_within_a_budget(soc):
    found = between("gqa_llama3", "w4a8s8")
    c, low = cost(found, soc, CONTEXT), [False] * len(found.groups)
    charged = np.random.default_rng(3).random(len(low))
    for factor in (1.0, 1.02, 1.2):
        budget = Budget(factor * c.decode(low), factor * c.prefill(low))
        up = solve(found, c, Losses(0.0, charged), budget)
        assert c.decode(up) <= budget.decode * (1 + 1e-6)
        assert c.prefill(up) <= budget.prefill * (1 + 1e-6)


def test_an_unknown_soc_is_refused():
    with pytest.raises(UserError, match="--soc SM1: unknown; expected one of"):
        cost(between("gqa_llama3", "w4a8"), "SM1", CONTEXT)
