"""Qualcomm's emulator of the Hexagon NPU on x86-64, which runs files that `hexagon` compiled. It
has the NPU's arithmetic, not its speed.

ONNX Runtime's QNN provider runs it. It takes a compiled binary inside an ONNX node EPContext.

Reference: onnxruntime docs, execution-providers/EP-Context-Design; onnxruntime-qnn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qnpu_jax.compilers import hexagon_file
from qnpu_jax.compilers.hexagon import EXTRA, check_installed
from qnpu_jax.compilers.hexagon_file import Dispatched, Port
from qnpu_jax.errors import UserError
from qnpu_jax.extras import remedy

PROVIDER = "QNNExecutionProvider"


class EmulatedSignature:
    """Signature of a compiled .tflite, on the emulator.

    Args:
      path: file of `hexagon.compile_file`.
      key: name of the signature.

    Raises:
      UserError: the extra `qnn` is missing, or the file is not a compiled one.
    """

    def __init__(self, path: Path, key: str) -> None:
        check_installed()
        self.signature = hexagon_file.read(path)[key]
        model = _wrapped(self.signature, _binary(path, self.signature))
        self._session = _session(model)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the signature: codes of the inputs by name to codes of the outputs by name."""
        ports = self.signature.inputs
        fed = {_safe(p.tensor): np.asarray(inputs[p.name], p.dtype) for p in ports}
        names = [_safe(p.tensor) for p in self.signature.outputs]
        found = self._session.run(names, fed)
        return {p.name: x for p, x in zip(self.signature.outputs, found, strict=True)}


def _binary(path: Path, signature: Dispatched) -> bytes:
    with path.open("rb") as file:
        file.seek(signature.offset)
        return file.read(signature.size)


def _safe(name: str) -> str:
    """Returns a tensor's name as the plugin gives it to QNN."""
    return "".join(c if c.isalnum() else "_" for c in name)


def _wrapped(signature: Dispatched, binary: bytes) -> bytes:
    """Returns a serialized ONNX model of one node, which holds the binary."""
    onnx = _import("onnx")

    def value(port: Port) -> Any:
        dtype = onnx.helper.np_dtype_to_tensor_dtype(port.dtype)
        return onnx.helper.make_tensor_value_info(_safe(port.tensor), dtype, port.shape)

    ins, outs = ([value(p) for p in ports] for ports in (signature.inputs, signature.outputs))
    node = onnx.helper.make_node(
        "EPContext",
        [v.name for v in ins],
        [v.name for v in outs],
        domain="com.microsoft",
        name=signature.graph,
        main_context=1,
        embed_mode=1,
        ep_cache_context=binary,
        source="QNN",
        partition_name=signature.graph,
    )
    graph = onnx.helper.make_graph([node], signature.key, ins, outs)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def _session(model: bytes) -> Any:
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings are about devices of other machines
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {
        "backend_path": _import("onnxruntime_qnn").get_qnn_htp_path(),
        "offload_graph_io_quantization": "0",
    }
    options.add_provider_for_devices(_devices()[:1], settings)
    return runtime.InferenceSession(model, options)


@cache
def _devices() -> list[Any]:
    """Returns the devices of QNN's provider, which a process may register only once."""
    runtime = _import("onnxruntime")
    runtime.register_execution_provider_library(
        PROVIDER, _import("onnxruntime_qnn").get_library_path()
    )
    return [d for d in runtime.get_ep_devices() if d.ep_name == PROVIDER]


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f"{name}: cannot be imported ({error}); {remedy(EXTRA)}") from None
