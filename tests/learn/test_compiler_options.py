"""What XLA is asked for: by backend and precision."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
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
        assert jax.config.jax_default_matmul_precision == "default"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("precision", "judged"),
    [("bfloat16", "default"), ("default", "default"), ("highest", "highest")],
)
def test_what_decides_has_no_bfloat16_noise(monkeypatch, precision, judged):
    """Steps of bfloat16 products are judged by what `default` computes."""
    dec, params, free = learnable.made()
    base, theta = learnable.base_of(dec, params, free), {}
    ids = jnp.asarray(learnable.random_ids(1))
    effort = dataclasses.replace(EFFORT, precision=precision)
    seen = []

    def held_out_kl(*_: Any) -> jax.Array:
        seen.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
        return jnp.zeros(1)

    monkeypatch.setattr(train, "held_out_kl", held_out_kl)
    with matmul_precision(effort):
        train.compile_stage(dec, learnable.ROTATED, effort, 10).held_out(theta, base, ids)
        outside = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    assert (seen, outside) == ([judged], precision)


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
