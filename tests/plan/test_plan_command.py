"""`qnpu plan` as a user meets it: the recipe, the front and the figure, and what it refuses."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from workspace import EVAL_TOKENS, PREFILL, request

from qnpu_jax import artifacts, job
from qnpu_jax.config import BitPlan
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.models.checkpoint import load
from qnpu_jax.plan import PlanRequest, feasible, front_figure, run, targets, write_plan
from qnpu_jax.plan.prepared import prepared, relearned
from qnpu_jax.progress import Observer
from qnpu_jax.proof import Simulated
from qnpu_jax.recipes import EFFORTS, RECIPES, Effort, load_recipe

LOW = dataclasses.replace(RECIPES["w4a8"], prefix="none", split_channels=0)
PLAN = "plan model --soc SM8750 --low low.json --calibration text.txt --context 200 --out made"


@pytest.fixture(scope="module")
def asked(made) -> PlanRequest:
    return PlanRequest(
        model=str(made / "model"), soc="SM8750", low=LOW, high=RECIPES["w8a16"], least=LOW,
        within=1.001, calibration=made / "text.txt", context=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(asked):
    return run.plan(asked, Observer())


@pytest.fixture
def low(here):
    """A working folder with LOW in a file."""
    (here / "low.json").write_text(json.dumps(LOW.to_json()))
    return here


def test_a_plan_costs_no_more_than_was_asked_for(planned):
    assert planned.chosen.decode <= 1.001 * planned.low.decode * (1 + 1e-6)
    assert planned.chosen.prefill <= 1.001 * planned.low.prefill * (1 + 1e-6)
    for point, factor in zip(planned.front, run.FRONT, strict=True):
        assert point.decode <= factor * planned.low.decode * (1 + 1e-6)
        assert point.prefill <= factor * planned.low.prefill * (1 + 1e-6)


def test_more_of_a_budget_is_predicted_to_lose_less(planned):
    predicted = [p.predicted for p in planned.front]
    assert predicted == sorted(predicted, reverse=True)
    assert planned.high.kl < planned.low.kl
    assert planned.front[-1].kl < planned.low.kl


def test_the_recipe_has_the_widths_of_the_plan(planned, made):
    recipe = planned.recipe
    assert dataclasses.replace(recipe, name=LOW.name, bits=LOW.bits) == LOW
    dec = decoder(load(str(made / "model")).config, recipe.bits, 5)
    for group, up in zip(planned.choices.groups, planned.chosen.raised, strict=True):
        m = group.members[0]
        graph = next(g for g in dec.graphs if g.prefix == m.prefix)
        assert graph[m.name].quant.bits[m.layer] == (group.high if up else group.low)


@pytest.fixture(scope="module")
def learned(asked):
    effort = Effort("short", steps=6, batch=2, length=32, tokens=2048, held_out=2)
    return run.plan(dataclasses.replace(asked, effort=effort, front=False), Observer())


def test_what_learning_mends_needs_no_bits(learned, tmp_path):
    """The plan after learning, and the one that is best then, within the same budget."""
    first, again = learned.learned
    assert (first.name, again.name) == ("plan, learned", "solved again")
    best = min(first, again, key=lambda p: p.kl)
    assert learned.chosen.raised == best.raised
    for point in learned.learned:
        assert point.decode <= 1.001 * learned.low.decode * (1 + 1e-6)
    changed = sum(a != b for a, b in zip(first.raised, again.raised, strict=True))
    assert changed <= max(1, round(run.CHANGES * len(again.raised)))
    write_plan(learned, tmp_path / "made", overwrite=False)
    points = json.loads((tmp_path / "made" / "front.json").read_text())["points"]
    assert [p["name"] for p in points][-2:] == ["plan, learned", "solved again"]


def test_learning_of_no_steps_changes_no_error(asked):
    """Parameters and ranges of the low plan again, to the bit."""
    ready = prepared(asked, load(asked.model), Observer())
    none = [False] * len(ready.bench.model.choices.groups)
    bench = relearned(ready, none, EFFORTS["none"], Observer())
    np.testing.assert_array_equal(bench.measured(none), ready.bench.measured(none))


def test_raised_tensors_keep_their_low_bits_as_they_were(asked):
    """Nothing was learned of these: weights, ranges and biases layer by layer."""
    ready = prepared(asked, load(asked.model), Observer())
    found = ready.bench.model.choices
    names = {"layers.1.mlp.down.weight", "layers.0.attn.q.weight"}
    up = [g.name in names for g in found.groups]
    effort = Effort("short", steps=2, batch=2, length=32, tokens=2048, held_out=2)
    model = relearned(ready, up, effort, Observer()).model
    before = ready.bench.model
    for name, layer in (("layers.mlp.down.weight", 1), ("layers.attn.q.weight", 0)):
        old, new = np.asarray(before.errors[name]), np.asarray(model.errors[name])
        np.testing.assert_array_equal(new[layer], old[layer])
        assert (new[1 - layer] != old[1 - layer]).any()


def test_a_loss_is_kept_where_some_plan_keeps_it(asked, planned):
    limit = (planned.low.kl + planned.high.kl) / 2
    found = run.plan(
        dataclasses.replace(asked, within=float("inf"), kl=limit, front=False), Observer()
    )
    assert found.chosen.kl <= limit
    assert found.front == ()
    slow = planned.high.decode / planned.low.decode + planned.high.prefill / planned.low.prefill
    low = found.chosen.decode / found.low.decode + found.chosen.prefill / found.low.prefill
    assert low < slow


@pytest.mark.parametrize(
    ("soc", "low", "high"),
    [
        ("SM8850", "w4a8", "w8a16"),
        ("QCS9075", "w4a8", "w8a16"),
        ("SA8295", "w4a8s8", "w8a16"),
        ("ethos-u85-2048", "w4a8", "w8a16"),
        ("xnnpack", "w4a8i8", "w8a16"),
        ("int8", "w4a8i8", "w8a16"),
    ],
)
def test_each_target_has_a_plan_that_it_can_run(asked, soc, low, high):
    """With 8-bit scores where the low recipe leaves that open."""
    start = dataclasses.replace(LOW, name=low, bits=RECIPES[low].bits)
    its = targets.target(soc)
    budget = {"within": 1.05} if its.rates else {"within": math.inf, "size": 1e6}
    request = dataclasses.replace(
        asked, soc=soc, low=start, least=None, high=RECIPES[high], front=False, **budget
    )
    made = run.plan(request, Observer())
    assert made.timed == (its.rates is not None)
    if made.timed:
        assert made.chosen.decode <= 1.05 * made.low.decode * (1 + 1e-6)
        assert made.chosen.prefill <= 1.05 * made.low.prefill * (1 + 1e-6)
    dec = decoder(load(str(request.model)).config, made.recipe.bits, 5)
    assert feasible.fits(its, dec)
    bits = {b for g in dec.graphs for t in g.tensors for b in t.quant.bits if "bias" not in t.name}
    assert bits <= {"xnnpack": {4, 8, 32}, "int8": {8, 32}}.get(soc, {4, 8, 16, 32})
    # A machine with one width for everything has one plan.
    assert bool(made.choices.groups) == (soc != "int8")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.9])
def test_every_loss_that_all_high_bits_keep_is_kept(asked, planned, share):
    """Predictions are off: the KL that is measured is what counts, down to the high plan's own."""
    limit = planned.high.kl + share * (planned.low.kl - planned.high.kl)
    request = dataclasses.replace(asked, within=float("inf"), kl=limit, front=False)
    assert run.plan(request, Observer()).chosen.kl <= limit


