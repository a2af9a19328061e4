"""What `run` keeps: by a predicate or by a pattern, never by a silent nothing."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pairwise
import pytest
import tiny

from qnpu_jax.errors import UserError
from qnpu_jax.runtime import Session, SimulatedBackend
from qnpu_sim import compile_model, run

IDS = tiny.random_ids((7,), 3)


@pytest.fixture(scope="module")
def program():
    model = tiny.quantized("gqa_llama3", "w8a8")
    return compile_model(model, model.decoder(len(IDS)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern",
    pairwise.often(
        ["layers.1.attn.*", "*.down", "layers.[01].attn.q", "head.*"], ["layers.[01].attn.q"]
    ),
)
def test_a_pattern_keeps_what_its_predicate_keeps(program, pattern):
    """The logits beside it, whatever it says."""
    regex = re.compile(pattern.replace(".", "\\.").replace("*", ".*"))
    expected = run(program, IDS, lambda name: regex.fullmatch(name) is not None)
    got = run(program, IDS, pattern)
    assert got.keys() == expected.keys() >= {"head.logits"}
    assert pattern == "head.*" or len(got) > 2
    assert all(regex.fullmatch(name) or name == "head.logits" for name in got)
    for name, codes in expected.items():
        np.testing.assert_array_equal(got[name], codes, err_msg=name)


@pytest.mark.slow
def test_the_pattern_of_the_logits_keeps_nothing_else(program, monkeypatch):
    """So all layers still run in one program, where that is faster."""
    expected = run(program, IDS)["head.logits"]
    monkeypatch.setattr("qnpu_sim.program.steps", None)
    got = run(dataclasses.replace(program, at_once=True), IDS, "head.logits")
    assert got.keys() == {"head.logits"}
    np.testing.assert_array_equal(got["head.logits"], expected)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("typo", ""), ("ids", ""), ("", ""), ("Layers.0.*", "layers.0."),
        ("layers.9.attn.q", "layers.1.attn.q, "), ("layers.0.attn.q.weight", "layers.0.attn.q, "),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_no_computed_tensor_is_refused(program, pattern, nearest):
    with pytest.raises(UserError) as error:
        run(program, IDS, keep=pattern)
    text = str(error.value)
    assert text.startswith(f"keep={pattern!r}: expected a pattern") and "\n" not in text
    assert "matches none of" in text
    ending = text.partition("; `qnpu graph` prints every name")[2]
    assert ending.startswith(f"; nearest: {nearest}") if nearest else ending == ""


NO_PATTERN = """
from types import SimpleNamespace
from qnpu_jax.errors import UserError
from qnpu_sim import run
try:
    run(SimpleNamespace(decoder=None, at_once=True), [1], keep=["head.logits"])
except UserError as error:
    print(error)
"""


def test_what_is_neither_pattern_nor_function_is_refused():
    """In a process of its own: here, types are checked before values are."""
    command = [sys.executable, "-c", NO_PATTERN]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert line.startswith("keep: expected a pattern") and "got ['head.logits']; " in line


@pytest.mark.parametrize("bad", [-1, 96, 2**32 + 95])
def test_ids_outside_the_vocabulary(bad):
    """Indexing inside a program would take another row of the embedding, and say nothing."""
    model = tiny.quantized("gqa_llama3", "w8a8")
    program = compile_model(model, model.decoder(len(IDS)))
    ids = [*IDS[:-1].tolist(), bad]
    with pytest.raises(UserError, match=f"ids: token {bad} is outside the vocabulary; expected 0"):
        run(program, np.asarray(ids))
    with pytest.raises(UserError, match="ids: of type float64; expected integers"):
        run(program, np.asarray(ids) + 0.9)
    session = Session(SimulatedBackend(model, 4, 16))
    with pytest.raises(UserError, match="outside the vocabulary"):
        session.feed([96])
