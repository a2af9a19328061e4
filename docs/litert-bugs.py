"""Minimal reproductions of what LiteRT's integer kernels do wrong: `python docs/litert-bugs.py`.

Each is a model of one operator; the table shows what its definition gives and what came out. See
docs/litert-bugs.md. What kills the process runs in one of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from qnpu_jax.tflite.flatbuffer import ModelWriter
from qnpu_jax.tflite.interpreter import RESOLVERS, KernelSet
from qnpu_jax.tflite.packing import TensorType

Code = schema.BuiltinOperator
Quantization = tuple[float, int]


def run(
    code: int,
    options: Any,
    x: list[tuple[np.ndarray, Quantization]],
    y: tuple[str, tuple[int, ...], Quantization],
    kernels: KernelSet,
    constants: tuple[tuple[str, np.ndarray, Any], ...] = (),
) -> np.ndarray:
    """The output of one operator: inputs that are fed, then constants (type, codes, scale)."""
    writer = ModelWriter()
    graph = writer.add_subgraph("main")
    indices, feeds = [], {}
    for i, (codes, (scale, zero_point)) in enumerate(x):
        indices.append(
            graph.add_tensor(
                f"x{i}",
                codes.shape,
                TensorType(str(codes.dtype), np.float32(scale), zero_point),
            )
        )
        feeds[f"x{i}"] = indices[-1]
    for i, (kind, codes, scale) in enumerate(constants):
        indices.append(graph.add_tensor(f"c{i}", codes.shape, TensorType(kind, scale), codes))
    kind, shape, (scale, zero_point) = y
    out = graph.add_tensor("y", shape, TensorType(kind, np.float32(scale), zero_point))
    graph.add_op(code, options, indices, [out])
    graph.add_signature("op", feeds, {"y": out})
    interpreter = Interpreter(
        model_content=writer.to_bytes(), experimental_op_resolver_type=RESOLVERS[kernels]
    )
    fed = {f"x{i}": codes for i, (codes, _) in enumerate(x)}
    return interpreter.get_signature_runner("op")(**fed)["y"]


def options(kind: str, **fields: Any) -> Any:
    value = getattr(schema, f"{kind}OptionsT")()
    for name, field in fields.items():
        setattr(value, name, field)
    return value


def row(*codes: int, dtype: str = "int8") -> np.ndarray:
    return np.asarray([codes], dtype)


LINEAR = options("FullyConnected", keepNumDims=True)


def int4_accumulator() -> tuple[Any, Any]:
    """A bias of 2^27 and XNNPACK's int4 FULLY_CONNECTED: the sum has 28 bits."""
    bias = np.asarray([2**27], np.int32)
    scale = np.ones(1, np.float32)
    constants = (("int4", np.zeros((1, 2), np.int8), scale), ("int32", bias, scale))
    y = ("int8", (1, 1), (2.0**21, 0))
    out = run(Code.FULLY_CONNECTED, LINEAR, [(row(0, 0), (1, 0))], y, "xnn", constants)
    return 2**27 / 2**21, out.item()


def int16_wraps() -> tuple[Any, Any]:
    """An int16 FULLY_CONNECTED with a 32-bit bias: its sum wraps at 2^31."""
    k = 1536
    scale = np.ones(1, np.float32)
    constants = (
        ("int8", np.full((1, k), 127, np.int8), scale),
        ("int32", np.zeros(1, np.int32), scale),
    )
    o = options("FullyConnected", keepNumDims=True, quantizedBiasType=schema.TensorType.INT32)
    x = np.full((1, k), 32767, np.int16)
    exact = k * 127 * 32767 / 2**19
    y = ("int16", (1, 1), (2.0**19, 0))
    out = run(Code.FULLY_CONNECTED, o, [(x, (1, 0))], y, "ref", constants)
    return round(exact), out.item()


def add_wraps() -> tuple[Any, Any]:
    """Optimized int8 ADD: a sum beyond 16 bits comes back from the other side."""
    x = np.full((1, 16), 127, np.int8)
    pairs = [(x, (1, 0)), (x, (1, 0))]
    y = ("int8", (1, 16), (254 / 40000, 0))
    out = run(Code.ADD, options("Add", potScaleInt16=False), pairs, y, "opt")
    return 127, out[0, 0].item()


def mul_wraps() -> tuple[Any, Any]:
    """Optimized int8 MUL: a product is clipped to 16 bits, then the zero point makes it wrap."""
    x = np.full((1, 16), 127, np.int8)
    pairs = [(x, (1, 0)), (x, (1, 0))]
    out = run(Code.MUL, options("Mul"), pairs, ("int8", (1, 16), (0.1, 7)), "opt")
    return 127, out[0, 0].item()


def position_matters() -> tuple[Any, Any]:
    """Optimized int8 QUANTIZE: one code, two results, by its place among 17."""
    x = np.full((1, 17), -2, np.int8)
    y = ("int8", (1, 17), (4, 0))
    out = run(Code.QUANTIZE, options("Quantize"), [(x, (1, 0))], y, "opt")
    return [-1], sorted({int(v) for v in out[0]})


