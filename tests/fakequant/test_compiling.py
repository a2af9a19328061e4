"""Programs that run briefly: compiled once, for the backend of their first call."""

from typing import Any

import jax
import numpy as np

from qnpu_jax.fakequant import compiling
from qnpu_jax.fakequant.compiling import BRIEF, jit_brief


def test_a_function_is_compiled_once_and_keeps_its_name():
    traced = []

    @jit_brief(static_argnums=1)
    def scaled(x: Any, factor: int) -> Any:
        """Docstring."""
        traced.append(factor)
        return x * np.float32(factor)

    x = np.ones(3, np.float32)
    for factor in (2, 2, 3):
        np.testing.assert_array_equal(scaled(x, factor), x * factor)
    assert traced == [2, 3]
    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Docstring.")


def test_options_are_those_of_the_backend(monkeypatch):
    asked = []

    def jit(function: Any, compiler_options: Any = None, **settings: Any) -> Any:
        asked.append((compiler_options, settings))
        return function

    monkeypatch.setattr(compiling.jax, "jit", jit)
    for backend in ("gpu", "cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert jit_brief(static_argnums=0)(lambda x: x)(1) == 1
    gpu, cpu = (BRIEF["gpu"], {"static_argnums": 0}), (None, {"static_argnums": 0})
    assert asked == [gpu, cpu, gpu]