def test_recipes_that_differ_in_one_weight_have_a_plan(asked):
    rules = (("layers.0.attn.q.weight", 8), *LOW.bits.rules)
    high = dataclasses.replace(LOW, bits=BitPlan(rules))
    request = dataclasses.replace(asked, high=high, within=float("inf"), kl=10.0, front=False)
    found = run.plan(request, Observer())
    assert found.chosen.raised == (False,)


def test_a_plan_lies_between_the_least_bits_and_the_most(asked, planned):
    """With the head at 4 bits: budgets stay those of the recipe to compare with."""
    fewer = tuple(r for r in LOW.bits.rules if r[0] != "head.weight")
    least = dataclasses.replace(LOW, name="w4h4", bits=BitPlan(fewer))
    made = run.plan(dataclasses.replace(asked, least=least, front=False), Observer())
    head = [g.name for g in made.choices.groups].index("head.weight")
    assert [i for i, up in enumerate(made.low.raised) if up] == [head]
    assert [p.name for p in run.ends(made)] == ["w4h4", "w4a8", "w8a16"]
    assert not any(made.least.raised) and made.least.size < made.low.size
    for cost in ("decode", "prefill", "size"):
        assert getattr(made.low, cost) == pytest.approx(getattr(planned.low, cost), rel=1e-9)
    assert made.chosen.decode <= 1.001 * planned.low.decode * (1 + 1e-6)
    assert made.recipe.name == "w4a8-plan"
    assert made.recipe.stages == least.stages
    dec = decoder(made.choices.low.config, made.recipe.bits, 5)
    assert dec.head["weight"].quant.bits == (8 if made.chosen.raised[head] else 4,)


