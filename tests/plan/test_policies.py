"""Other planners: their picks against definitions by hand, all of them run, and what is shown."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from test_groups import between, closed
from test_plan_command import LOW, PLAN

from qnpu_jax.errors import UserError
from qnpu_jax.plan import POLICIES, PlanRequest, Point, exceptions, front_figure, run, write_plan
from qnpu_jax.plan.bench import Bench
from qnpu_jax.plan.charges import Mixed
from qnpu_jax.plan.costs import cost
from qnpu_jax.plan.picks import PICKS, fits
from qnpu_jax.plan.policies import exceptions as not_dominated
from qnpu_jax.plan.policies import named
from qnpu_jax.plan.scores import SCORES
from qnpu_jax.plan.solver import Budget
from qnpu_jax.progress import Observer
from qnpu_jax.recipes import RECIPES


@pytest.fixture(scope="module")
def problem():
    """A bench that prices and ties groups, with casts so dear that they matter, and scores."""
    found = between("gqa_llama3", "w4a8")
    priced = cost(found, "SM8750", 200)
    priced = dataclasses.replace(priced, op=float(np.median(priced.more_memory)))
    bench = Bench(Mixed(found, {}, {}, {}, {}), priced, np.zeros((0, 0), int), (), Observer())
    return bench, np.random.default_rng(3).lognormal(-4, 1, len(found.groups))


def within(bench: Bench, share: float) -> Budget:
    """What the low plan takes, and a share of what all groups add to it."""
    c, none = bench.cost, [False] * len(bench.model.choices.groups)
    more = (c.more_memory.sum(), np.maximum(c.more_memory, c.more_compute).sum())
    return Budget(c.decode(none) + share * more[0], c.prefill(none) + share * more[1])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.7])
@pytest.mark.parametrize("pick", PICKS)
def test_every_pick_keeps_the_budget_and_raises_what_must_follow(problem, pick, share):
    bench, scores = problem
    up = PICKS[pick](bench, scores, within(bench, share))
    assert closed(bench.model.choices, np.array(up)) == up
    assert bench.cost.decode(up) <= within(bench, share).decode * (1 + 1e-6)
    assert bench.cost.prefill(up) <= within(bench, share).prefill * (1 + 1e-6)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.7])
def test_threshold_is_the_longest_prefix_that_fits(problem, share):
    bench, scores = problem
    found, order = bench.model.choices, np.argsort(-scores)
    best = None
    for n in range(len(scores) + 1):
        up = np.zeros(len(scores), bool)
        up[order[:n]] = True
        up = closed(found, up)
        if fits(bench.cost, within(bench, share), up):
            best = up
    assert PICKS["threshold"](bench, scores, within(bench, share)) == best


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_greedy_leaves_out_only_what_did_not_fit(problem, share):
    """Walked again with what must follow found another way."""
    bench, scores = problem
    up = PICKS["greedy"](bench, scores, within(bench, share))
    assert any(up) and not all(up)
    sofar = [False] * len(scores)
    for i in np.argsort(-scores):
        more = np.array(sofar)
        more[i] = True
        more = closed(bench.model.choices, more)
        if fits(bench.cost, within(bench, share), more):
            sofar = more
    assert sofar == up


def test_what_is_not_asked_for_stays_low(problem):
    bench, scores = problem
    one = np.where(np.arange(len(scores)) == 1, 1.0, -np.inf)
    for pick in ("greedy", "threshold"):
        assert np.flatnonzero(PICKS[pick](bench, one, Budget())).tolist() == [1]
    assert sum(PICKS["program"](bench, np.where(one > 0, one, 0), within(bench, 0.3))) >= 1


def test_casts_that_are_priced_lose_less(problem):
    """Both keep the budget; one knows what it asks for."""
    bench, charges = problem
    for share in (0.0, 0.05, 0.3):
        a, b = (
            float(charges[~np.array(PICKS[p](bench, charges, within(bench, share)))].sum())
            for p in ("program", "program without casts")
        )
        assert a <= b * 1.001 + 2e-6  # GAP of the solver, and what breaks ties between casts


def test_policies_name_what_there_is():
    for policy in POLICIES.values():
        assert policy.pick in PICKS or policy.pick == "kinds"
        assert (policy.score in SCORES) == (policy.pick != "kinds")
        assert policy.about
    assert {p.score for p in POLICIES.values()} >= SCORES.keys() - {""}


def test_names_are_expanded_and_checked():
    assert named(["sqnr", "fisher", "sqnr"]) == ("sqnr", "fisher")
    assert set(named(["all"])) == POLICIES.keys() - {"removal"}
    with pytest.raises(UserError, match="--baseline mse: no such planner; expected one of sqnr, "):
        named(["sqnr", "mse"])


@pytest.fixture(scope="module")
def planned(made):
    asked = PlanRequest(
        model=str(made / "model"), soc="SM8750", low=LOW, high=RECIPES["w8a16"], least=LOW,
        within=1.001, calibration=made / "text.txt", context=200, baselines=tuple(POLICIES),
    )  # fmt: skip
    return run.plan(asked, Observer())


def test_every_policy_has_a_plan_for_every_budget(planned):
    budgets = [f"{f:.2f}" for f in run.FRONT]
    assert [*planned.baselines] == [*POLICIES]
    for name, points in planned.baselines.items():
        if name == "uniform":
            assert [p.name for p in points] == ["activations high", "weights high"]
            continue
        assert [p.name for p in points] == budgets
        for p, factor in zip(points, run.FRONT, strict=True):
            planned.choices.plan(p.raised)  # refuses what does not follow
            assert p.decode <= factor * planned.low.decode * (1 + 1e-6)
            assert p.prefill <= factor * planned.low.prefill * (1 + 1e-6)
            assert p.kl == pytest.approx(np.mean(p.kls)) and p.kl > 0
            assert math.isfinite(p.predicted) == POLICIES[name].score.startswith("charge")


def test_policies_raise_what_they_are_about(planned):
    groups = planned.choices.groups
    raised = {
        name: {groups[i].name for p in points for i, up in enumerate(p.raised) if up}
        for name, points in planned.baselines.items()
    }
    assert all(n.endswith("weight") for n in raised["kurtosis"]) and raised["kurtosis"]
    assert raised["paper"] and all(".mlp." in n for n in raised["paper"])
    for p in planned.baselines["uniform"]:
        kind = p.name.split()[0].removesuffix("s")
        assert [g.kind == kind for g in groups] == list(p.raised)
    once = [p.raised for p in planned.baselines["once"]]
    assert once == [p.raised for p in planned.front]
    random = planned.baselines["random"]
    assert random[0].raised != planned.baselines["relative"][-1].raised


def test_the_files_hold_the_other_planners(planned, tmp_path):
    write_plan(planned, tmp_path / "made", False, front_figure.draw)
    front = json.loads((tmp_path / "made" / "front.json").read_text())
    rows = {row["policy"]: row for row in front["baselines"]}
    assert [*rows] == [*POLICIES]
    assert rows["sqnr"]["source"].startswith("ExecuTorch")
    for name, row in rows.items():
        for p, written in zip(planned.baselines[name], row["points"], strict=True):
            assert written["kl"] == pytest.approx(p.kl, rel=1e-5)
            assert len(written["raised"]) == sum(p.raised)
    assert rows["sqnr"]["points"][0]["predicted"] is None
    found = [(e.policy, e.point) for e in exceptions(planned)]
    assert [(e["policy"], e["point"]) for e in front["exceptions"]] == found
    root = ET.fromstring((tmp_path / "made" / "plan.svg").read_text())
    shown = {"".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert POLICIES.keys() - {"uniform"} | {"weights high", "activations high"} <= shown


def point(name: str, kls: tuple[float, ...], time: float = 1.0) -> Point:
    return Point(name, (), math.nan, kls, time, time, 0.0, 0)


def test_exceptions_are_beyond_the_standard_error():
    ours = (point("1.00", (0.2, 0.4)), point("1.10", (0.1, 0.1), 1.1))
    others = {
        "worse": (point("1.00", (0.3, 0.5)), point("1.10", (0.2, 0.3))),
        "within": (point("1.00", (0.1, 0.45)),),  # ours is .025 more, +- .075
        "better": (point("1.00", (0.1, 0.29)), point("1.10", (0.09, 0.08))),
        "uniform": (point("a", (0.05, 0.06), 1.2), point("b", (0.2, 0.2), 1.2)),
        "faster": (point("c", (0.5, 0.5), 0.9),),
    }
    found = not_dominated(ours, others)
    names = [(e.policy, e.point) for e in found]
    assert names == [("better", "1.00"), ("better", "1.10"), ("uniform", "a"), ("faster", "c")]
    assert found[0].ours == pytest.approx(0.3) and found[0].theirs == pytest.approx(0.195)
    assert found[0].error == pytest.approx(0.005)
    assert found[3].ours == math.inf


def test_the_command_shows_other_planners(qnpu, here):
    (here / "low.json").write_text(json.dumps(LOW.to_json()))
    status, out, _ = qnpu(*PLAN.split(), "--within", "1.002", "--baseline", "sqnr")
    assert status == 0
    assert "other planners: KL, in thousandths" in out
    rows = [line for line in out.splitlines() if "sqnr" in line or "ours " in line]
    assert len(rows) >= 2
    assert "within the standard error" in out or "another planner loses less" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--baseline", "mse"], "--baseline mse: no such planner; expected one of sqnr, relative"),
        (["--baseline", "sqnr", "--no-front"], "plan: --baseline without a front to compare with"),
    ],
)
def test_mistakes_are_one_line(refused, here, more, message):
    (here / "low.json").write_text(json.dumps(LOW.to_json()))
    assert message in refused(*PLAN.split(), "--within", "1.01", *more)
