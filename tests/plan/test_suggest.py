"""`qnpu diagnose --suggest`: what 16 bits would do for a model that is there, and the recipe."""

import dataclasses
import json
import math

import pytest
from workspace import EVAL_TOKENS, PREFILL

from qnpu_jax import artifacts
from qnpu_jax.config import BitPlan
from qnpu_jax.diagnose import DiagnosisRequest, run
from qnpu_jax.errors import UserError
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.output import OutputFolder
from qnpu_jax.plan import priced, suggested
from qnpu_jax.progress import Observer
from qnpu_jax.proof import Simulated
from qnpu_jax.recipes import load_recipe

CONTEXT = 200
DIAGNOSE = [
    "diagnose",
    "out",
    "--text",
    "text.txt",
    "--tokens",
    "16",
    "--windows",
    "2",
    "--exact",
    "0",
    "--suggest",
]
SUGGEST = [*DIAGNOSE, "--soc", "SM8750", "--context", str(CONTEXT)]


@pytest.fixture(scope="module")
def folder(made):
    return OutputFolder.open(made / "out")


@pytest.fixture(scope="module")
def diagnosed(made):
    request = DiagnosisRequest(made / "out", made / "text.txt", 16, 2, exact=0)
    return run.diagnose(request, Simulated, Observer())


def asked(folder, within: float):
    return priced(folder, "SM8750", within, CONTEXT)


def test_a_group_is_charged_and_priced_with_all_that_follows_it(folder, diagnosed):
    prices = asked(folder, 1.05)
    found = suggested(prices, diagnosed)
    rows = {row.tensor: row for row in diagnosed.rows}
    by_name = {one.tensor: one for one in found.groups}
    act = by_name["layers.1.mlp.act"]
    assert act.along == ("layers.1.mlp.down",)
    both = sum(counted(rows[f"layers.1.mlp.{name}"]) for name in ("act", "down"))
    assert act.kl == pytest.approx(-both, rel=1e-6)
    plan = prices.recipe.bits.set("layers.1.mlp.act", 16, prices.ties, follow=True)
    up = raised(prices, plan)
    low = [False] * len(up)
    assert act.decode == prices.cost.decode(up) / prices.cost.decode(low) - 1
    assert act.prefill == prices.cost.prefill(up) / prices.cost.prefill(low) - 1
    charges = [counted(rows[one.tensor]) for one in found.groups if "kv" not in one.tensor]
    assert charges == sorted(charges, reverse=True) and len(charges) > 8


def counted(row) -> float:
    """A charge no larger than its error promises nothing."""
    return row.kl if row.kl > row.error else 0.0


def raised(prices, plan: BitPlan) -> list[bool]:
    """Groups that a plan gives 16 bits, from the graph that it stages."""
    low = prices.choices.low
    dec = decoder(low.config, plan, low.tokens, low.prefix)
    graphs = {g.prefix: g for g in dec.graphs}
    ups = []
    for group in prices.choices.groups:
        (bits,) = {graphs[m.prefix][m.name].quant.bits[m.layer] for m in group.members}
        assert bits in (group.low, group.high)
        ups.append(bits == group.high)
    return ups


@pytest.mark.parametrize("within", [1.0, 1.005, 1.02, math.inf])
def test_the_recipe_stays_within_the_time_and_changes_only_bits(folder, diagnosed, within):
    prices = asked(folder, within)
    found = suggested(prices, diagnosed)
    own, low = prices.recipe, [False] * len(prices.choices.groups)
    assert found.recipe is not None
    assert dataclasses.replace(found.recipe, name=own.name, bits=own.bits) == own
    ups = raised(prices, found.recipe.bits)
    assert prices.cost.decode(ups) <= within * prices.cost.decode(low) * (1 + 1e-6)
    assert prices.cost.prefill(ups) <= within * prices.cost.prefill(low) * (1 + 1e-6)
    assert found.decode == prices.cost.decode(ups) / prices.cost.decode(low) - 1
    taken = {one.tensor for one in found.groups if one.taken}
    charged = {one.tensor for one in found.groups}
    named = [g.name for g, up in zip(prices.choices.groups, ups, strict=True) if up]
    assert taken == {*named} & charged
    if within == math.inf:
        assert taken == charged
        rows = [row.kl for row in diagnosed.rows if row.kl and row.bits == 8]
        assert -found.kl <= sum(x for x in rows if x > 0) * (1 + 1e-6)


def test_more_time_promises_more(folder, diagnosed):
    kls = [suggested(asked(folder, f), diagnosed).kl for f in (1.0, 1.01, 1.1, math.inf)]
    assert kls == sorted(kls, reverse=True) and kls[-1] < 0


