"""Models of every fact about norms and activation: LiteRT runs their files with the simulator's
codes, in a prefill and with a KV cache."""

import facts
import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax.calibrate.ranges import ROOM
from qnpu_jax.graph.ops import Gelu
from qnpu_jax.integer import storage
from qnpu_jax.measure.perplexity import float_logits, integer_logits
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.proof.verified import verify_file
from qnpu_jax.tflite import LiteRT, cached, writer
from qnpu_jax.tflite.named_forms import FORMS
from qnpu_jax.transform.fold import fold_norms

IDS = tiny.random_ids((tiny.TOKENS,), 3)
PLANS = {
    "gelu": ("w8a8", "w4a16", "w8a8i8"),
    "after, qk all": ("w8a8", "w4a16", "w8a8i8"),
    "both, qk head, gelu": ("w8a8", "w8a16", "w4a8i8"),
    "qk head": ("w8a8i8", "w4a8"),
    "multipliers": ("w8a8",),
    "both, residual scale": ("w4a16",),
}
"""Widths of gammas and GELU: 16 bits beside 8, 16 everywhere, 8 everywhere."""
CASES = [(fact, plan) for fact, plans in PLANS.items() for plan in plans]
OFTEN = [(fact, plans[0]) for fact, plans in PLANS.items()]
cases = pytest.mark.parametrize("case", pairwise.often(CASES, OFTEN), ids=str)


def test_every_fact_is_here():
    assert PLANS.keys() == facts.FACTS.keys()


@pytest.mark.slow
@cases
def test_prefill_and_cache_have_the_simulators_codes(case, tmp_path):
    model = facts.quantized(*case)
    writer.write_prefill(model, tmp_path / "prefill.tflite", tiny.TOKENS)
    cached.build_cached(model, 6, 20, "all").write(tmp_path / "cached.tflite")
    for name in ("prefill", "cached"):
        found = verify_file(tmp_path / f"{name}.tflite", model, IDS, "ref")
        assert found.differing == 0, found.differences[0]
        assert found.elements > 5000


@pytest.mark.slow
@pairwise.parametrize(
    ("plan", "kernels"), ["w8a8", "w4a8i8"], ["opt", "xnn"], choose=pairwise.levels
)
def test_other_kernel_sets(plan, kernels, tmp_path):
    model = facts.quantized("both, qk head, gelu", plan)
    writer.write_prefill(model, tmp_path / "m.tflite", tiny.TOKENS)
    assert verify_file(tmp_path / "m.tflite", model, IDS, kernels).differing == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(
    "fact", pairwise.often(["both, qk head, gelu", "after, qk all"], ["both, qk head, gelu"])
)
def test_every_form_gives_the_same_logits(fact, form, tmp_path):
    model = facts.quantized(fact, "w8a8")
    built = writer.build_prefill(model, tiny.TOKENS, "all", FORMS[form](model))
    built.write(tmp_path / "m.tflite")
    got = LiteRT(tmp_path / "m.tflite", "ref").run(IDS)
    np.testing.assert_array_equal(got, Simulated(model, tiny.TOKENS).logits(IDS))


@pytest.mark.slow
@pytest.mark.parametrize("fact", list(facts.FACTS))
def test_integers_are_near_the_float_model(fact):
    """At w8a16, on a window that it was calibrated on, what is left is 8-bit weights and caches: an
    rms error of a few hundredths of the logits' deviation. A gamma at a wrong scale gives 1."""
    config, ids = facts.FACTS[fact], facts.TEXT[0]
    model = facts.quantized(fact, "w8a16")
    real = float_logits(config, model.plan, fold_norms(config, facts.checkpoint(config)))(ids)
    got = integer_logits(model, Simulated(model, tiny.TOKENS).logits)(ids)
    error = np.asarray(got, np.float64) - np.asarray(real, np.float64)
    assert np.sqrt(np.mean(error**2)) <= 0.1 * np.std(np.asarray(real, np.float64))


@pytest.mark.parametrize(("plan", "dtype"), [("w8a8", np.int16), ("w8a8i8", np.int8)])
def test_gammas_are_as_wide_as_the_stream(plan, dtype, tmp_path):
    model = facts.quantized("both, qk head, gelu", plan)
    storage.save(model, tmp_path)
    again = storage.load(tmp_path)
    gammas = {n: x for n, x in again.codes.items() if n.endswith(".gamma")}
    blocks = {f"layers.{b}.{n}.gamma" for b in ("attn", "mlp") for n in ("norm", "post_norm")}
    heads = {"layers.attn.q_norm.gamma", "layers.attn.k_norm.gamma"}
    assert gammas.keys() == blocks | heads | {"head.norm.gamma"}
    top = np.iinfo(dtype).max / (ROOM if dtype == np.int16 else 1)
    for name, x in gammas.items():
        assert x.dtype == dtype
        of_layers = np.abs(x.astype(int)).reshape(len(x), -1).max(1)
        assert np.abs(of_layers - top).max() <= 0.5, "min-max: the largest is the top, or at ROOM"
        np.testing.assert_array_equal(x, model.codes[name])


def test_the_layer_holds_the_ops_of_its_facts():
    dec = facts.quantized("both, qk head, gelu", "w8a8").decoder(4)
    ops = [n for n in dec.layer.nodes if isinstance(n.op, Gelu)]
    assert [n.output for n in ops] == ["mlp.gelu"]
    assert dec.layer["attn.q_norm.out"].shape == (4, 4, 8)
    assert dec.layer["mlp.post_norm.out"].shape == (4, 24)
