"""What is freed goes back, where the C library can do it; elsewhere nothing happens."""

import ctypes
import sys
import types

import pytest

from qnpu_jax import heap


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_trimming_calls_the_c_library(monkeypatch):
    asked = []
    monkeypatch.setattr(
        ctypes, "CDLL", lambda _: types.SimpleNamespace(malloc_trim=lambda n: asked.append(n))
    )
    heap.trim()
    assert asked == [0]


@pytest.mark.parametrize(("platform", "looked"), [("linux", [None]), ("darwin", [])])
def test_another_c_library_is_left_alone(monkeypatch, platform, looked):
    opened = []

    def without_trim(name):
        opened.append(name)
        return types.SimpleNamespace()

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", without_trim)
    heap.trim()
    assert opened == looked
