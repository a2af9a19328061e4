"""Other planners as data: a score of groups and a way to pick by it, on the axes of our front.

Each is given our groups, our costs with casts, and what must follow a raised group; its own are
the order and the pick. The sources plan for less: weights alone, or one activation a layer, or no
budget of time. What they leave out stays low here too (`Policy.among`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from qnpu_jax.errors import UserError
from qnpu_jax.plan.bench import Point, standard_error
from qnpu_jax.plan.groups import Choices, Member
from qnpu_jax.plan.pairs import Losses
from qnpu_jax.plan.picks import PICKS
from qnpu_jax.plan.scores import SCORES, Known
from qnpu_jax.plan.solver import Budget

UNIFORM = "uniform"
"""Policy of no budget: all groups of a kind."""
ALL = "all"
"""Stands for every policy that is not slow."""


@dataclass(frozen=True)
class Policy:
    """Rule of a planner.

    Attributes:
      about: one line.
      source: where the rule comes from, and where we differ.
      score: one of `scores.SCORES`; empty where all groups of a kind are raised.
      pick: one of `picks.PICKS`, or "kinds" for all groups of each kind.
      among: patterns of the tensors that it raises; what must follow these is raised too.
      slow: takes a pass for every group.
    """

    about: str
    source: str
    score: str
    pick: str
    among: tuple[str, ...] = ("*",)
    slow: bool = False


POLICIES: dict[str, Policy] = {
    "sqnr": Policy(
        "all tensors below an SQNR",
        "ExecuTorch, mix_precision_analyzer.py: weights of layers below 10 dB; here all tensors,"
        " and the highest threshold that the budget allows",
        "sqnr", "threshold",
    ),
    "relative": Policy(
        "largest relative error first",
        "the score of Quant.npu (arXiv 2605.20295), over all tensors",
        "relative", "greedy",
    ),
    "paper": Policy(
        "inputs of down of the largest relative error",
        "Quant.npu (arXiv 2605.20295): the k of largest error, as many as the budget allows",
        "relative", "threshold", ("*.mlp.act",),
    ),
    "fisher": Policy(
        "least sum of (g e)^2, by a program",
        "NVIDIA ModelOpt 0.47, AutoQuantizeGradientSearcher: a linear's weight and input together,"
        " for effective bits; here apart, for the time with casts",
        "fisher", "program",
    ),
    "removal": Policy(
        "largest fall of KL when raised alone first",
        "Samsung TICO 0.3, LEAVE_ONE_FLOAT: its greedy search measures again after each step; here"
        " once, on two windows",
        "removal", "greedy", slow=True,
    ),
    "kurtosis": Policy(
        "weights of the largest kurtosis first",
        "a usual ranking of weights by tails; the packages of ai-edge-quantizer 0.10, TICO 0.3"
        " and ModelOpt 0.47 have none such",
        "kurtosis", "greedy", ("*.weight",),
    ),
    "random": Policy("any order", "", "random", "greedy"),
    UNIFORM: Policy("all weights, or all activations; no budget", "", "", "kinds"),
    "charge-greedy": Policy(
        "largest charge by time first", "ours, without the program", "charge per second", "greedy"
    ),
    "no-casts": Policy(
        "the program as if casts took no time", "ours, without casts", "charge",
        "program without casts",
    ),
    "once": Policy("the program, charged once", "ours, without rounds", "charge", "program"),
}  # fmt: skip
"""Policies by name."""


def named(names: Iterable[str]) -> tuple[str, ...]:
    """Expands ALL, and leaves out what was named before.

    Raises:
      UserError: a name of no policy.
    """
    every = [n for n, p in POLICIES.items() if not p.slow]
    found = [n for name in names for n in (every if name == ALL else [name])]
    check(found)
    return tuple(dict.fromkeys(found))


def check(names: Iterable[str]) -> None:
    """Refuses names of no policy."""
    for name in names:
        if name not in POLICIES:
            raise UserError(
                f"--baseline {name}: no such planner; expected one of {', '.join(POLICIES)} or"
                f" {ALL}; name one of them"
            )


def baselines(
    known: Known, names: Sequence[str], budgets: Mapping[str, Budget], points: Sequence[Point]
) -> dict[str, tuple[Point, ...]]:
    """Finds and measures the plans of policies.

    Args:
      names: of POLICIES.
      budgets: by name; a point for each has that name.
      points: plans whose KL is known.
    """
    kls = {p.raised: np.array(p.kls) for p in points}
    found, watch = known.bench.model.choices, known.bench.watch
    made: dict[str, tuple[Point, ...]] = {}
    for name in names:
        policy = POLICIES[name]
        with watch.stage(f"plan by {name}"):
            plans = _kinds(found) if policy.pick == "kinds" else _plans(known, policy, budgets)
            mine = []
            for label, raised in watch.track(plans.items(), len(plans), f"plan by {name}"):
                at = math.nan
                if policy.score.startswith("charge"):
                    at = Losses(known.base, np.maximum(known.charges, 0.0)).predicted(raised)
                point = known.bench.point(label, raised, at, kls.get(tuple(raised)))
                kls[point.raised] = np.array(point.kls)
                mine.append(point)
        made[name] = tuple(mine)
    return made


def _plans(known: Known, policy: Policy, budgets: Mapping[str, Budget]) -> dict[str, list[bool]]:
    """Picks a plan for each budget."""
    watch, pick = known.bench.watch, PICKS[policy.pick]
    scores = _among(known.bench.model.choices, policy, SCORES[policy.score](known))
    if policy.pick.startswith("program"):
        scores = scores * _unit(known, scores)
    each = watch.track(budgets.items(), len(budgets), f"{policy.score}, {policy.pick}")
    return {name: pick(known.bench, scores, budget) for name, budget in each}


def _unit(known: Known, scores: Float64[np.ndarray, " g"]) -> float:
    """The factor to nats: scores then sum to what charges do, beside which the program weighs
    casts that cost it nothing."""
    total = float(np.maximum(scores, 0.0).sum())
    return float(np.maximum(known.charges, 0.0).sum()) / total if total > 0 else 1.0


def _among(
    found: Choices, policy: Policy, scores: Float64[np.ndarray, " g"]
) -> Float64[np.ndarray, " g"]:
    """Scores with -inf for groups of which the policy raises no tensor."""

    def asked(m: Member) -> bool:
        graph = next(g for g in found.low.graphs if g.prefix == m.prefix)
        name = graph.global_name(m.layer, m.name)
        return any(fnmatchcase(name, pattern) for pattern in policy.among)

    mine = [any(asked(m) for m in group.members) for group in found.groups]
    return np.where(mine, scores, -np.inf)


def _kinds(found: Choices) -> dict[str, list[bool]]:
    """The plans that raise all groups of one kind; none where there is one kind."""
    kinds = sorted({g.kind for g in found.groups})
    plans = {f"{k}s high": [g.kind == k for g in found.groups] for k in kinds}
    return plans if len(plans) > 1 else {}


class Exceeded(NamedTuple):
    """A point of another planner that loses less than ours.

    Attributes:
      policy, point: names.
      ours, theirs: KL, nats per position; ours is infinite where no plan of ours is as fast.
      error: standard error of the difference over windows.
    """

    policy: str
    point: str
    ours: float
    theirs: float
    error: float


def exceptions(
    ours: Sequence[Point], baselines: Mapping[str, tuple[Point, ...]]
) -> tuple[Exceeded, ...]:
    """Finds points that our front does not dominate: ours - theirs > its standard error.

    A point is compared with ours of the same budget; where none has its name, with the best of ours
    that costs no more.
    """
    made = []
    for policy, points in baselines.items():
        for p in points:
            same = [q for q in ours if q.name == p.name]
            faster = [q for q in ours if _as_cheap(q, p)]
            best = min(same or faster, key=lambda q: q.kl, default=None)
            if best is None:
                made.append(Exceeded(policy, p.name, math.inf, p.kl, math.nan))
                continue
            error = standard_error(np.subtract(best.kls, p.kls))
            if best.kl - p.kl > (0.0 if math.isnan(error) else error):
                made.append(Exceeded(policy, p.name, best.kl, p.kl, error))
    return tuple(made)


def _as_cheap(q: Point, p: Point) -> bool:
    """Whether q takes no more time than p; no more bytes where there are no seconds."""
    if math.isnan(p.decode):
        return q.size <= p.size
    return q.decode <= p.decode and q.prefill <= p.prefill
