"""Single ops drawn by hypothesis: shapes, scales from denormal to huge, any zero point, codes of
which many lie at the ends.

Drawn values shrink: a mismatch ends at the smallest shape, the simplest scales and zero points that
still show it. What a kernel leaves undefined is left out, each time with its reason beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from hypothesis import assume
from hypothesis import strategies as st
from kernel_cases import FIXED, options, types
from single_op import Tensor

from qnpu_sim import elementwise, kernels, op_constants
from qnpu_sim.op_constants import Weights
from qnpu_sim.rounding import Rules

Code = schema.BuiltinOperator
Draw = Callable[[st.SearchStrategy], Any]


@dataclass(frozen=True)
class Example:
    """One model: its operator, and the kernel with its arguments."""

    code: int
    options: Any
    inputs: list[Tensor]
    output: Tensor
    kernel: Callable
    arrays: tuple[np.ndarray, ...]
    constants: Callable[[Rules], tuple]


exponents = st.one_of(st.integers(-8, 2), st.integers(-30, 12), st.integers(-140, 40))
"""Of scales: usual ones first, then wide ones, then denormal and huge."""
mantissas = st.one_of(st.just(1.0), st.floats(1.0, 2.0, width=32, exclude_max=True))


@st.composite
def scales(draw: Draw) -> np.float32:
    scale = np.float32(np.ldexp(draw(mantissas), draw(exponents)))
    assume(scale > 0)
    return scale


def zero_points(dtype: str) -> st.SearchStrategy[int]:
    return st.integers(-128, 127) if dtype == "int8" else st.just(0)


@st.composite
def codes(draw: Draw, dtype: str, shape: tuple[int, ...], low: int | None = None) -> np.ndarray:
    """Codes of a seed: spread, small, or a third of them at the ends of the range."""
    rng, kind = np.random.default_rng(draw(st.integers(0, 2**16))), draw(st.sampled_from("sle"))
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    if kind == "l":
        x = x // 16
    if kind == "e":
        ends = rng.choice(np.asarray([limits.min, limits.max], dtype), shape)
        x = np.where(rng.random(shape) < 1 / 3, ends, x)
    return x if low is None else np.maximum(x, np.asarray(low, dtype))


@st.composite
def tensors(draw: Draw, dtype: str, shape: tuple[int, ...]) -> Tensor:
    scale, zero = draw(scales()), draw(zero_points(dtype))
    return Tensor(dtype, draw(codes(dtype, shape)), scale, zero)


@st.composite
def outputs(draw: Draw, dtype: str, shape: tuple[int, ...], scale: float) -> Tensor:
    """An output near a scale that fits, or anywhere: `spread` powers of two away."""
    spread = draw(st.one_of(st.integers(-3, 3), st.integers(-20, 24)))
    out = np.float32(np.ldexp(np.float64(scale) * draw(mantissas), spread))
    assume(0 < out < np.inf)
    return Tensor(dtype, None, out, draw(zero_points(dtype)), shape=shape)


def shifted(real: Any, limit: int) -> bool:
    """A factor that needs a shift to the left of at most so many bits: C++ does not define more."""
    return bool(np.max(np.frexp(np.asarray(real, np.float64))[1]) <= limit)


@st.composite
def fully_connected(draw: Draw, dtype: str, bits: int, bias: str) -> Example:
    t, k, n = draw(st.sampled_from([(1, 1, 1), (1, 8, 16), (5, 33, 7), (64, 80, 128)]))
    x, high = draw(tensors(dtype, (t, k))), 2 ** (bits - 1) - 1
    weights = np.clip(draw(codes("int8", (n, k))), -high - 1, high)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    base = draw(scales())
    scales_of_weights = draw(st.sampled_from([n, n, 1]))
    weight_scale = (base * rng.uniform(0.1, 1, scales_of_weights)).astype(np.float32)
    assume(weight_scale.min() > 0)
    limit = 2 ** draw(st.integers(0, 31 if bias == "int32" else 45)) - 1
    b = rng.integers(-limit, limit, n, endpoint=True).astype(bias)
    fit = np.float64(x.scale) * float(base) * k**0.5 * high
    y = draw(outputs(dtype, (t, n), fit))
    real = np.float64(x.scale) * weight_scale.astype(np.float64) / np.float64(y.scale)
    assume(shifted(real, 30))
    if len(weight_scale) == 1:
        weight_scale = weight_scale[0]  # of the tensor, not of channels
    bias_scale = (weight_scale * x.scale).astype(np.float32)
    inputs = [
        x,
        Tensor(f"int{bits}", weights, weight_scale, constant=True),
        Tensor(bias, b, bias_scale, constant=True),
    ]
    kind = getattr(schema.TensorType, bias.upper()) if dtype == "int16" else 0

    def constants(rules: Rules) -> tuple:
        operands = Weights(weights, b, weight_scale, bits)
        of_x, of_y = types(x, y)
        return (op_constants.prepare_fully_connected(of_x, operands, of_y, rules),)

    o = options("FullyConnected", keepNumDims=True, quantizedBiasType=kind)
    kernel = kernels.fully_connected
    return Example(Code.FULLY_CONNECTED, o, inputs, y, kernel, (x.data, weights), constants)


@st.composite
def batch_matmul(draw: Draw, dtype: str) -> Example:
    b, m, k, n = draw(
        st.sampled_from([(1, 1, 1, 1), (2, 3, 8, 5), (3, 40, 48, 60), (64, 1, 24, 1)])
    )
    adj = draw(st.booleans())
    x, y = draw(tensors(dtype, (b, m, k))), draw(tensors(dtype, (b, n, k) if adj else (b, k, n)))
    z = draw(outputs(dtype, (b, m, n), float(x.scale) * float(y.scale) * k**0.5 * 64))
    product = np.float32(x.scale * y.scale)
    # The 64-bit form is defined for shifts below 8; a product of scales that is 0 is refused.
    assume(product > 0 and shifted(product / np.float64(z.scale), 30 if dtype == "int8" else 7))

    def constants(rules: Rules) -> tuple:
        return (op_constants.prepare_batch_matmul(*types(x, y, z), rules=rules),)

    o, kernel = options("BatchMatMul", adjY=adj), partial(kernels.batch_matmul, adj_y=adj)
    return Example(Code.BATCH_MATMUL, o, [x, y], z, kernel, (x.data, y.data), constants)


SHAPES = (
    ((1,), (1,)),
    ((17,), (17,)),
    ((3, 35), (3, 35)),
    ((4, 33), (1, 33)),
    ((1, 33), (4, 33)),
    ((5, 16), (5, 1)),
    ((3, 1, 20), (1, 4, 20)),
    ((2, 3, 1), (2, 1, 19)),
    ((19,), (3, 1)),
    ((24, 512), (24, 512)),
    ((24, 40, 20), (24, 1, 20)),
)
"""Operands of ADD and MUL: every fold of broadcasting, with and without rests of 16 elements."""


@st.composite
def add(draw: Draw, dtype: str) -> Example:
    shapes = draw(st.sampled_from(SHAPES))
    x = draw(tensors(dtype, shapes[0]))
    # Further apart than that, the smaller input is lost.
    away = draw(st.integers(-12, 12))
    y_scale = np.float32(np.ldexp(x.scale * np.float32(draw(mantissas)), away))
    assume(0 < y_scale < 1e30)
    y = Tensor(dtype, draw(codes(dtype, shapes[1])), y_scale, draw(zero_points(dtype)))
    z = draw(outputs(dtype, np.broadcast_shapes(*shapes), float(max(x.scale, y_scale))))
    left = 20 if dtype == "int8" else 15
    twice = 2 * np.float64(max(x.scale, y_scale))
    denominator = np.float64(np.float32(1 << left) * z.scale)
    # LiteRT refuses a factor of 1 and more; below 2^-31 it is 0.
    assume(denominator > 0 and twice / denominator < 1)

    def constants(rules: Rules) -> tuple:
        return (op_constants.prepare_add(*types(x, y, z), rules=rules),)

    o = options("Add", potScaleInt16=False)
    return Example(Code.ADD, o, [x, y], z, elementwise.add, (x.data, y.data), constants)


@st.composite
def mul(draw: Draw, dtype: str) -> Example:
    shapes = draw(st.sampled_from(SHAPES))
    x, y = (draw(tensors(dtype, s)) for s in shapes)
    fit = float(x.scale) * float(y.scale) * (64 if dtype == "int8" else 2**14)
    z = draw(outputs(dtype, np.broadcast_shapes(*shapes), fit))
    with np.errstate(over="ignore", under="ignore"):
        real = np.float32(x.scale * y.scale / z.scale)
    assume(0 < real < np.inf and shifted(real, 30))

    def constants(rules: Rules) -> tuple:
        return (op_constants.prepare_mul(*types(x, y, z), rules=rules),)

    o = options("Mul")
    return Example(Code.MUL, o, [x, y], z, elementwise.mul, (x.data, y.data), constants)


@st.composite
def quantize(draw: Draw, dtype: str, to: str) -> Example:
    shape = draw(st.sampled_from([(1,), (3, 35), (24, 512)]))
    x = draw(tensors(dtype, shape))
    y = draw(outputs(to, shape, float(x.scale)))
    assume(shifted(np.float64(x.scale) / np.float64(y.scale), 30))

    def constants(rules: Rules) -> tuple:
        return (op_constants.prepare_quantize(*types(x, y), rules=rules),)

    kernel = partial(elementwise.quantize, dtype=np.dtype(to))
    return Example(Code.QUANTIZE, options("Quantize"), [x], y, kernel, (x.data,), constants)


@st.composite
def softmax(draw: Draw, dtype: str) -> Example:
    # The reference kernel aborts the process where 512 logits are nearly equal.
    shape = draw(st.sampled_from([(1, 1), (2, 17), (64, 200), (16, 511)]))
    x = draw(tensors(dtype, shape))
    # At 2^-26 and below the reference kernel aborts the process; above 2^15 an exponent is shifted
    # by more than 31 bits.
    assume(2.0**-26 < x.scale < 2**15)
    y = Tensor(dtype, None, *FIXED[dtype], shape=shape)
    kernel, make = (
        (kernels.softmax_int8, op_constants.prepare_softmax_int8)
        if dtype == "int8"
        else (kernels.softmax_int16, op_constants.prepare_softmax_int16)
    )

    def constants(rules: Rules) -> tuple:
        return (make(x.scale, rules),)

    o = options("Softmax", beta=1.0)
    return Example(Code.SOFTMAX, o, [x], y, kernel, (x.data,), constants)


@st.composite
def unary(draw: Draw, dtype: str, op: Any) -> Example:
    """Every code that the op accepts, or some."""
    scale, zero = draw(scales()), draw(zero_points(dtype))
    low = zero if op in ("sqrt", "rsqrt") else None  # these refuse negative numbers
    shape = draw(st.sampled_from([(1, 1), (3, 35), (256, 256)]))
    x = Tensor(dtype, draw(codes(dtype, shape, low)), scale, zero)
    if op == "logistic":
        y = Tensor(dtype, None, *FIXED[dtype], shape=shape)
        # Its multiplier would not fit 32 bits; or be 0, which the kernel takes for another case.
        assume(dtype == "int8" or 2.0**-44 < scale < 2**14)
    elif op == "gelu":
        y = draw(outputs(dtype, shape, float(scale)))
        # x^3 and the largest code times the scale fit float32.
        assume(2.0**-60 < scale < 2**20 and y.scale > 2.0**-60)
    else:
        fit = float(scale) ** (0.5 if op == "sqrt" else -0.5)
        y = draw(outputs(dtype, shape, fit))
        # Results below 2^-12 codes are shifted by more than 31 bits (`tables.rsqrt_int8`).
        ratio = fit / float(y.scale)
        assume(2.0**-12 <= ratio < 2**20 and 1e-30 < scale < 1e30)

    def constants(rules: Rules) -> tuple:
        return (op_constants.prepare_unary(op, *types(x, y), rules=rules),)

    o = options("Gelu", approximate=True) if op == "gelu" else None
    return Example(getattr(Code, op.upper()), o, [x], y, kernels.unary, (x.data,), constants)


UNARY = ("logistic", "gelu", "sqrt", "rsqrt")
STRATEGIES: dict[str, st.SearchStrategy[Example]] = {
    "FULLY_CONNECTED-8x8": fully_connected("int8", 8, "int32"),
    "FULLY_CONNECTED-8x4": fully_connected("int8", 4, "int32"),
    "FULLY_CONNECTED-16x8-32": fully_connected("int16", 8, "int32"),
    "FULLY_CONNECTED-16x8-64": fully_connected("int16", 8, "int64"),
    "FULLY_CONNECTED-16x4-32": fully_connected("int16", 4, "int32"),
    "QUANTIZE-8-16": quantize("int8", "int16"),
    "QUANTIZE-16-8": quantize("int16", "int8"),
}
for _dtype in ("int8", "int16"):
    STRATEGIES |= {
        f"BATCH_MATMUL-{_dtype}": batch_matmul(_dtype),
        f"ADD-{_dtype}": add(_dtype),
        f"MUL-{_dtype}": mul(_dtype),
        f"QUANTIZE-{_dtype}": quantize(_dtype, _dtype),
        f"SOFTMAX-{_dtype}": softmax(_dtype),
        **{f"{op.upper()}-{_dtype}": unary(_dtype, op) for op in UNARY},
    }
"""By operator and types; ops that only move codes are exact by definition (`test_kernels`)."""