def softmax_leaks() -> tuple[Any, Any]:
    """int16 SOFTMAX: what lies 10 and more below the maximum keeps 2 of 32,768."""
    x = np.full((1, 2048), -32768, np.int16)
    x[0, 0] = 32767
    y = ("int16", (1, 2048), (1 / 32768, 0))
    out = run(Code.SOFTMAX, options("Softmax", beta=1.0), [(x, (0.01, 0))], y, "ref")
    return 0, out[0, 1].item()


def logistic_underflows() -> tuple[Any, Any]:
    """int16 LOGISTIC at a tiny scale: its multiplier rounds to 0, which stands for another case."""
    x = row(607, dtype="int16")
    out = run(Code.LOGISTIC, None, [(x, (2.0**-45, 0))], ("int16", (1, 1), (1 / 32768, 0)), "ref")
    return 16384, out.item()


def types_differ() -> tuple[Any, Any]:
    """FULLY_CONNECTED from int16 to int8 is accepted, and wrong."""
    scale = np.ones(1, np.float32)
    constants = (("int8", np.ones((1, 2), np.int8), scale), ("int32", np.zeros(1, np.int32), scale))
    x, y = row(10, 20, dtype="int16"), ("int8", (1, 1), (1, 0))
    o = options("FullyConnected", keepNumDims=True, quantizedBiasType=schema.TensorType.INT32)
    return 30, run(Code.FULLY_CONNECTED, o, [(x, (1, 0))], y, "ref", constants).item()


def scale_of_256() -> tuple[Any, Any]:
    """A FULLY_CONNECTED that the delegate takes and XNNPACK refuses: the model does not load."""
    scale = np.full(1, 256, np.float32)
    constants = (("int8", np.ones((1, 2), np.int8), scale), ("int32", np.zeros(1, np.int32), scale))
    y = ("int8", (1, 1), (1, 0))
    try:
        run(Code.FULLY_CONNECTED, LINEAR, [(row(1, 1), (1, 0))], y, "xnn", constants)
    except RuntimeError as error:
        return "loads", str(error).split("Node")[0].strip()
    return "loads", "loads"


def underflow() -> tuple[Any, Any]:
    """XNNPACK's FULLY_CONNECTED: below -2^31 a negative zero point turns the lowest code over."""
    scale = np.full(1, 200, np.float32)
    bias = np.full(1, -(2**24), np.int32)
    constants = (("int8", np.zeros((1, 2), np.int8), scale), ("int32", bias, scale))
    y = ("int8", (1, 1), (1, -1))
    return -128, run(
        Code.FULLY_CONNECTED, LINEAR, [(row(0, 0), (1, 0))], y, "xnn", constants
    ).item()


def flat_softmax() -> None:
    """Reference int8 SOFTMAX: 512 equal logits abort the process."""
    x = np.zeros((1, 512), np.int8)
    y = ("int8", (1, 512), (1 / 256, -128))
    run(Code.SOFTMAX, options("Softmax", beta=1.0), [(x, (0.1, 0))], y, "ref")


def small_softmax() -> None:
    """Reference int8 SOFTMAX: an input scale of 2^-26 aborts the process."""
    y = ("int8", (1, 2), (1 / 256, -128))
    run(Code.SOFTMAX, options("Softmax", beta=1.0), [(row(0, 1), (2.0**-26, 0))], y, "ref")


def denormal_scale() -> None:
    """XNNPACK: a denormal scale crashes the process."""
    y = ("int8", (1, 2), (0.1, 0))
    run(Code.QUANTIZE, options("Quantize"), [(row(0, 1), (1e-40, 0))], y, "xnn")


WRONG: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f
    for f in (
        int4_accumulator, int16_wraps, add_wraps, mul_wraps, position_matters, softmax_leaks,
        logistic_underflows, types_differ, scale_of_256, underflow,
    )
}  # fmt: skip
"""Expected and got."""
AVX512 = ("int4_accumulator", "underflow")
"""Of XNNPACK's kernels for AVX512; those for AVX2 give what is expected."""
FATAL: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (flat_softmax, small_softmax, denormal_scale)
}


def dies(name: str) -> int:
    """Exit status of a process that runs a fatal one; negative: by a signal."""
    command = [sys.executable, __file__, name]
    return subprocess.run(command, capture_output=True, check=False).returncode


def main() -> None:
    if len(sys.argv) > 1:
        FATAL[sys.argv[1]]()
        return
    for name, function in WRONG.items():
        expected, got = function()
        print(f"{name:20} expected {expected!s:8} got {got!s:30} {function.__doc__}")
    for name, function in FATAL.items():
        print(f"{name:20} expected {'0':8} got {f'exit status {dies(name)}':30} {function.__doc__}")


if __name__ == "__main__":
    main()
