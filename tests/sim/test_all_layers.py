"""All layers in one program give the logits of layer after layer."""

import jax
import numpy as np
import pytest
import tiny

from qnpu_sim import program as sim_run
from qnpu_sim.program import compile_model, run


@pytest.mark.parametrize(
    ("plan", "profile"), [("w8a8", "npu"), ("w4a16", "litert_ref"), ("mixed", "litert_ref")]
)
def test_the_logits_are_those_of_single_layers(monkeypatch, plan, profile):
    """One sequence, and batches that fill the parts they are computed in or do not."""
    monkeypatch.setattr(sim_run, "sequences_at_once", lambda batch, tokens: min(batch, 3))
    model = tiny.quantized("gqa_llama3", plan)
    dec = model.decoder(7)
    single = compile_model(model, dec, profile)
    whole = compile_model(model, dec, profile, at_once=True)
    assert not single.at_once, "a CPU runs single layers unless it is told otherwise"
    of_layers = whole.stacks[1]
    assert sum(s.layers for s in of_layers) == dec.layer.layers
    assert len(of_layers) == (1 if plan != "mixed" else dec.layer.layers)
    for shape in ((7,), (3, 7), (5, 7)):
        ids = tiny.random_ids(shape)
        expected, got = run(single, ids), run(whole, ids)
        assert got.keys() == expected.keys() == {"head.logits"}
        one, other = got["head.logits"], expected["head.logits"]
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(other).std() > 0
        assert (np.asarray(one) == np.asarray(other)).all()


def test_a_loop_reads_few_arrays():
    """A constant of its own for every multiplier would be a copy each in every layer."""
    model = tiny.quantized("gqa_llama3", "w8a8")
    program = compile_model(model, model.decoder(7))
    (stack,) = program.stacks[1]
    leaves = jax.tree.leaves((program.codes[1][0], program.constants[1][0]))
    matrices = sum(leaf.ndim > 1 for leaf in leaves)
    types = {leaf.dtype for leaf in leaves if leaf.ndim < 2}
    assert len(stack.arrays) == matrices + len(types) < len(leaves) / 5
