"""Random single-op cases: for every op and dtype, shapes, scales and zero points.

A `Variant` fixes what a jitted kernel is compiled for; its `case` draws codes and constants.
Regimes of the output scale: fitting, tiny results (a large output scale), saturating ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.extend.core
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.random import Generator
from single_op import Tensor

from qnpu_jax.graph import ops
from qnpu_sim import elementwise, kernels, movement, op_constants
from qnpu_sim.op_constants import QuantizedType, Weights
from qnpu_sim.rounding import Profile, rules_of

Code = schema.BuiltinOperator
ZERO_POINTS = (-128, -5, 0, 7, 127)
BITS = {"int8": 8, "int16": 16}


@dataclass(frozen=True)
class Case:
    """One model: the operator's tensors, and the kernel's arguments."""

    inputs: list[Tensor]
    output: Tensor
    arrays: tuple[np.ndarray, ...]
    constants: Callable[[Profile], tuple]


@dataclass(frozen=True)
class Variant:
    op: type
    name: str
    code: int
    options: Any
    kernel: Callable
    case: Callable[[Generator], Case]

    def __str__(self) -> str:
        return f"{self.op.__name__}-{self.name}"


def options(kind: str, **fields: Any) -> Any:
    value = getattr(schema, f"{kind}OptionsT")()
    for name, field in fields.items():
        assert hasattr(value, name)
        setattr(value, name, field)
    return value


def draw_codes(rng: Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform codes, with a tenth at the ends of the range."""
    limits = np.iinfo(dtype)
    codes = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    ends = rng.choice(np.asarray([limits.min, limits.max], dtype), shape)
    return np.where(rng.random(shape) < 0.1, ends, codes)


