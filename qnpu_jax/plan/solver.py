"""The plan of least KL within a budget, or the fastest one within a KL: a mixed integer program.

    min  sum_g b_g (1 - x_g) + sum_(i,j) h_ij z_ij
    s.t. x_i <= x_j                       no kernel gives fewer bits than it takes
         k_c >= 1 - x_s, 1 - x_t          a cast that is there unless both its sides are high
         k_c >= x_t - x_s                 a cast that is there if its target is high alone
         k_c >= |x_t - x_s|               a cast that is there where the two differ
         z_ij = (1 - x_i) (1 - x_j)       a pair of low groups, by inequalities
         decode, prefill, size <= budget  `costs.Cost`, linear in x and k

x_g is 1 where group g is high, b_g its own term and h_ij that of a pair (`pairs.Losses`). The
solver is SciPy's HiGHS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from qnpu_jax.errors import UserError
from qnpu_jax.plan.costs import Cost
from qnpu_jax.plan.groups import Choices
from qnpu_jax.plan.pairs import Losses

SECONDS = 60.0
"""Longest time of one program. The best plan that HiGHS has by then is taken."""
GAP = 1e-3
"""Relative distance from the best possible plan at which HiGHS may stop."""


@dataclass(frozen=True)
class Budget:
    """Most that a plan may cost; infinite where it does not matter.

    Attributes:
      decode, prefill: seconds of a token and of a chunk.
      size: bytes of weights.
      kl: predicted nats per position; where it is given, the plan is the fastest one (decode and
        prefill, each relative to the low plan's; the smallest where there are no seconds) in place
        of the most exact.
    """

    decode: float = math.inf
    prefill: float = math.inf
    size: float = math.inf
    kl: float = math.inf


@dataclass(frozen=True)
class Near:
    """A trust region: at most `changes` groups differ from `plan`."""

    plan: Sequence[bool]
    changes: int


class _Rows:
    """Constraints a x <= b, row by row."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.entries: list[tuple[int, int, float]] = []
        self.most: list[float] = []

    def add(self, terms: dict[int, float], most: float) -> None:
        """Appends sum of terms <= most."""
        self.entries += [(len(self.most), i, a) for i, a in terms.items() if a]
        self.most.append(most)

    def constraints(self) -> list[LinearConstraint]:
        """Returns all of them as one, or none."""
        if not self.entries:
            return []
        rows, columns, values = zip(*self.entries, strict=True)
        shape = (len(self.most), self.columns)
        matrix = coo_array((values, (rows, columns)), shape=shape).tocsr()
        most: Any = np.array(self.most)
        return [LinearConstraint(matrix, -np.inf, most)]


def solve(
    found: Choices,
    cost: Cost,
    losses: Losses,
    budget: Budget,
    near: Near | None = None,
) -> list[bool]:
    """Finds the best plan within a budget.

    Args:
      losses: predicted KL of every plan.
      near: a plan that the result may not be far from.

    Returns:
      Which groups are raised.

    Raises:
      UserError: no plan is within the budget; says the nearest budget that one meets.
    """
    n, m = len(found.groups), len(cost.casts)
    if not found.groups:  # the only plan
        if cost.size > budget.size or losses.base > budget.kl:
            raise UserError(_nearest(cost, losses, budget))
        return []
    rows = _Rows(n + m + len(losses.pairs))
    for i, j in found.above:
        rows.add({i: 1.0, j: -1.0}, 0.0)
    _cast_rows(rows, cost, n)
    _pair_rows(rows, losses, n + m)
    _budget_rows(rows, cost, budget, n)
    if near is not None:
        flips = {i: -1.0 if up else 1.0 for i, up in enumerate(near.plan)}
        rows.add(flips, near.changes - float(sum(near.plan)))
    both = np.array([p.term for p in losses.pairs])
    if math.isfinite(budget.kl):
        lost = np.concatenate([-losses.own, np.zeros(m), both])
        rows.add(_terms(lost), budget.kl - losses.base - float(losses.own.sum()))
        objective = np.concatenate([_slowness(cost, n, m), np.zeros(len(both))])
    else:
        # A millionth of a nat for all casts together: none comes that nothing asks for.
        objective = np.concatenate([-losses.own, np.full(m, 1e-6 / max(m, 1)), both])
    # With presolve it is three times faster, and prints lines of its own whatever it is told.
    options = {"time_limit": SECONDS, "mip_rel_gap": GAP, "presolve": False}
    made = milp(
        objective, integrality=[1] * (n + m) + [0] * len(both), bounds=Bounds(0, 1),
        constraints=rows.constraints(), options=options,
    )  # fmt: skip
    if made.x is None:
        raise UserError(_nearest(cost, losses, budget))
    return [bool(x > 0.5) for x in made.x[:n]]


def _terms(values: Float64[np.ndarray, " k"]) -> dict[int, float]:
    return {i: float(x) for i, x in enumerate(values)}


def _budget_rows(rows: _Rows, cost: Cost, budget: Budget, n: int) -> None:
    """Appends what the plan may cost: milliseconds, and MB."""
    casting = dict.fromkeys(range(n, n + len(cost.casts)), 1e3 * cost.op)
    memory = _terms(1e3 * cost.more_memory) | casting
    beside = 0.0 if cost.overlap else 1.0
    compute = _terms(1e3 * (cost.more_compute + beside * cost.more_memory)) | casting
    busy = cost.compute + beside * cost.memory
    for terms, most in (
        (memory, 1e3 * (budget.decode - cost.start - cost.memory)),
        (memory, 1e3 * (budget.prefill - cost.start - cost.memory)),
        (compute, 1e3 * (budget.prefill - cost.start - busy)),
        (_terms(1e-6 * cost.more_size), 1e-6 * (budget.size - cost.size)),
    ):
        if math.isfinite(most):
            rows.add(terms, float(most))


def _cast_rows(rows: _Rows, cost: Cost, n: int) -> None:
    for c, cast in enumerate(cost.casts, start=n):
        source = {} if cast.source is None else {cast.source: 1.0}
        if cast.when == "unless":
            for side in (*cast.targets, *source):
                rows.add({side: -1.0, c: -1.0}, -1.0)
            continue
        for target in cast.targets:
            rows.add({target: 1.0, c: -1.0} | {s: -a for s, a in source.items()}, 0.0)
        if cast.when == "differ" and source:
            others = dict.fromkeys(cast.targets, -1.0)
            rows.add(source | others | {c: -1.0}, 0.0)


def _pair_rows(rows: _Rows, losses: Losses, first: int) -> None:
    """Ties z to its two groups: from below where it costs, from above where it saves."""
    for z, (i, j, term) in enumerate(losses.pairs, start=first):
        if term > 0:
            rows.add({i: -1.0, j: -1.0, z: -1.0}, -1.0)
        else:
            rows.add({z: 1.0, i: 1.0}, 1.0)
            rows.add({z: 1.0, j: 1.0}, 1.0)


def _slowness(cost: Cost, n: int, m: int) -> Float64[np.ndarray, " c"]:
    """Seconds of decode and of prefill's compute, each relative to the low plan's; without seconds
    the bytes of weights, and a millionth for all groups and casts together, as in `solve`."""
    low = [False] * n
    if not cost.timed:
        idle = 1e-6 / (n + m)
        return np.concatenate([cost.more_size / cost.size + idle, np.full(m, idle)])
    decode, prefill = cost.decode(low), cost.prefill(low)
    busy = cost.more_compute + (0.0 if cost.overlap else cost.more_memory)
    groups = cost.more_memory / decode + busy / prefill
    return np.concatenate([groups, np.full(m, cost.op * (1 / decode + 1 / prefill))])


def _nearest(cost: Cost, losses: Losses, budget: Budget) -> str:
    """The message that no plan is within a budget."""
    low, high = ([up] * len(losses.own) for up in (False, True))
    met = []
    for name, asked, least, unit, factor in (
        ("decode", budget.decode, min(cost.decode(low), cost.decode(high)), "ms", 1e3),
        ("prefill", budget.prefill, min(cost.prefill(low), cost.prefill(high)), "ms", 1e3),
        ("size", budget.size, cost.bytes(low), "MB", 1e-6),
        ("KL", budget.kl, losses.base, "nats", 1.0),
    ):
        if asked < least:
            met.append(f"{name} {factor * asked:.4g} {unit}, at least {factor * least:.4g}")
    named = "; ".join(met) or "each of them alone could be met, all of them at once cannot"
    return f"budget: no plan meets it ({named}); allow more"
