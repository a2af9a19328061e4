"""What XLA is asked for: by backend and precision."""

import dataclasses
from typing import Any

import jax
import learnable
import pytest

from qnpu_jax.learn import train
from qnpu_jax.learn.train import matmul_precision

EFFORT = learnable.EFFORT


@pytest.mark.parametrize(
    ("backend", "named"), [("cpu", "bfloat16"), ("gpu", "BF16_BF16_F32"), ("tpu", "bfloat16")]
)
def test_bfloat16_products_are_such_on_a_gpu(monkeypatch, backend, named):
    """There XLA takes TF32 for "bfloat16", as for "default"."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with matmul_precision(dataclasses.replace(EFFORT, precision="bfloat16")):
        assert jax.config.jax_default_matmul_precision == named  # type: ignore[attr-defined]
    with matmul_precision(dataclasses.replace(EFFORT, precision="default")):
        assert jax.config.jax_default_matmul_precision is None  # type: ignore[attr-defined]


def test_no_kernel_is_chosen_by_its_time(monkeypatch):
    """A run that goes on after a kill might choose another one."""
    asked = []

    def jit(function: Any, **settings: Any) -> Any:
        asked.append(settings)
        return function

    dec, _, _ = learnable.made()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(train.jax, "jit", jit)
    train.compile_stage(dec, learnable.ROTATED, EFFORT, 10**6)
    assert len(asked) == 2
    assert all(x["compiler_options"]["xla_gpu_autotune_level"] == 0 for x in asked)
