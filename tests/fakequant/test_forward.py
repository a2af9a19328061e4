"""The scanned forward pass: what layers have alike is sliced for none of them."""

from typing import Any

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import pytest

from qnpu_jax.fakequant.forward import Reading, _alike, hidden
from qnpu_jax.learn.parameters import initial_theta, student_reading
from qnpu_jax.recipes import Stage


def test_known_and_equal_values_are_taken_out_and_put_back():
    values = {
        "equal": np.full((3, 2), 5.0, np.float32),
        "unequal": np.asarray([[1.0], [1.0], [2.0]], np.float32),
        "traced": (x := jnp.ones(3)),
        "tied": x,
    }
    sliced, whole = _alike(values)
    assert [x.shape for x in sliced] == [(3,), (3, 1)]
    for i in range(3):
        got = whole([x[i] for x in sliced])
        assert got.keys() == values.keys()
        for name, x in values.items():
            np.testing.assert_array_equal(got[name], np.asarray(x)[i])


@pytest.mark.parametrize("plan", ["w8a8", "w4a8", "mixed"])
def test_a_step_slices_no_range_and_no_zero_point_that_is_known(plan):
    dec, params, free = learnable.made(plan)
    theta = initial_theta(dec, free, ["rotated", "unrotated", "weights"])
    base = learnable.base_of(dec, params, free)
    ids = learnable.random_ids(1)[0]

    def run(theta: Any, base: Any) -> jax.Array:
        student = student_reading(dec, Stage(), base, theta)
        return hidden(dec, student, jnp.asarray(ids)).last

    (scan,) = [e for e in jax.make_jaxpr(run)(theta, base).eqns if e.primitive.name == "scan"]
    sliced = len(scan.invars) - scan.params["num_consts"] - scan.params["num_carry"]
    student: Reading = student_reading(dec, Stage(), base, theta)
    roots = {dec.layer.ties[t.name] for t in dec.layer.tensors}
    tensors = [dec.layer[name] for name in roots if f"layers.{name}" in student.scales]
    parameters = sum(name.startswith("layers.") for name in student.params)
    moving = sum(not t.quant.symmetric and min(t.quant.bits) < 16 for t in tensors)
    ranges = sum(len(set(t.quant.bits)) > 1 for t in tensors)
    assert 0 < sliced <= parameters + len(tensors) + moving + 2 * ranges
    assert plan == "mixed" or ranges == 0
