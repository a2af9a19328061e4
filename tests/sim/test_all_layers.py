"""All layers in one program give the logits of layer after layer."""

import jax
import numpy as np
import pytest
import tiny

from qnpu_sim import program as sim_run
from qnpu_sim.program import compile_model, run
from qnpu_sim.rounding import Profile
from qnpu_sim.run_graph import same_bits


def compare(monkeypatch, plan: str, profile: Profile, batches: tuple[slice | int, ...]) -> None:
    """Batches that fill the parts they are computed in or do not, and one sequence (0)."""
    monkeypatch.setattr(sim_run, "sequences_at_once", lambda batch, tokens: min(batch, 3))
    model = tiny.quantized("gqa_llama3", plan)
    dec = model.decoder(7)
    single = compile_model(model, dec, profile)
    whole = compile_model(model, dec, profile, at_once=True)
    assert not single.at_once, "a CPU runs single layers unless it is told otherwise"
    of_layers = whole.stacks[1]
    assert sum(s.layers for s in of_layers) == dec.layer.layers
    assert len(of_layers) == (1 if plan != "mixed" else dec.layer.layers)
    ids = tiny.random_ids((5, 7))
    expected = np.asarray(run(single, ids)["head.logits"])
    assert expected.std() > 0
    for rows in batches:
        got = run(whole, ids[rows])
        assert got.keys() == {"head.logits"}
        np.testing.assert_array_equal(np.asarray(got["head.logits"]), expected[rows], strict=True)


@pytest.mark.slow
def test_the_logits_are_those_of_single_layers(monkeypatch):
    compare(monkeypatch, "w8a8", "npu", (slice(5), 0))


@pytest.mark.nightly
@pytest.mark.parametrize("profile", ["litert_ref", "npu"])
@pytest.mark.parametrize("plan", ["w8a8", "w4a16", "mixed"])
def test_the_logits_are_those_of_single_layers_at_every_batch(monkeypatch, plan, profile):
    compare(monkeypatch, plan, profile, (slice(5), slice(3), 0))


def test_a_loop_reads_few_arrays():
    """A constant of its own for every multiplier would be a copy each in every layer."""
    model = tiny.quantized("gqa_llama3", "w8a8")
    program = compile_model(model, model.decoder(7))
    (stack,) = program.stacks[1]
    leaves = jax.tree.leaves((program.codes[1][0], program.constants[1][0]))
    matrices = sum(leaf.ndim > 1 for leaf in leaves)
    types = {leaf.dtype for leaf in leaves if leaf.ndim < 2}
    assert len(stack.arrays) == matrices + len(types) < len(leaves) / 5


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
def test_what_is_compiled_ahead_is_not_compiled_again(monkeypatch, at_once):
    """As many programs as without, one for each pattern of bits."""
    model = tiny.quantized("gqa_llama3", "mixed")
    program = compile_model(model, model.decoder(7), at_once=at_once)
    patterns = {same_bits(g, i) for g in program.decoder.graphs[1:2] for i in range(g.layers)}
    assert len(patterns) > 1
    seen, ahead = [], []

    def heard(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    def compiled(batch: int) -> int:
        seen.clear()
        run(program, tiny.random_ids((batch, 7)))
        return len(seen)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        compiled(11)  # stacks the layers too, with programs of its own
        counts = [compiled(13)]  # batches that no other test of this process has
        monkeypatch.setattr(sim_run, "compile_ahead", lambda _, calls: ahead.append(calls))
        counts.append(compiled(17))
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert counts[0] == counts[1] > len(patterns)
    assert len(ahead[0]) == len(patterns) + 2  # embed and head
