"""Latency on this CPU: which calls are made, in which order, and what their times say."""

from functools import partial

import numpy as np
import pytest
import tiny

from qnpu_jax.errors import UserError
from qnpu_jax.latency import cpu
from qnpu_jax.tflite import cached, writer
from qnpu_jax.tflite.forms import Integers
from qnpu_jax.tflite.interpreter import open_interpreter

CHUNK, CONTEXT = 4, 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("host") / "m.tflite"
    cached.build_cached(tiny.quantized("gqa_llama3", "w8a8"), CHUNK, CONTEXT).write(path)
    return path


class Clock:
    """Stands still but for what the calls take; notes the calls in order."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        left = list(seconds)

        def call():
            self.order.append(name)
            self.now += left.pop(0)

        return cpu.TimedCall(name, "decode", 1, call)


def test_calls_run_in_turn_and_the_first_round_does_not_count():
    clock = Clock()
    work = [clock.work("a", [9.0, 1.0, 2.0, 4.0]), clock.work("b", [9.0, 3.0, 3.0, 5.0])]
    a, b = cpu.time_calls(work, 3, clock=clock)
    assert clock.order == ["a", "b"] * 4
    assert (a.reader, a.seconds, a.median) == ("a", (1.0, 2.0, 4.0), 2.0)
    assert (b.reader, b.seconds, b.median) == ("b", (3.0, 3.0, 5.0), 3.0)


def test_rounds_can_be_watched():
    seen = []

    def track(steps, length):
        seen.append(length)
        return steps

    clock = Clock()
    (row,) = cpu.time_calls([clock.work("a", [1.0] * 3)], 2, track, clock)
    assert seen == [3] and row.seconds == (1.0, 1.0)


def test_what_rows_say():
    fast = cpu.CpuTiming(cpu.INTEGERS, "prefill_128", 128, (0.5, 0.25, 9.0))
    slow = cpu.CpuTiming(cpu.FLOAT, "prefill_128", 128, (2.0, 2.0, 1.0))
    assert fast.median == 0.5 and fast.tokens_per_second == 256.0
    assert cpu.speedups([slow, fast]) == {"prefill_128": 4.0}
    assert fast.to_json() == {
        "reader": "integers",
        "signature": "prefill_128",
        "tokens": 128,
        "seconds": (0.5, 0.25, 9.0),
        "median": 0.5,
        "tokens_per_second": 256.0,
    }


def test_calls_are_those_at_the_end_of_the_context(path):
    made = cpu.calls(path, 1)
    assert {key: tokens for key, (tokens, _) in made.items()} == {
        f"prefill_{CHUNK}": 4,
        "decode": 1,
    }
    interpreter = open_interpreter(path, "xnn", threads=1)
    for key, (tokens, call) in made.items():
        details = interpreter.get_signature_runner(key).get_input_details()
        inputs = cpu._inputs(path, key, details)
        assert inputs["positions"].tolist() == [*range(CONTEXT - tokens, CONTEXT)]
        assert not inputs["mask"].any() and inputs["kv_cache_v_1"].any()
        assert {n: (x.shape, x.dtype) for n, x in inputs.items()} == {
            n: (tuple(d["shape"]), np.dtype(d["dtype"])) for n, d in details.items()
        }
        first = {n: x.copy() for n, x in call().items()}
        assert first["logits"].shape[0] == 1
        again = call()
        assert all(np.array_equal(again[n], x) for n, x in first.items())


def test_a_model_is_timed_beside_its_float32_form(monkeypatch):
    files = {}
    real = cpu.calls

    def calls(path, threads):
        files[path.name] = path.stat().st_size
        assert threads == 2
        return real(path, threads)

    monkeypatch.setattr(cpu, "calls", calls)
    rows = cpu.time_against_float(
        Integers(tiny.quantized("gqa_llama3", "w8a8")), CHUNK, CONTEXT, 2, 3
    )
    assert [(r.reader, r.signature, r.tokens) for r in rows] == [
        ("integers", "prefill_4", 4),
        ("integers", "decode", 1),
        ("float32", "prefill_4", 4),
        ("float32", "decode", 1),
    ]
    assert all(len(r.seconds) == 3 and min(r.seconds) > 0 for r in rows)
    assert cpu.speedups(rows).keys() == {"prefill_4", "decode"}
    # The weights of this model are few, so that names and tables keep it from 4 to 1.
    assert files["float32.tflite"] > files["integers.tflite"]


def test_a_file_without_a_cache_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w8a8"), path, CHUNK)
    message = (
        r"prefill_4 lacks the inputs \['kv_cache_k_0', 'mask', 'positions'\]; expected a model"
    )
    with pytest.raises(UserError, match=message):
        cpu.calls(path, 1)


@pytest.mark.parametrize("name", ["threads", "rounds"])
@pytest.mark.parametrize("count", [0, -1])
def test_counts_start_at_one(name, count, path):
    model = tiny.quantized("gqa_llama3", "w8a8")
    settings = {"threads": 1, "rounds": 1} | {name: count}
    for call in (
        partial(cpu.time_against_float, Integers(model), CHUNK, CONTEXT, **settings),
        partial(cpu.calls, path, count)
        if name == "threads"
        else partial(cpu.time_calls, [], count),
    ):
        with pytest.raises(
            UserError, match=f"{name}: {count}; expected at least 1; raise --{name}"
        ):
            call()
