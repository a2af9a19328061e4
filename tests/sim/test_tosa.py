"""The `npu` profile's roundings against Arm's TOSA reference model (PyPI tosa-tools), a referee
that shares no line with LiteRT."""

import warnings
from typing import Any

import numpy as np
import pytest

from qnpu_sim.fixedpoint import multiply_by_quantized_multiplier_wide
from qnpu_sim.rounding import Npu

reference = pytest.importorskip("tosa_reference_model", reason="needs `pip install tosa-tools`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is about to rename its modules
    ts: Any = pytest.importorskip("serializer.tosa_serializer")
    tosa: Any = pytest.importorskip("tosa.RoundingMode")

N = 1_000_000


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    """The serializer writes its inputs into the working directory."""
    monkeypatch.chdir(tmp_path)


def rescaled(acc: np.ndarray, multiplier: int, shift: int, rounding: str) -> np.ndarray:
    """TOSA's RESCALE to int32: acc multiplier 2^-shift, rounded; int48 with a 16-bit multiplier
    for int64."""
    wide = acc.dtype == np.int64
    kind = ts.DType.INT48 if wide else ts.DType.INT32
    model = ts.TosaSerializer("")
    # Inputs of 48 bits have no NumPy type; constants do.
    x = (
        model.addConst([len(acc)], kind, acc)
        if wide
        else model.addPlaceholder(acc.shape, kind, acc)
    )
    m = model.addConst([1], ts.DType.INT16 if wide else ts.DType.INT32, [multiplier])
    constants = (m, model.addConst([1], ts.DType.INT8, [shift]))
    zeros = model.addConst([1], kind, [0]), model.addConst([1], ts.DType.INT32, [0])
    y = model.addOutput([len(acc)], ts.DType.INT32)
    how = getattr(tosa.RoundingMode, rounding)
    attribute = ts.TosaSerializerAttribute()
    attribute.RescaleAttribute(not wide, how, False, False, False)
    names = [x.name, *(c.name for c in (*constants, *zeros))]
    model.addOperator(ts.TosaOp.Op().RESCALE, names, [y.name], attribute)
    outputs, status = reference.run(bytes(model.serialize()), [] if wide else [acc])
    assert status == reference.GraphStatus.TOSA_VALID
    return outputs[0].view(np.int32)


@pytest.mark.parametrize("shift", [31, 33, 38, 45, 60])
def test_single_rounding_of_32_bits(shift):
    """SINGLE_ROUND is `rounding="single", ties="up"`."""
    rng = np.random.default_rng(shift)
    top = 2 ** min(31, shift - 1)  # TOSA asks for that
    acc = rng.integers(-top, top, N, np.int64).astype(np.int32)
    m = int(rng.integers(2**30, 2**31))
    args = (acc.astype(np.int64), np.int32(m), np.int32(31 - shift))
    got = multiply_by_quantized_multiplier_wide(*args, "single", "up")
    np.testing.assert_array_equal(got, rescaled(acc, m, shift, "SINGLE_ROUND"))


@pytest.mark.parametrize("shift", [20, 28, 40])
def test_single_rounding_of_48_bits_with_15_bits_of_multiplier(shift):
    """TOSA's 48-bit accumulators take 16-bit multipliers: `multiplier_bits=15`."""
    rng = np.random.default_rng(shift)
    top = 2 ** min(46, 30 + shift - 15)  # the result has to fit 32 bits
    acc = rng.integers(-top, top, N // 10, np.int64)
    m = int(rng.integers(2**14, 2**15))
    made: Any = Npu(multiplier_bits=15).rules().linear16_wide(m * 2.0**-shift)
    assert int(made.multiplier) == m << 16
    args = (acc, made.multiplier, made.shift)
    got = multiply_by_quantized_multiplier_wide(*args, "single", "up")
    np.testing.assert_array_equal(got, rescaled(acc, m, shift, "SINGLE_ROUND"))


def test_double_rounding_differs_at_ties_only():
    """DOUBLE_ROUND adds both halves before one shift; MBQM rounds twice. They differ by one code,
    where the first rounding makes a tie of what was none: 2^-7 of the products at a shift of 7."""
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**31), 2**31, N, np.int64).astype(np.int32)
    m, shift = 1_500_000_001, 38
    args = (acc.astype(np.int64), np.int32(m), np.int32(31 - shift))
    got = multiply_by_quantized_multiplier_wide(*args, "double", "away").astype(np.int64)
    distance = np.abs(got - rescaled(acc, m, shift, "DOUBLE_ROUND"))
    assert distance.max() <= 1
    assert (distance > 0).mean() <= 2.0**-7
