"""The program's answers against all plans there are."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_groups import between

from qnpu_jax.errors import UserError
from qnpu_jax.plan.costs import Cost, cost
from qnpu_jax.plan.groups import Choices
from qnpu_jax.plan.pairs import Losses, Pair
from qnpu_jax.plan.solver import Budget, Near, solve

N = 9
"""Groups that may be raised: 512 plans."""


@pytest.fixture(scope="module")
def problem() -> tuple[Choices, Cost, np.ndarray]:
    """The MLP of one layer, with casts so dear that they matter."""
    found = between("gqa_llama3", "w4a8")
    mine = [i for i, g in enumerate(found.groups) if g.name.startswith("layers.0.mlp.")]
    mine = mine[:N]
    number = {i: k for k, i in enumerate(mine)}
    small = Choices(
        found.low,
        found.high,
        tuple(found.groups[i] for i in mine),
        tuple((number[i], number[j]) for i, j in found.above if i in number and j in number),
    )
    made = cost(small, "SM8750", 200)
    made = replace(made, op=float(np.median(made.more_memory[made.more_memory > 0])))
    charges = np.random.default_rng(2).lognormal(-4, 1, len(mine))
    return small, made, charges


def allowed(found: Choices) -> list[tuple[bool, ...]]:
    every = itertools.product((False, True), repeat=len(found.groups))
    return [x for x in every if all(x[j] or not x[i] for i, j in found.above)]


def lost(charges: np.ndarray, x) -> float:
    return float(charges[~np.array(x)].sum())


@pytest.mark.parametrize("factor", [1.0, 1.0002, 1.001, 1.003, 1.1])
@pytest.mark.parametrize("what", ["decode", "prefill", "size", "both"])
def test_the_least_loss_within_a_budget(problem, what, factor):
    found, c, charges = problem
    low = [False] * len(found.groups)
    limits = {
        "decode": factor * c.decode(low),
        "prefill": factor * c.prefill(low),
        "size": factor * c.bytes(low),
    }
    if what == "both":
        limits.pop("size")
    else:
        limits = {what: limits[what]}
    budget = Budget(**limits)

    def fits(x) -> bool:
        spent = (c.decode(x), c.prefill(x), c.bytes(x))
        most = (budget.decode, budget.prefill, budget.size)
        return all(a <= b * (1 + 1e-9) for a, b in zip(spent, most, strict=True))

    best = min(lost(charges, x) for x in allowed(found) if fits(x))
    made = solve(found, c, Losses(0.0, charges), budget)
    assert tuple(made) in allowed(found)
    assert all(a <= b * (1 + 1e-6) for a, b in (
        (c.decode(made), budget.decode), (c.prefill(made), budget.prefill),
        (c.bytes(made), budget.size),
    ))  # fmt: skip
    assert lost(charges, made) <= best * 1.001 + 2e-6  # GAP, and what breaks ties between casts


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_least_time_at_a_loss(problem, share):
    found, c, charges = problem
    low = [False] * len(found.groups)
    limit = 0.01 + share * charges.sum()

    def slowness(x) -> float:
        return c.decode(x) / c.decode(low) + (c.prefill(x) / c.prefill(low))

    fits = [x for x in allowed(found) if 0.01 + lost(charges, x) <= limit + 1e-9]
    made = solve(found, c, Losses(0.01, charges), Budget(kl=limit))
    assert 0.01 + lost(charges, made) <= limit + 1e-6
    assert slowness(made) <= min(map(slowness, fits)) * 1.002


def test_a_trust_region_bounds_the_changes(problem):
    found, c, charges = problem
    low = [False] * len(found.groups)
    made = solve(found, c, Losses(0.0, charges), Budget(decode=1.0), near=Near(low, 2))
    assert sum(made) == 2
    assert all(solve(found, c, Losses(0.0, charges), Budget(decode=1.0)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [1.0002, 1.001, 1.003])
def test_the_least_loss_with_pair_terms(problem, factor, seed):
    """Terms of either sign, as large as what groups cost alone."""
    found, c, charges = problem
    rng = np.random.default_rng(seed)
    terms = rng.normal(0, charges.mean(), (N, N))
    pairs = tuple(Pair(i, j, terms[i, j]) for i in range(N) for j in range(i) if (i + j) % 3)
    losses = Losses(0.01, charges, tuple(Pair(j, i, t) for i, j, t in pairs))
    most = factor * c.decode([False] * N)
    best = min(losses.predicted(x) for x in allowed(found) if c.decode(x) <= most * (1 + 1e-9))
    made = solve(found, c, losses, Budget(decode=most))
    assert tuple(made) in allowed(found)
    assert c.decode(made) <= most * (1 + 1e-6)
    assert losses.predicted(made) <= best + 1e-3 * abs(best) + 2e-6  # GAP, and ties between casts


def test_a_budget_that_nothing_meets_says_what_could_be():
    found = between("gqa_llama3", "w4a8")
    c = cost(found, "SM8750", 200)
    zero = np.zeros(len(found.groups))
    least = 1e3 * min(c.decode([x] * len(zero)) for x in (False, True))
    with pytest.raises(UserError, match=rf"decode 0\.001 ms, at least {least:.4g}\); allow more"):
        solve(found, c, Losses(0.0, zero), Budget(decode=1e-6))
    with pytest.raises(UserError, match=r"KL 0\.1 nats, at least 0\.2"):
        solve(found, c, Losses(0.2, zero), Budget(kl=0.1))