def test_nothing_is_raised_that_gains_nothing(folder, diagnosed):
    """Groups without a charge are raised only where a raised one needs them or time is saved."""
    prices = asked(folder, 1.02)
    found = suggested(prices, diagnosed)
    assert found.recipe is not None
    ups = raised(prices, found.recipe.bits)
    charged = {one.tensor for one in found.groups}
    for j, group in enumerate(prices.choices.groups):
        needed = any(ups[a] for a, b in prices.choices.above if b == j)
        if ups[j] and group.name not in charged and not needed:
            without = [up and k != j for k, up in enumerate(ups)]
            over = prices.cost.decode(without) > prices.budget.decode
            assert over or prices.cost.prefill(without) > prices.budget.prefill


def test_without_errors_nothing_is_suggested(folder, diagnosed):
    exact = tuple(dataclasses.replace(r, kl=r.kl and -abs(r.kl)) for r in diagnosed.rows)
    found = suggested(asked(folder, 1.05), dataclasses.replace(diagnosed, rows=exact))
    assert found.groups == () and found.kl == 0.0
    assert found.decode <= 0.0  # casts that go are all that could be won


def test_what_is_suggested_is_printed_written_and_quantized(qnpu, here):
    status, out, err = qnpu(*SUGGEST, "--within", "1.02", "--top", "5")
    assert status == 0
    text = " ".join(out.split())
    assert "KL is a prediction by charges" in text and "seconds an estimate, off by up to" in text
    table = out[out.index("activations at 16") : out.index("w8a8-suggested")]
    assert max(map(len, table.splitlines())) <= 80
    file = here / "out" / artifacts.DIAGNOSIS / "suggested.json"
    assert f"--recipe out/diagnosis/{file.name}" in out
    own = load_recipe(here / "recipe.json")
    made = load_recipe(file)
    assert made.name == "w8a8-suggested" and made.bits != own.bits
    assert dataclasses.replace(made, name=own.name, bits=own.bits) == own
    status, _, err = qnpu(
        *f"quantize model --recipe {file} --effort none --calibration text.txt --out two"
        f" --prefill {PREFILL} --eval-tokens {EVAL_TOKENS}".split()
    )
    assert status == 0, err
    report = json.loads((here / "two" / "report.json").read_text())
    assert report["verify"]["differing"] == 0
    status, _, _ = qnpu(*DIAGNOSE[:-1])
    assert status == 0 and not file.exists()  # of an earlier diagnosis


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (DIAGNOSE, "--suggest: no SoC; expected one to price 16 bits on; add --soc SM8750"),
        ([*DIAGNOSE, "--soc", "SM1"], "--soc SM1: unknown; expected one of"),
        ([*SUGGEST, "--within", "nan"], "suggest: --within nan; expected a number above 0;"),
        ([*SUGGEST, "--within", "0"], "suggest: --within 0; expected a number above 0; correct it"),
        ([*SUGGEST, "--within", "0.5"], "budget: no plan meets it (decode"),
        ([*SUGGEST, "--context", "64"], "context: 64 slots; expected more than the 128"),
        ([*SUGGEST, "--context", "100000"], "length: "),
        (["diagnose", "out", "--soc", "SM8750"], "--soc SM8750: not for a diagnosis without"),
        (["diagnose", "out", "--within", "1.1"], "--within 1.1: not for a diagnosis without"),
        ([*SUGGEST, "--replace", "layers.1.mlp.acts"], "; nearest: layers.1.mlp.act"),
    ],
)
def test_mistakes_are_one_line(refused, words, message):
    assert message in refused(*words)


def test_a_model_of_16_bits_has_nothing_to_suggest(folder, tmp_path, made):
    """A folder is what its recipe.json says; the model itself is read for its shape alone."""
    data = json.loads((made / "out" / artifacts.RECIPE).read_text())
    data["recipe"]["bits"] = [["*.weight", 8], ["*.bias", 64], ["*.*_cache", 8], ["*", 16]]
    (tmp_path / artifacts.RECIPE).write_text(json.dumps(data))
    wide = OutputFolder(tmp_path, folder.report)
    object.__setattr__(wide, "model", folder.model)
    with pytest.raises(UserError, match=f"suggest: every activation of {tmp_path} has 16 bits"):
        asked(wide, 1.01)


def test_a_charge_that_its_error_hides_promises_nothing(folder, diagnosed):
    prices = asked(folder, math.inf)
    noisy = tuple(dataclasses.replace(r, error=1.0) for r in diagnosed.rows)
    assert suggested(prices, dataclasses.replace(diagnosed, rows=noisy)).groups == ()
    single = tuple(dataclasses.replace(r, error=None) for r in diagnosed.rows)  # of one window
    every = suggested(prices, dataclasses.replace(diagnosed, rows=single))
    found = suggested(prices, diagnosed)
    assert {g.tensor for g in found.groups} <= {g.tensor for g in every.groups}
    assert all(g.kl < 0 for g in found.groups)
    assert found.lost == diagnosed.kl["simulator"] - diagnosed.kl["constants"]