def draw_tensor(rng: Generator, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(dtype, draw_codes(rng, dtype, shape), *draw_qparams(rng, dtype, 1.0))


def draw_qparams(rng: Generator, dtype: str, magnitude: float) -> tuple[np.float32, int]:
    """A scale of the order of magnitude / 2^bits and a zero point."""
    scale = np.float32(magnitude * 2.0 ** -BITS[dtype] * 10 ** rng.uniform(-1, 1))
    return scale, int(rng.choice(ZERO_POINTS)) if dtype == "int8" else 0


def draw_output(rng: Generator, dtype: str, magnitude: float, shape: tuple[int, ...]) -> Tensor:
    """An output whose range fits results of this magnitude, or is far too wide or too narrow."""
    regime = rng.choice([1.0, 1.0, 1e3, 1e-2, 1e-5])
    scale, zero_point = draw_qparams(rng, dtype, magnitude * regime)
    return Tensor(dtype, None, scale, zero_point, shape=shape)


def real_range(t: Tensor) -> float:
    return float(np.max(t.scale)) * 2 ** BITS[t.dtype]


def types(*tensors: Tensor) -> tuple[QuantizedType, ...]:
    return tuple(QuantizedType(t.scale, t.zero_point, BITS[t.dtype]) for t in tensors)


def fully_connected(
    rng: Generator, dtype: str, bits: int, bias_dtype: str, one_scale: bool
) -> Case:
    t, k, n = 64, 80, 128
    x = draw_tensor(rng, dtype, (t, k))
    high = 2 ** (bits - 1) - 1
    weights = rng.integers(-high - 1, high, (n, k), np.int8, endpoint=True)
    weight_scale: Any = (10 ** rng.uniform(-3, -1, n)).astype(np.float32)
    if one_scale:
        weight_scale = weight_scale[0]
    # Near the accumulator's limit one time in four: the int32 one must then wrap.
    limit = rng.choice([1e3, 1e6, 2**31 - 1, 2**40 if bias_dtype == "int64" else 1e4])
    bias = rng.integers(-int(limit), int(limit), n).astype(bias_dtype)
    magnitude = float(x.scale * weight_scale.mean()) * (2 ** BITS[dtype] * high * 5 + limit)
    y = draw_output(rng, dtype, magnitude, (t, n))
    w = Tensor(f"int{bits}", weights, weight_scale, constant=True)
    # XNNPACK takes the op only where the bias has scales.
    b = Tensor(bias_dtype, bias, (weight_scale * x.scale).astype(np.float32), constant=True)

    def constants(profile: Profile) -> tuple:
        operands = Weights(weights, bias, weight_scale, bits)
        of_x, of_y = types(x, y)
        made = op_constants.prepare_fully_connected(of_x, operands, of_y, rules_of(profile))
        return (made,)

    return Case([x, w, b], y, (x.data, weights), constants)


def batch_matmul(
    rng: Generator, dtype: str, adj_y: bool, shape: tuple[int, ...], bytes_: tuple[bool, bool]
) -> Case:
    b, m, k, n = shape
    x = draw_tensor(rng, dtype, (b, m, k))
    y = draw_tensor(rng, dtype, (b, n, k) if adj_y else (b, k, n))
    for operand, is_byte in zip((x, y), bytes_, strict=True):
        if is_byte:
            operand.data[...] = 128 * draw_codes(rng, "int8", operand.data.shape).astype(np.int16)
    z = draw_output(rng, dtype, real_range(x) * real_range(y) * k**0.5, (b, m, n))
    if dtype == "int16":  # MBQM64 is defined for factors below 2^7
        z = Tensor(dtype, None, max(z.scale, np.float32(x.scale * y.scale / 100)), shape=z.shape)

    def constants(profile: Profile) -> tuple:
        narrow = [
            replace(t, scale=np.float32(128 * t.scale)) if is_byte else t
            for t, is_byte in zip((x, y), bytes_, strict=True)
        ]
        return (op_constants.prepare_batch_matmul(*types(*narrow, z), rules=rules_of(profile)),)

    return Case([x, y], z, (x.data, y.data), constants)


SHAPES = (
    ((24, 512), (24, 512)),
    ((24, 512), (1, 512)),
    ((24, 1, 64), (1, 8, 64)),
    ((512,), (24, 1)),
)
"""Operands of ADD and MUL: equal, a row, both broadcast, ranks that differ."""


def add(rng: Generator, dtype: str, shapes: tuple) -> Case:
    x, y = (draw_tensor(rng, dtype, s) for s in shapes)
    scale = max(x.scale, y.scale)
    # LiteRT refuses an output scale so small that t / (2^L s) reaches 1.
    low = scale * np.float32(2.0**-13)
    z = draw_output(rng, dtype, real_range(x) + real_range(y), np.broadcast_shapes(*shapes))
    z = Tensor(dtype, None, max(z.scale, low), z.zero_point, shape=z.shape)

    def constants(profile: Profile) -> tuple:
        return (op_constants.prepare_add(*types(x, y, z), rules=rules_of(profile)),)

    return Case([x, y], z, (x.data, y.data), constants)


def add_mask(rng: Generator, dtype: str) -> Case:
    """Scores plus a mask of 0 or about -2048, at a scale that leaves `HEADROOM` below them."""
    limits = np.iinfo(dtype)
    scores = draw_tensor(rng, dtype, (4, 32, 96))
    mask = np.where(rng.random((1, 32, 96)) < 0.5, limits.min, 0).astype(dtype)
    m = Tensor(dtype, mask, np.float32(2048 / -limits.min))
    scale = np.float32(scores.scale + np.float32(ops.HEADROOM / limits.max))
    z = Tensor(dtype, None, scale, shape=scores.data.shape)

    def constants(profile: Profile) -> tuple:
        return (op_constants.prepare_add(*types(scores, m, z), rules=rules_of(profile)),)

    return Case([scores, m], z, (scores.data, mask), constants)


def keep(rng: Generator, dtype: str) -> Case:
    """Probabilities times 1 or 0: themselves or 0, exactly."""
    p = Tensor(dtype, rng.integers(0, 32768, (4, 32, 96)).astype(dtype), np.float32(1 / 32768))
    seen = np.where(rng.random((1, 32, 96)) < 0.5, 32767, 0).astype(dtype)
    k = Tensor(dtype, seen, np.float32(1 / 32767))
    z = Tensor(dtype, None, p.scale, shape=p.data.shape)

    def constants(profile: Profile) -> tuple:
        return (op_constants.prepare_mul(*types(p, k, z), rules=rules_of(profile)),)

    return Case([p, k], z, (p.data, seen), constants)


def mul(rng: Generator, dtype: str, shapes: tuple) -> Case:
    x, y = (draw_tensor(rng, dtype, s) for s in shapes)
    z = draw_output(rng, dtype, real_range(x) * real_range(y), np.broadcast_shapes(*shapes))

    def constants(profile: Profile) -> tuple:
        return (op_constants.prepare_mul(*types(x, y, z), rules=rules_of(profile)),)

    return Case([x, y], z, (x.data, y.data), constants)


def quantize(rng: Generator, dtype: str, output_dtype: str) -> Case:
    x = draw_tensor(rng, dtype, (24, 512))
    y = draw_output(rng, output_dtype, real_range(x), x.data.shape)

    def constants(profile: Profile) -> tuple:
        return (op_constants.prepare_quantize(*types(x, y), rules=rules_of(profile)),)

    return Case([x], y, (x.data,), constants)


FIXED = {"int8": (np.float32(1 / 256), -128), "int16": (np.float32(1 / 32768), 0)}


def softmax(rng: Generator, dtype: str) -> Case:
    x = draw_tensor(rng, dtype, (64, 200))
    x.data[:16] //= 16
    x.data[16] = x.data[16, 0]  # a flat row
    scale = np.float32(10 ** rng.uniform(-6, 1))
    x = Tensor(dtype, x.data, scale, x.zero_point)

    def constants(profile: Profile) -> tuple:
        make = (
            op_constants.prepare_softmax_int8
            if dtype == "int8"
            else op_constants.prepare_softmax_int16
        )
        return (make(scale, rules_of(profile)),)

    return Case([x], Tensor(dtype, None, *FIXED[dtype], shape=(64, 200)), (x.data,), constants)


def unary(rng: Generator, dtype: str, op: Any) -> Case:
    """Every code that the op accepts: a row per input scale would be one model each."""
    limits = np.iinfo(dtype)
    zero_point = int(rng.choice(ZERO_POINTS)) if dtype == "int8" else 0
    codes = np.arange(limits.min, limits.max + 1).astype(dtype)
    if op in ("sqrt", "rsqrt"):
        codes = np.maximum(codes, np.asarray(zero_point, dtype))
    codes = np.tile(codes, (20 if dtype == "int8" else 1, 1))
    scale = np.float32(10 ** rng.uniform(-6, 0))
    if op == "logistic" and rng.random() < 0.3:
        scale = np.float32(2.0**-12 * (1 + rng.choice([0, 5e-4, 1e-3])))  # near the special scale
    top = float(scale * limits.max)
    largest = {"gelu": top, "sqrt": top**0.5, "rsqrt": float(scale) ** -0.5}.get(op, 1)
    output = Tensor(dtype, None, *draw_qparams(rng, dtype, largest), shape=codes.shape)
    if op == "logistic":
        output = Tensor(dtype, None, *FIXED[dtype], shape=codes.shape)
    x = Tensor(dtype, codes, scale, zero_point)

    def constants(profile: Profile) -> tuple:
        return (op_constants.prepare_unary(op, *types(x, output), rules=rules_of(profile)),)

    return Case([x], output, (codes,), constants)


def moved_codes(
    rng: Generator, shapes: tuple, extra: tuple, shape: tuple[int, ...], dtype: str
) -> Case:
    """Ops that copy codes: inputs of one scale, then arguments that the kernel has static."""
    scale, zero_point = draw_qparams(rng, dtype, 1.0)
    xs = [Tensor(dtype, draw_codes(rng, dtype, s), scale, zero_point) for s in shapes]
    arguments = [Tensor("int32", np.asarray(e, np.int32), constant=True) for e in extra]
    y = Tensor(dtype, None, scale, zero_point, shape=shape)
    return Case([*xs, *arguments], y, tuple(x.data for x in xs), lambda profile: ())


def embedding(rng: Generator, dtype: str) -> Case:
    scale, zero_point = draw_qparams(rng, dtype, 1.0)
    table = Tensor(dtype, draw_codes(rng, dtype, (300, 64)), scale, zero_point, constant=True)
    ids = Tensor("int32", rng.integers(0, 300, 128, np.int32))
    y = Tensor(dtype, None, scale, zero_point, shape=(128, 64))
    return Case([table, ids], y, (ids.data, table.data), lambda profile: ())


def _fully_connected(dtype: str, bits: int, bias: str, one_scale: bool = False) -> Variant:
    kind = getattr(schema.TensorType, bias.upper()) if dtype == "int16" else 0
    return Variant(
        ops.FullyConnected,
        f"{dtype}-int{bits}-{bias}" + "-one_scale" * one_scale,
        Code.FULLY_CONNECTED,
        options("FullyConnected", keepNumDims=True, quantizedBiasType=kind),
        kernels.fully_connected,
        partial(fully_connected, dtype=dtype, bits=bits, bias_dtype=bias, one_scale=one_scale),
    )


def _batch_matmul(dtype: str, adj_y: bool, shape: tuple, bytes_: tuple[bool, bool]) -> Variant:
    facts = kernels.OperandFacts(*bytes_)
    return Variant(
        ops.BatchMatmul,
        f"{dtype}-{shape}-{'adj' if adj_y else 'plain'}-{bytes_}",
        Code.BATCH_MATMUL,
        options("BatchMatMul", adjY=adj_y),
        partial(kernels.batch_matmul, adj_y=adj_y, facts=facts),
        partial(batch_matmul, dtype=dtype, adj_y=adj_y, shape=shape, bytes_=bytes_),
    )


def _variants(dtype: str) -> list[Variant]:
    plain, sum_options = (False, False), options("Add", potScaleInt16=False)

    def variant(
        op: type, name: str, code: int, o: Any, kernel: Callable, case: Callable, **kw: Any
    ):
        return Variant(op, name, code, o, kernel, partial(case, dtype=dtype, **kw))

    softmax_kernel = kernels.softmax_int8 if dtype == "int8" else kernels.softmax_int16
    o = options("Softmax", beta=1.0)
    variants = [
        *(_batch_matmul(dtype, adj, (3, 40, 48, 60), plain) for adj in (False, True)),
        _batch_matmul(dtype, True, (7000, 1, 24, 1), plain),
        variant(ops.AddMask, dtype, Code.ADD, sum_options, elementwise.add, add_mask),
        variant(ops.Softmax, dtype, Code.SOFTMAX, o, softmax_kernel, softmax),
    ]
    for s in SHAPES:
        name, o = f"{dtype}-{s}", options("Mul")
        variants.append(
            variant(ops.Add, name, Code.ADD, sum_options, elementwise.add, add, shapes=s)
        )
        variants.append(variant(ops.Mul, name, Code.MUL, o, elementwise.mul, mul, shapes=s))
    for to in ("int8", "int16"):
        name, o = f"{dtype}-{to}", options("Quantize")
        kernel = partial(elementwise.quantize, dtype=np.dtype(to))
        case = partial(quantize, output_dtype=to)
        variants.append(variant(ops.Requantize, name, Code.QUANTIZE, o, kernel, case))
    for op in (ops.Logistic, ops.Gelu, ops.Sqrt, ops.Rsqrt):
        name = op.__name__.lower()
        code, case = getattr(Code, name.upper()), partial(unary, op=name)
        o = options("Gelu", approximate=True) if op is ops.Gelu else None
        variants.append(variant(op, dtype, code, o, kernels.unary, case))
    return variants + _movement(dtype)


def _movement(dtype: str) -> list[Variant]:
    shape, begin, size, perm, flat = (16, 24, 32), (2, 0, 5), (9, 24, 20), (2, 0, 1), (384, 32)

    def variant(op: type, kind: str, fields: dict, kernel: Callable, *args: Any) -> Variant:
        code, draw = getattr(Code, kind.upper()), partial(moved_codes, dtype=dtype)
        return Variant(op, dtype, code, options(kind, **fields), kernel, lambda r: draw(r, *args))

    reshape = partial(movement.reshape, shape=flat)
    transpose = partial(movement.transpose, perm=perm)
    slice_ = partial(movement.slice_, begin=begin, size=size)
    join = partial(movement.concatenation, axis=1)
    fields = {"newShape": list(flat)}
    gather = Variant(
        ops.Embedding,
        dtype,
        Code.GATHER,
        options("Gather"),
        movement.gather,
        partial(embedding, dtype=dtype),
    )
    return [
        gather,
        variant(ops.Reshape, "Reshape", fields, reshape, (shape,), (flat,), flat),
        variant(ops.Transpose, "Transpose", {}, transpose, (shape,), (perm,), (32, 16, 24)),
        variant(ops.Slice, "Slice", {}, slice_, (shape,), (begin, size), size),
        variant(ops.Concat, "Concatenation", {"axis": 1}, join, (shape,) * 3, (), (16, 72, 32)),
    ]


VARIANTS: list[Variant] = [
    *(_fully_connected("int8", bits, "int32") for bits in (8, 4)),
    *(_fully_connected("int16", bits, b) for bits in (8, 4) for b in ("int32", "int64")),
    _fully_connected("int8", 8, "int32", one_scale=True),
    *(_fully_connected("int16", 8, b, one_scale=True) for b in ("int32", "int64")),
    Variant(
        ops.Keep, "int16", Code.MUL, options("Mul"), elementwise.mul, partial(keep, dtype="int16")
    ),
    _batch_matmul("int16", False, (3, 40, 48, 60), (False, True)),
    _batch_matmul("int16", True, (3, 40, 48, 60), (True, False)),
    _batch_matmul("int16", True, (3, 40, 48, 60), (True, True)),
    _batch_matmul("int16", True, (7000, 1, 24, 1), (True, True)),
    *(v for dtype in ("int8", "int16") for v in _variants(dtype)),
]


def dtypes(jaxpr: Any) -> set[np.dtype]:
    """Types of every value in a jaxpr and in those inside it."""
    found = {v.aval.dtype for v in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars)}
    for equation in jaxpr.eqns:
        found |= {v.aval.dtype for v in (*equation.invars, *equation.outvars)}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= dtypes(inner)
    return found