@pytest.mark.parametrize("name", ["w4a8", "w8a8"])
def test_a_plan_begins_at_8_bit_scores_where_that_is_left_open(asked, name):
    low = dataclasses.replace(RECIPES[name], prefix="none")
    least = dataclasses.replace(asked, low=low, least=None).lowest
    assert least == dataclasses.replace(low, name=f"{name}s8", bits=RECIPES[f"{name}s8"].bits)
    assert dataclasses.replace(asked, low=low, least=low).lowest is low
    other = RECIPES["w4a16"]
    assert dataclasses.replace(asked, low=other, least=None).lowest is other


def test_more_windows_are_measured_on_where_they_are_asked_for(asked):
    checkpoint = load(asked.model)
    sizes = [
        len(prepared(dataclasses.replace(asked, windows=n), checkpoint, Observer()).bench.windows)
        for n in (1, 4, 6)
    ]
    assert sizes == sorted(set(sizes)) and sizes[0] == 2


def test_equal_requests_give_equal_plans(asked, planned, tmp_path):
    again = run.plan(asked, Observer())
    for name, made in (("a", planned), ("b", again)):
        write_plan(made, tmp_path / name, False, front_figure.draw)
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    recipes = [f"front/{factor:.2f}.json" for factor in run.FRONT]
    names = [str(f.relative_to(tmp_path / "a")) for f in files[0]]
    assert names == sorted([*recipes, "front.json", "plan.json", "plan.svg"], key=Path)
    for a, b in zip(*files, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_the_files_hold_the_plan(planned, tmp_path):
    write_plan(planned, tmp_path / "made", False, front_figure.draw)
    assert load_recipe(tmp_path / "made" / "plan.json") == planned.recipe
    for point in planned.front:
        its = load_recipe(tmp_path / "made" / "front" / f"{point.name}.json")
        assert its.name == f"w4a8-plan-{point.name}"
        assert its.bits.rules == planned.choices.plan(point.raised).rules
    front = json.loads((tmp_path / "made" / "front.json").read_text())
    assert front["seconds"] == "estimate"
    assert len(front["points"]) == 3 + len(run.FRONT)
    assert front["points"][0]["kl"] == pytest.approx(planned.chosen.kl, rel=1e-5)
    names = {g.name for g in planned.choices.groups}
    assert set(front["points"][0]["raised"]) <= names == {g["name"] for g in front["groups"]}
    root = ET.fromstring((tmp_path / "made" / "plan.svg").read_text())
    shown = {"".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"w4a8", "w8a16", "the plan", "ms a token (estimate)"} <= shown


def test_what_comes_out_can_be_quantized(qnpu, low):
    status, out, err = qnpu(*PLAN.split(), "--within", "1.002", "--no-front")
    assert status == 0, err
    assert "what low bits cost most" in out and "seconds are an estimate" in out
    status, out, _ = qnpu(
        *f"quantize model --recipe made/plan.json --effort none --calibration text.txt --out two"
        f" --prefill {PREFILL} --eval-tokens {EVAL_TOKENS}".split()
    )
    assert status == 0
    report = json.loads((low / "two" / "report.json").read_text())
    assert report["recipe"] == "w4a8-plan" and report["verify"]["differing"] == 0


def test_a_folder_is_planned_from_its_own_recipe(qnpu, refused, here):
    """Its recipe is the low end; the model must be the one that it was made of."""
    of = "plan out --soc SM8750 --calibration text.txt --context 200 --no-front --within 1.01"
    status, out, err = qnpu(*of.split(), "--model", "model", "--out", "made")
    assert status == 0, err
    assert "qnpu quantize model --recipe made/plan.json" in out
    own = json.loads((here / "out" / "recipe.json").read_text())["recipe"]
    recipe = json.loads((here / "made" / "plan.json").read_text())
    points = json.loads((here / "made" / "front.json").read_text())["points"]
    assert [p["name"] for p in points[1:]] == [f"{own['name']}s8", own["name"], "w8a16"]
    assert {**recipe, "bits": own["bits"], "name": own["name"]} == own
    assert recipe["name"] == f"{own['name']}-plan"
    more = (*of.split(), "--out", "other")
    assert "which no package holds; expected the float model too; name it by" in refused(*more)
    assert "--low w4a8: not for an output folder" in refused(*more, "--low", "w4a8")
    weights = here / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "not the model that the folder was quantized from" in refused(*more, "--model", "model")
    assert "--model x: not for a model" in refused(
        *["plan", "model", "--soc", "SM8750", "--within", "1", "--model", "x", "--out", "other"]
    )


def test_a_plan_of_what_pipeline_adds_can_be_quantized(qnpu, here):
    """Between recipes that differ in RoPE: it has rules for centred keys, which the model gets."""
    low = dataclasses.replace(RECIPES["w4a8i8"], prefix="none", split_channels=0)
    (here / "low.json").write_text(json.dumps(low.to_json()))
    status, _, err = qnpu(*PLAN.split(), "--within", "1.2", "--no-front")
    assert status == 0, err
    rules = dict(json.loads((here / "made" / "plan.json").read_text())["bits"])
    assert any("k_centred" in name for name in rules)
    status, _, err = qnpu(
        *f"quantize model --recipe made/plan.json --effort none --calibration text.txt --out two"
        f" --prefill {PREFILL} --eval-tokens {EVAL_TOKENS}".split()
    )
    assert status == 0, err
    report = json.loads((here / "two" / "report.json").read_text())
    assert report["verify"]["differing"] == 0


def test_a_damaged_recipe_of_a_folder_is_one_line(refused, here):
    (here / "out" / "recipe.json").write_text("[]")
    report = json.loads((here / "out" / "report.json").read_text())
    report["sha256"] = {"model.tflite": report["sha256"]["model.tflite"]}
    (here / "out" / "report.json").write_text(json.dumps(report))
    of = "plan out --soc SM8750 --within 1 --model model --out made"
    assert "recipe.json: damaged; expected an object with a recipe" in refused(*of.split())


def test_without_seconds_the_front_is_one_of_sizes(qnpu, low):
    args = PLAN.replace("SM8750", "xnnpack").replace("low.json", "narrow.json").split()
    narrow = dataclasses.replace(LOW, name="w4a8i8", bits=RECIPES["w4a8i8"].bits)
    (low / "narrow.json").write_text(json.dumps(narrow.to_json()))
    status, out, err = qnpu(*args, "--high", "w8a8i8", "--kl", "5")
    assert status == 0, err
    assert "seconds are not estimated for this target" in out and "nan" not in out
    front = json.loads((low / "made" / "front.json").read_text())
    assert front["seconds"] is None and front["errors"] == {"decode": None, "prefill": None}
    points = front["points"]
    assert {p["decode"] for p in points} == {p["prefill"] for p in points} == {None}
    least, most = points[1]["size"], points[2]["size"]
    sizes = [p["size"] for p in points[3:]]
    assert sizes == sorted(sizes) and sizes[0] == least and sizes[-1] == most
    assert points[0]["size"] == least  # any plan keeps 5 nats, and none is smaller
    figure = (low / "made" / "plan.svg").read_text()
    assert "MB of weights" in figure and "ms a token" not in figure


def test_what_one_layer_widens_for_one_op_and_another_for_another_is_proved(here):
    rules = [(f"layers.{i}.attn.{x}", 16) for i, x in ((0, "q"), (1, "k"), (0, "v"))]
    rules += [(f"{name}.bias", 64) for name, _ in rules]
    bits = BitPlan((*rules, *LOW.bits.rules))
    asked = request(here, recipe=dataclasses.replace(LOW, bits=bits), out=here / "widened")
    report = job.run(asked, Simulated, Observer())
    assert report["verify"]["differing"] == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "plan: no budget; expected --within, --kl or --size; give one of them"),
        (["--within", "0"], "plan: --within 0; expected a number above 0; correct it"),
        (["--within", "1", "--kl", "1"], "plan: both --within and --kl; expected one: the first"),
        (["--within", "1", "--soc", "SM1"], "--soc SM1: unknown; expected one of ['SM8650', 'SM8"),
        (
            ["--within", "1", "--soc", "xnnpack"],
            "plan: --within for xnnpack, whose seconds are not",
        ),
        (["--size", "1", "--soc", "int8"], "int8 has elementwise ops of 8 bits only; choose --low"),
        (["--within", "1", "--soc", "SA8295"], "SA8295 has products of two activations of 8 bits"),
        (["--within", "1", "--high", "w4a8"], "plan: w4a8 and w4a8 give every tensor the same"),
        (["--within", "1", "--low", "w8a16", "--high", "w4a8"], "16 bits in the low plan and 8 in"),
        (["--within", "1", "--least", "w8a8"], "--least w8a8, as low, and w4a8: layers.0.attn.q"),
        (["--within", "nan"], "plan: --within nan; expected a number above 0; correct it"),
        (["--size=-3"], "plan: --size -3; expected a number above 0; correct it"),
        (["--kl", "1e-9"], "budget: no plan meets it (KL 1e-09 nats, at least "),
        (["--within", "0.5"], "budget: no plan meets it (decode"),
        (["--size", "0.001"], "budget: no plan meets it (size 0.001 MB, at least 0.0"),
        (["--within", "1", "--calibration", "no.txt"], "no.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(refused, low, more, message):
    assert message in refused(*PLAN.split(), *more)


def test_another_folder_is_not_overwritten(qnpu, low):
    (low / "made").mkdir()
    (low / "made" / "own.txt").write_text("mine")
    status, _, err = qnpu(*PLAN.split(), "--within", "1", "--overwrite")
    assert status == 2 and "made" in err
    assert (low / "made" / "own.txt").read_text() == "mine"


def test_the_kind_of_folder_is_its_own():
    assert run.KIND.mark == "front.json" and run.KIND.holds("plan.svg")
    assert not artifacts.MODELS.holds("plan.json")
    assert np.isfinite(run.FRONT).all()
