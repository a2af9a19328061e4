"""The prefix search: it finds the tokens that tame the outliers and leave the output alone, or says
that none do."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qnpu_jax.config import BitPlan, LayerKind, ModelConfig
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.recipes import RECIPES
from qnpu_jax.transform.fold import fold_norms
from qnpu_jax.transform.prefix import add_prefix, without_prefix
from qnpu_jax.transform.prefix_search import PrefixReport, Starts, find_prefix
from qnpu_jax.transform.prefix_trials import (
    OUTLIER_RATIO,
    Bench,
    Harm,
    Outliers,
    bench_beginnings,
    bench_windows,
    clipped_range,
    whole_range,
)

PLAN = RECIPES["w8a8"].bits
ORDINARY, SINK, DECOY = range(3, 32), 1, 2
CONFIG = ModelConfig(
    family="llama", vocab_size=32, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=1,
    num_kv_heads=1, head_dim=4, max_positions=128, kinds=(LayerKind(100.0),),
)  # fmt: skip
CONSTANT, IS_SINK, TRIGGER = 0, 1, 2
"""Coordinates of the residual stream: 1 for every token; 1 for the sink; 1 for what grows a
massive activation."""


def sink_model() -> dict[str, jax.Array]:
    """Folded parameters of a layer in which SINK and DECOY grow massive activations, unless they
    see a SINK before themselves.

    Queries and the key of SINK lie in the RoPE pair of frequency 0.1 so that their score at
    distance d is about 400 sin(0.1 d - 0.05): negative for the token itself, large for the 31 that
    follow. The value of SINK takes the trigger away; SwiGLU squares what is left of it.
    """
    d, f = CONFIG.hidden_size, CONFIG.intermediate_size
    rng = np.random.default_rng(0)
    embed = np.zeros((32, d))
    embed[:, CONSTANT] = 1
    embed[SINK, IS_SINK] = 1
    embed[[SINK, DECOY], TRIGGER] = 1
    embed[:, 3:] = rng.normal(0, 0.2, (32, d - 3))
    names = {"attn.q": (4, d), "attn.k": (4, d), "attn.v": (4, d), "attn.o": (d, 4)}
    names |= {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    w = {n: np.zeros(s) for n, s in names.items()}
    q_bias = np.zeros(4)
    q_bias[[1, 3]] = -20 * np.sin(0.05), -20 * np.cos(0.05)  # pair 1 of a head is (1, 3)
    w["attn.k"][1, IS_SINK] = 40
    w["attn.v"][0, IS_SINK] = 1
    w["attn.o"][TRIGGER, 0] = -10
    w["mlp.gate"][:] = rng.normal(0, 1, (f, d))
    w["mlp.up"][:] = rng.normal(0, 1, (f, d))
    w["mlp.gate"][0] = w["mlp.up"][0] = 100 * np.eye(d)[TRIGGER]
    w["mlp.down"][:] = rng.normal(0, 1, (d, f))
    params = {"embed.weight": embed, "head.weight": embed, "head.bias": np.zeros(32)}
    for name, x in w.items():
        params[f"layers.{name}.weight"] = x[None]
        params[f"layers.{name}.bias"] = (q_bias if name == "attn.q" else np.zeros(len(x)))[None]
    return {n: jnp.asarray(x, jnp.float32) for n, x in params.items()}


def sink_windows(*, sinks: bool = True) -> np.ndarray:
    """Windows of 24 ordinary tokens, each with one SINK and, more often, a DECOY before it."""
    rng = np.random.default_rng(1)
    windows = rng.choice(ORDINARY, (8, 24)).astype(np.int32)
    windows[:, 3] = windows[:, 7] = DECOY
    if sinks:
        windows[:, 10] = SINK
    return windows


def found_of(params=None, windows=None, starts: Starts | None = None, longest=4) -> PrefixReport:
    windows = sink_windows() if windows is None else windows
    return find_prefix(
        CONFIG, PLAN, params or sink_model(), (windows,), starts or Starts(), longest
    )


@pytest.mark.slow
def test_the_search_picks_the_sink_among_more_frequent_outliers():
    found = found_of()
    assert found.tokens == (SINK,)
    assert max(found.before) > OUTLIER_RATIO >= max(found.after)
    assert found.peak_before > 10 * found.peak_after
    assert found.ok
    assert found.trials[0].tokens == (SINK,)
    tried = {t.tokens: t for t in found.trials}
    none, chosen = tried[()].harm, tried[SINK,].harm
    assert none is not None and chosen is not None
    assert chosen.least < none.least


@pytest.mark.slow
def test_the_models_own_bos_stays_before_what_is_found():
    bos = int(ORDINARY[0])
    assert found_of(starts=Starts((bos,))).tokens == (bos, SINK)
    assert found_of(starts=Starts((SINK,))).tokens == (SINK,)


@pytest.mark.slow
def test_outliers_at_beginnings_count():
    """Which first tokens stay massive, a few long windows do not show."""
    calm = np.random.default_rng(2).choice(ORDINARY, (8, 24)).astype(np.int32)
    loud = sink_windows(sinks=False)
    whole = Bench(CONFIG, PLAN, sink_model(), (), (calm,), 4)
    seen, kl = whole.outliers(())
    beginnings = bench_beginnings((np.concatenate([calm, loud]),), 48, 8)
    assert beginnings.shape == (48, 8)
    also, same = dataclasses.replace(whole, beginnings=beginnings).outliers(())
    assert (seen.tokens, also.tokens) == ((), (DECOY,))
    assert also.worst > OUTLIER_RATIO > seen.worst and also.peak > seen.peak
    assert kl == same == pytest.approx((0.0,), abs=1e-6)  # judged on the windows alone


def bench(bos) -> Bench:
    return Bench(CONFIG, PLAN, sink_model(), bos, (sink_windows(),), 4)


@pytest.mark.slow
def test_the_models_own_bos_as_a_prefix_is_the_original():
    outliers, kl = bench(bos=(SINK,)).outliers((SINK,))
    assert kl == pytest.approx((0.0,), abs=1e-6)  # the same function; masked places add zeros
    assert outliers.tame
    _, (other,) = bench(bos=(SINK,)).outliers(())
    assert other > 1e-3


@pytest.mark.slow
def test_masked_scores_are_not_rounded_where_a_softmax_reads_them_wider():
    """A range that reaches to the mask has one code for all scores."""
    narrow = RECIPES["w8a8s8"].bits
    wider = BitPlan((("layers.*.softmax", 16), *narrow.rules))
    low, high = (dataclasses.replace(bench(()), plan=p).harm(()) for p in (narrow, wider))
    assert high.whole[0] < 1.1 * low.whole[0]  # a finer softmax does no more harm


@pytest.mark.slow
def test_outliers_that_no_prefix_tames_are_told():
    params = dict(sink_model())
    row = params["embed.weight"].at[DECOY].multiply(1000.0)
    found = found_of(params | {"embed.weight": row}, longest=2)
    assert not found.ok
    assert max(found.after) > OUTLIER_RATIO


def report(monkeypatch, whole: list[float], worst: list[float], bos=()) -> PrefixReport:
    """What is chosen where a prefix of n tokens does this harm and leaves this ratio."""

    def outliers(self, tokens, every=True):
        ratio = (1.0, float(worst[len(tokens)]))
        return Outliers(ratio, float(len(tokens)), (SINK,)), (0.0,)

    def harm(self, tokens):
        return Harm((whole[len(tokens)],), (2 * whole[len(tokens)],))

    monkeypatch.setattr(Bench, "outliers", outliers)
    monkeypatch.setattr(Bench, "harm", harm)
    return found_of(starts=Starts(bos), longest=3)


@pytest.mark.parametrize(
    ("whole", "worst", "chosen"),
    [
        ([1.0, 0.5, 0.4, 0.3], [3000, 600, 600, 600], 3),  # each lowers the harm
        ([1.0, 0.5, 0.49, 0.3], [3000, 600, 600, 600], 1),  # the second by too little
        ([1.0, 1.1, 0.2, 0.1], [3000, 600, 600, 600], 0),  # the first does more harm
        ([1.0, 0.5, 0.4, 0.3], [3000, 99, 1, 1], 1),  # tame: no longer one is tried
        ([1.0, 1.1, 0.4, 0.3], [3000, 99, 1, 1], 1),  # tame, for a little more harm
        ([1.0, 0.5, 0.4, 0.3], [99, 1, 1, 1], 0),  # nothing to tame
    ],
)
def test_what_a_prefix_costs_and_saves_decides(monkeypatch, whole, worst, chosen):
    found = report(monkeypatch, whole, worst)
    assert len(found.tokens) == chosen
    assert (found.after, found.peak_after) == ((1.0, worst[chosen]), chosen)
    assert found.ok == (worst[chosen] <= OUTLIER_RATIO)
    assert not found.clip  # clipping does twice the harm


def test_a_search_begins_after_the_models_own_bos(monkeypatch):
    found = report(monkeypatch, [9.0, 1.0, 0.4, 0.3], [3000, 600, 600, 600], bos=(5,))
    assert found.tokens[0] == 5 and len(found.tokens) == 3
    found = report(monkeypatch, [0.1, 1.0, 2.0, 3.0], [1, 600, 600, 600], bos=(5,))
    assert found.tokens == (5,)  # without it the model is another one, however tame


@pytest.mark.slow
def test_text_without_outliers_needs_no_prefix():
    windows = np.where(sink_windows(sinks=False) == DECOY, ORDINARY[0], sink_windows(sinks=False))
    found = found_of(windows=windows.astype(np.int32))
    assert found.tokens == () and found.before == found.after and found.ok


@pytest.mark.slow
def test_places_that_a_prefix_does_not_fill_are_not_seen():
    config, params = load_params(tiny.GOLDEN / "gqa_llama3")
    params, windows = fold_norms(config, params), tiny.random_ids((2, tiny.TOKENS))
    found = [Bench(config, PLAN, params, (), (windows,), n).outliers((1, 7)) for n in (2, 5)]
    # Equal but for the order in which a longer row of keys is summed.
    np.testing.assert_allclose(found[0][0].ratio, found[1][0].ratio, rtol=1e-4)
    assert found[0][0].peak == pytest.approx(found[1][0].peak, rel=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3, abs=1e-7)


def test_ranges_of_trials():
    """By hand: 8 bits over [-1, 3], and the clipped range that leaves one far value out."""
    spec = tiny.calibrated("gqa_llama3", "w8a8")[0].layer["mlp.act"]
    names = ["mlp.act", "attn.norm.sum", "attn.kv0.masked", "logits", "attn.k_cache"]
    bits = {n: jnp.int32(8) for n in (*names, "attn.kv1.keys")}
    whole, clipped = whole_range(bits), clipped_range(bits)
    x = jnp.asarray([-1.0, 0.013, 3.0], jnp.float32)
    step = 4 / 255
    expected = np.round(np.asarray(x) / step) * step
    np.testing.assert_allclose(whole(spec, x), expected, atol=1e-6)
    x = jnp.concatenate([jnp.linspace(-1.0, 1.0, 1_000_001), jnp.asarray([-8.0, 8.0])])
    assert float(whole(spec, x)[-1]) == pytest.approx(8.0, abs=16 / 255)  # a step
    assert float(clipped(spec, x)[-1]) < 7.0
    squares = [float(jnp.sum(jnp.square(e(spec, x) - x))) for e in (clipped, whole)]
    assert squares[0] <= squares[1]
    for name in ("attn.norm.sum", "attn.kv0.masked"):
        left = dataclasses.replace(spec, name=name)
        np.testing.assert_array_equal(whole(left, x), x)
    for name in ("logits", "attn.k_cache", "attn.kv1.keys"):  # of which the largest count
        kept = dataclasses.replace(spec, name=name)
        np.testing.assert_array_equal(clipped(kept, x), whole(kept, x))


@pytest.mark.parametrize("edge", [whole_range, clipped_range])
def test_trials_round_each_layer_to_its_own_bits(edge):
    """A plan that raises a tensor in one layer raises it in no other."""
    config, params = load_params(tiny.GOLDEN / "gqa_llama3")
    params = fold_norms(config, params)
    raised = PLAN.replaced({"layers.0.mlp.act": 16, "layers.0.mlp.down": 16}, [])
    seen = {}
    for name, plan in (("low", PLAN), ("one", raised), ("high", RECIPES["w8a16"].bits)):
        bench = Bench(config, plan, params, (), (tiny.random_ids((1, tiny.TOKENS)),), 1)
        made = bench._passes(bench.windows, (), ("mlp.act",), edge)
        seen[name] = [len(np.unique(env["mlp.act"])) for p, _, env in made if p == "layers."]
    assert seen["low"][0] <= 256 < seen["one"][0]
    assert seen["one"][1] <= 256 < seen["high"][1]


def test_every_domain_gives_windows_of_one_shape():
    first, second = np.arange(50).reshape(5, 10), np.arange(23).reshape(1, 23)
    cut = bench_windows((first, second, np.zeros((0, 4), int)), 4, 8)
    assert [x.shape for x in cut] == [(2, 8), (2, 8)]
    np.testing.assert_array_equal(cut[0].ravel(), np.arange(16))


def test_prefix_rows_are_those_of_every_layer():
    config, params = load_params(tiny.GOLDEN / "gqa_llama3")
    params = fold_norms(config, params)
    with_prefix = add_prefix(config, PLAN, params, (1, 7, 3))
    for letter in "kv":
        name = f"layers.attn.prefix_{letter}"
        # A prefix is causal: a shorter one has the same first rows, up to the order of sums.
        rows, shorter = with_prefix[name], add_prefix(config, PLAN, params, (1, 7))[name]
        assert rows.shape == ((2, 2, 3, 24) if letter == "k" else (2, 2, 24, 3))
        if letter == "v":
            rows, shorter = (x.swapaxes(2, 3) for x in (rows, shorter))
        np.testing.assert_allclose(shorter, rows[:, :, :2], atol=1e-5 * np.abs(rows).max())
    assert without_prefix(with_prefix).keys() == params.keys()
    assert add_prefix(config, PLAN, with_prefix, ()).keys() == params.keys()


@pytest.mark.slow
def test_reports_are_plain_numbers():
    found = dataclasses.asdict(found_of())
    assert all(type(t) is int for t in found["tokens"])
    assert all(type(r) is float for r in (*found["before"], found["peak_before"]))
    assert found["ok"] is True
    assert json.loads(json.dumps(found))["trials"][0]["harm"].keys() == {"whole", "clipped"}
