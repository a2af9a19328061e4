"""The container: what is written is what is read, and the interpreter runs every form of it."""

from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given
from hypothesis import strategies as st
from single_op import Tensor, interpret, single_op

from qnpu_jax.errors import UserError
from qnpu_jax.tflite.flatbuffer import ModelWriter
from qnpu_jax.tflite.op_versions import DType
from qnpu_jax.tflite.packing import TensorType, pack_int4


def fully_connected(dtype: DType = "int8") -> tuple[ModelWriter, dict[str, np.ndarray]]:
    """A FULLY_CONNECTED whose buffers have awkward sizes."""
    rng = np.random.default_rng(0)
    x = Tensor("int8", rng.integers(-128, 128, (3, 7), np.int8), np.float32(0.1), 5)
    high = 7 if dtype == "int4" else 127
    weights = rng.integers(-high, high + 1, (5, 7), np.int8)
    scales = rng.random(5, np.float32) / 10
    w = Tensor(dtype, weights, scales, constant=True)
    b = Tensor("int32", rng.integers(-99, 99, 5, np.int32), constant=True)
    y = Tensor("int8", scale=np.float32(0.3), zero_point=-7, shape=(3, 5))
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    code = schema.BuiltinOperator.FULLY_CONNECTED
    return single_op(code, options, [x, w, b], y), {"x0": x.data}


def read(content: bytes) -> Any:
    return schema.ModelT.InitFromPackedBuf(content, 0)


@given(st.lists(st.integers(-8, 7), max_size=9))
def test_pack_int4_puts_even_elements_in_the_low_nibble(codes):
    packed = pack_int4(np.asarray(codes, np.int8))
    assert packed.size == (len(codes) + 1) // 2
    nibbles = [n for byte in packed.tolist() for n in (byte & 15, byte >> 4)]
    assert [(n ^ 8) - 8 for n in nibbles[: len(codes)]] == codes
    assert not any(nibbles[len(codes) :])


def test_pack_int4_refuses_wider_codes():
    with pytest.raises(UserError, match=r"int4 codes must lie in \[-8, 7\]"):
        pack_int4(np.asarray([8], np.int8))


def test_equal_contents_share_a_buffer():
    writer = ModelWriter()
    data = np.arange(100, dtype=np.int8)
    tensors = []
    for name in ("prefill", "decode"):
        graph = writer.add_subgraph(name)
        graph.add_tensor("a", (100,), "int8", data=data.copy())
        graph.add_tensor("b", (25,), "int32", data=data.view(np.int32).copy())
        graph.add_tensor("c", (100,), "int8", data=data[::-1].copy())
        graph.add_tensor("activation", (100,), "int8")
        tensors += graph.tensors
    assert [t.buffer for t in tensors] == [1, 1, 2, 0] * 2
    model = read(writer.to_bytes())
    assert [b.data is None for b in model.buffers] == [True, False, False]
    np.testing.assert_array_equal(model.buffers[1].data.view(np.int8), data)


def test_tensors_read_back_bit_for_bit():
    rng = np.random.default_rng(1)
    # Every float32 bit pattern must survive: subnormal, neighbours of powers of two, random.
    patterns = rng.integers(0x00000001, 0x7F7FFFFF, 64, np.uint32)
    scales = np.concatenate([patterns, [1, 0x3F7FFFFF, 0x3F800001]]).astype(np.uint32)
    scales = scales.view(np.float32)
    zero_points = rng.integers(-128, 128, scales.size)
    writer = ModelWriter()
    graph = writer.add_subgraph("main")
    graph.add_tensor("w", (2, scales.size), TensorType("int4", scales, zero_points, axis=1))
    graph.add_tensor("x", (2, 3), TensorType("int16", scales[0]))
    graph.add_tensor("mask", (2,), "bool", data=np.asarray([True, False]))
    w, x, mask = read(writer.to_bytes()).subgraphs[0].tensors
    np.testing.assert_array_equal(w.quantization.scale.view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(w.quantization.zeroPoint, zero_points)
    assert w.quantization.quantizedDimension == 1
    assert (w.type, x.type) == (schema.TensorType.INT4, schema.TensorType.INT16)
    assert x.quantization.scale.tobytes() == scales[:1].tobytes()
    assert (x.name, list(x.shape)) == (b"x", [2, 3])
    assert mask.quantization is None


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_buffers_after_the_flatbuffer_run_equally(tmp_path, dtype):
    writer, feeds = fully_connected(dtype)
    embedded, external = tmp_path / "embedded.tflite", tmp_path / "external.tflite"
    writer.write(embedded)
    writer.write(str(external), embed_limit=0)
    y = interpret(str(embedded), feeds)
    np.testing.assert_array_equal(interpret(str(external), feeds), y)
    np.testing.assert_array_equal(interpret(external.read_bytes(), feeds), y)
    content = external.read_bytes()
    inside = read(embedded.read_bytes()).buffers
    for buffer, other in zip(read(content).buffers, inside, strict=True):
        assert buffer.data is None
        assert buffer.offset % 16 == 0
        if other.data is not None:
            assert content[buffer.offset : buffer.offset + buffer.size] == other.data.tobytes()


def test_embedded_buffers_are_aligned_to_16():
    writer, _ = fully_connected()
    content = writer.to_bytes()
    model: Any = schema.Model.GetRootAs(content)
    starts = [
        content.index(model.Buffers(i).DataAsNumpy().tobytes())
        for i in range(model.BuffersLength())
        if model.Buffers(i).DataLength() > 4
    ]
    assert len(starts) == 2
    assert all(s % 16 == 0 for s in starts)


def test_equal_calls_give_equal_bytes(tmp_path):
    for limit in (0, 10**6):
        first, second = (fully_connected()[0].to_bytes(limit) for _ in range(2))
        assert first == second
        path = tmp_path / "model.tflite"
        with path.open("wb") as file:
            fully_connected()[0].write(file, limit)
        assert path.read_bytes() == first


def test_signatures_name_inputs_and_outputs():
    writer = ModelWriter()
    for key in ("prefill_128", "decode"):
        graph = writer.add_subgraph(key)
        x = graph.add_tensor("x", (4,), TensorType("int8", np.float32(0.1)))
        y = graph.add_tensor("y", (4,), TensorType("int8", np.float32(1 / 256), -128))
        graph.add_op(schema.BuiltinOperator.LOGISTIC, None, [x], [y])
        graph.add_signature(key, {"tokens": x}, {"logits": y})
    model = read(writer.to_bytes())
    assert [s.signatureKey for s in model.signatureDefs] == [b"prefill_128", b"decode"]
    assert [s.subgraphIndex for s in model.signatureDefs] == [0, 1]
    assert len(model.operatorCodes) == 1
    assert model.operatorCodes[0].version == 2


@pytest.mark.parametrize(
    ("scale", "data", "message"),
    [
        (np.float64(0.1), None, "float32"),
        (np.ones(3, np.float32), None, "one per channel of axis 0"),
        (None, np.zeros((2, 2), np.int8), "expects data of shape"),
        (None, np.zeros(2, np.int16), "expects data of shape"),
    ],
)
def test_mistakes_name_the_tensor(scale, data, message):
    graph = ModelWriter().add_subgraph("main")
    with pytest.raises(UserError, match=f"weights: .*{message}"):
        graph.add_tensor("weights", (2,), TensorType("int8", scale), data)
