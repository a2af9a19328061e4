"""`session.Backend` on LiteRT: one .tflite, its signatures `prefill_<N>` and `decode`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int8, Integer

from qnpu_jax.config import UserError
from qnpu_jax.decoder import MASK_SCALE, causal_mask
from qnpu_jax.litert import KernelSet, open_interpreter
from qnpu_jax.npu.session import Shape, Step

PREFILL = "prefill_"


class LiteRTBackend:
    """An interpreter of a file that `tflite.write_cached` wrote.

    Args:
      path: the .tflite.
      kernels: `ref`, `opt` or `xnn`.
      threads: of the interpreter.
      keep_tensors: keep every intermediate tensor readable after a step.

    Raises:
      UserError: the file is missing, damaged, or has other signatures.
    """

    def __init__(
        self,
        path: Path,
        kernels: KernelSet = "xnn",
        *,
        threads: int | None = None,
        keep_tensors: bool = False,
    ) -> None:
        self._interpreter = interpreter = open_interpreter(path, kernels, keep_tensors, threads)
        keys = list(interpreter.get_signature_list())
        lengths = [k.removeprefix(PREFILL) for k in keys if k.startswith(PREFILL)]
        if "decode" not in keys or len(lengths) != 1:
            raise UserError(
                f"{path}: signatures {keys}; expected prefill_<N> and decode; write it with"
                " `qnpu export --context`"
            )
        self._runners = {
            1: interpreter.get_signature_runner("decode"),
            int(lengths[0]): interpreter.get_signature_runner(PREFILL + lengths[0]),
        }
        inputs = self._runners[1].get_input_details()
        heads, slots, width = (int(n) for n in inputs["kv_cache_k_0"]["shape"])
        self.shape = Shape(
            prefill=int(lengths[0]),
            context=slots + 1,
            layers=sum(name.startswith("kv_cache_k_") for name in inputs),
            heads=heads,
            width=width,
        )
        self._prefix = int(inputs["mask"]["shape"][2]) - self.shape.context
        self._mask = inputs["mask"]["dtype"]
        scales = self._runners[1].get_output_details()["logits"]["quantization_parameters"]
        self.logit_scale = float(scales["scales"][0])

    def step(
        self,
        ids: Integer[np.ndarray, " t"],
        filled: int,
        k: Int8[np.ndarray, "l n c k"],
        v: Int8[np.ndarray, "l n c k"],
    ) -> Step:
        """As `session.Backend.step`."""
        inputs: dict[str, Any] = {
            "ids": np.asarray(ids, np.int32),
            "positions": np.arange(filled, filled + len(ids), dtype=np.int32),
            "mask": mask_codes(len(ids), self._prefix, k.shape[2], filled, self._mask),
        }
        inputs |= {f"kv_cache_k_{i}": x for i, x in enumerate(k)}
        inputs |= {f"kv_cache_v_{i}": x for i, x in enumerate(v)}
        out: Mapping[str, np.ndarray] = self._runners[len(ids)](**inputs)
        new = [
            np.stack([out[f"kv_slice_{letter}_{i}"] for i in range(self.shape.layers)])
            for letter in "kv"
        ]
        return Step(out["logits"], *new)

    def tensors(self, tokens: int) -> Iterator[tuple[str, np.ndarray]]:
        """Name and codes of every tensor of the last step of so many tokens, constants included."""
        graph = int(tokens == 1)  # `write_cached` writes decode second
        for detail in self._interpreter.get_tensor_details(graph):
            if detail["name"]:
                yield detail["name"], self._interpreter.get_tensor(detail["index"], graph)


def mask_codes(
    tokens: int, prefix: int, cache: int, filled: int, dtype: Any
) -> Integer[np.ndarray, "t 1 s"]:
    """Codes of `decoder.causal_mask` in int8 or int16."""
    scale = MASK_SCALE[8 * np.dtype(dtype).itemsize]
    return (causal_mask(tokens, prefix, cache, filled) / scale).astype(dtype)
