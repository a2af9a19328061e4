"""benchmarks/deploy.py: what it decides from rows, and a llama.cpp that does not run."""

import importlib
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import tiny

from qnpu_jax.latency.cpu import CpuTiming

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, not a package
deploy = importlib.import_module("deploy")
llama = importlib.import_module("llama")


def rows(**speeds: tuple[float, float]) -> list[CpuTiming]:
    """Of prefill and decode, times as fast as float32's 12 seconds."""
    named = {"float32": (1.0, 1.0)} | speeds
    return [
        CpuTiming(name.replace("_", " "), key, 1, (12 / t,))
        for name, times in named.items()
        for key, t in zip(("prefill_128", "decode"), times, strict=True)
    ]


def report(found: list[CpuTiming], *recipes: str) -> int:
    return deploy.report(found, {}, Namespace(recipes=recipes, context=512, quick=False))


def test_the_goal_is_met_by_one_file_of_a_recipe(capsys):
    found = rows(w8a8i8=(3.0, 4.0), w4a8i8=(2.9, 4.0), w4a8i8_unpacked=(3.5, 3.1))
    assert report(found, "w8a8i8", "w4a8i8") == 0
    *_, headline = capsys.readouterr().out.splitlines()
    assert headline == (
        "prefill_128: 3.00 to 3.50 times the speed of float32; decode: 3.10 to 4.00 times the"
        " speed of float32; w8a8i8 and w4a8i8 unpacked, context 512"
    )


def test_two_files_that_each_meet_half_of_it_do_not(capsys):
    found = rows(w4a8i8=(2.5, 4.0), w4a8i8_unpacked=(3.5, 2.0))
    assert report(found, "w4a8i8") == 1
    assert "short of the goal: w4a8i8 prefill_128: 2.50 times" in capsys.readouterr().out


def test_what_has_no_goal_is_judged_only_alone(capsys):
    found = rows(w8a8i8=(3.0, 3.0), w8a8=(0.3, 1.0))
    assert report(found, "w8a8i8", "w8a8") == 0
    assert report(found, "w8a8") == 1
    capsys.readouterr()


def test_a_quick_run_has_no_goal(capsys):
    args = Namespace(recipes=("w8a8i8",), context=512, quick=True)
    assert deploy.report(rows(w8a8i8=(1.0, 1.0)), {}, args) == 0
    assert "short of" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "unpacked"), [("w8a8i8", False), ("w4a8i8", True)])
def test_four_bits_are_written_twice(tmp_path, plan, unpacked):
    args = Namespace(prefill=4, context=24)
    files = deploy.written({plan: tiny.quantized("gqa_llama3", plan)}, tmp_path, args)
    assert [*files] == ["float32", plan] + [f"{plan} unpacked"] * unpacked
    sizes = [p.stat().st_size for p in files.values()]
    assert sizes[0] > sizes[-1] >= sizes[1] and (sizes[-1] > sizes[1]) == unpacked


MADE = """
import os
LOG = os.path.join(os.path.dirname(__file__), "log")
class Llama:
    def __init__(self, path, **options):
        self.n_tokens = 0
        {start}
    def reset(self):
        self.n_tokens = 0
    def eval(self, tokens):
        with open(LOG, "a") as log:
            print(os.getpid(), self.n_tokens, len(tokens), file=log)
        self.n_tokens += len(tokens)
        {call}
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    """Starts a llama.cpp that does as told."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def start(init="pass", call="pass"):
        (tmp_path / "llama_cpp.py").write_text(MADE.format(start=init, call=call))
        return llama.started(llama.Peer(tmp_path / "m.gguf", 8, 16, 1))

    return start


def test_both_calls_are_made_in_the_other_process(peer, tmp_path, capsys):
    with peer() as calls:
        assert [(c.reader, c.signature, c.tokens) for c in calls] == [
            ("llama.cpp", "prefill_8", 8),
            ("llama.cpp", "decode", 1),
        ]
        for c in [*calls, calls[1], calls[0]]:
            c.call()
    assert capsys.readouterr().out == ""
    log = [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]
    assert {pid for pid, *_ in log}.isdisjoint({os.getpid()})
    # Tokens in the cache, tokens fed: one to warm up, and every decode after a prompt of 8.
    assert [rest for _, *rest in log] == [[0, 8], [0, 8], [8, 1], [8, 1], [0, 8]]


def test_why_it_does_not_start_is_told(peer, capsys):
    with peer("raise ValueError('no such file')") as calls:
        assert calls == []
    assert capsys.readouterr().out.startswith("llama.cpp: ValueError: no such file; it is not in")


def test_what_fails_later_is_told(peer):
    with (
        peer(call="if self.n_tokens == 9: raise OSError('full')") as (_, decode),
        pytest.raises(RuntimeError, match=r"llama.cpp: decode failed: OSError: full"),
    ):
        decode.call()


def test_an_instruction_that_the_cpu_has_not_is_survived(peer, capsys):
    with peer("import os, signal; os.kill(os.getpid(), signal.SIGILL)") as calls:
        assert calls == []
    said = "llama.cpp: its process ended with SIGILL, as builds for another CPU do, or 0.3.36 with"
    assert capsys.readouterr().out.startswith(said)


def test_an_end_in_between_is_an_error(peer):
    with peer(call="if len(tokens) == 1: raise SystemExit(0)") as (prefill, decode):
        prefill.call()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"llama.cpp: decode failed: its process ended"):
                decode.call()


def test_without_it_the_table_is_without_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(tmp_path))
    with llama.started(llama.Peer(tmp_path / "m.gguf", 8, 16, 1)) as calls:
        assert calls == []
    said = capsys.readouterr().out
    assert said == "llama.cpp: llama-cpp-python is not installed; it is not in the table\n"
