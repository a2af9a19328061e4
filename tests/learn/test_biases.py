"""Biases are learned with as freezing rounds them: on the grid of the sums that they start."""

import jax.numpy as jnp
import learnable
import numpy as np
import pytest

from qnpu_jax.fakequant.fake_quant import fake_quant
from qnpu_jax.graph.ops import FullyConnected
from qnpu_jax.integer.freeze import freeze
from qnpu_jax.learn.parameters import merge_theta, student_reading
from qnpu_jax.recipes import Stage

STAGE = Stage()
LARGE = np.float32(2.0**62)


@pytest.mark.parametrize("plan", ["w8a8", "w4a16", "mixed"])
def test_biases_are_learned_with_as_they_are_frozen(plan):
    dec, params, free = learnable.made(plan)
    theta = learnable.random_theta(dec, free, ["biases", "weights", "rotated"])
    student = student_reading(dec, STAGE, learnable.base_of(dec, params, free), theta)
    after, scales = merge_theta(dec, STAGE, params, free, theta)
    model = freeze(dec, after, scales, ())
    moved = 0
    for graph in dec.graphs:
        for node in graph.nodes:
            if not isinstance(node.op, FullyConnected):
                continue
            name = graph.prefix + node.inputs[2]
            q, frozen = student.scales[name], model.tensors[name]
            np.testing.assert_array_equal(q.scale, frozen.scale, err_msg=name)
            real = np.asarray(after[name], np.float32)
            x = fake_quant(jnp.asarray(real), q.scale, q.zero_point, -LARGE, LARGE)
            moved += np.count_nonzero(np.asarray(x) != real)
            scale = np.asarray(frozen.scale, np.float64)
            codes = np.rint(np.asarray(x, np.float64) / scale)
            exact = np.asarray(real, np.float64) / scale
            # float32 divides codes of up to 2^17 with an error of 0.01.
            clear = np.abs(exact - np.floor(exact) - 0.5) > 0.01
            np.testing.assert_array_equal(codes[clear], frozen.codes[clear], err_msg=name)
            assert np.abs(codes - frozen.codes).max() <= 1, name
    assert moved > 100, "rounding moves biases"
