"""Backend of a session on LiteRT: the signatures `prefill_<N>` and `decode` of one .tflite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int8, Integer

from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.errors import UserError
from qnpu_jax.graph import KEEP_SCALE, masks, split_mask_name, visible
from qnpu_jax.graph import mask_codes as graph_codes
from qnpu_jax.runtime.session import Shape, Step
from qnpu_jax.tflite import open_interpreter

PREFILL = "prefill_"


class LiteRTBackend:
    """Backend of a session that runs a file of `cached.build_cached`.

    Attributes:
      shape: sizes of the model.
      logits: whether the prefill gives logits of all positions, or of the last only.
      logit_scale: real value of one code of the logits.

    Args:
      path: the .tflite.
      kernels: `ref`, `opt` or `xnn`.
      threads: number of threads; None leaves it to LiteRT.
      keep_tensors: keeps every intermediate tensor readable after a step.

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
        self._inputs = {t: r.get_input_details() for t, r in self._runners.items()}
        inputs = self._inputs[1]
        heads, slots, width = (int(n) for n in inputs["kv_cache_k_0"]["shape"])
        self.shape = Shape(
            prefill=int(lengths[0]),
            context=slots + 1,
            layers=sum(name.startswith("kv_cache_k_") for name in inputs),
            heads=heads,
            width=width,
        )
        self._windows = mask_windows(inputs)
        mask = next(d for name, d in inputs.items() if split_mask_name(name))
        self._prefix = int(mask["shape"][2]) - self.shape.context
        rows = self._runners[self.shape.prefill].get_output_details()["logits"]["shape"][0]
        self.logits: Positions = "last" if rows == 1 else "all"
        scales = self._runners[1].get_output_details()["logits"]["quantization_parameters"]
        self.logit_scale = float(scales["scales"][0])

    def step(
        self,
        ids: Integer[np.ndarray, " t"],
        filled: int,
        k: Int8[np.ndarray, "l n c k"],
        v: Int8[np.ndarray, "l n k c"],
    ) -> Step:
        """As `session.Backend.step`."""
        tokens = len(ids)
        inputs: dict[str, Any] = {
            "ids": np.asarray(ids, np.int32),
            "positions": np.arange(filled, filled + tokens, dtype=np.int32),
        }
        for window in self._windows:
            seen = visible(tokens, self._prefix, k.shape[2], filled, window)
            inputs |= mask_codes(seen, self._inputs[tokens], window)
        inputs |= {f"kv_cache_k_{i}": x for i, x in enumerate(k)}
        inputs |= {f"kv_cache_v_{i}": x for i, x in enumerate(v)}
        out: Mapping[str, np.ndarray] = self._runners[tokens](**inputs)
        new = [
            np.stack([out[f"kv_slice_{letter}_{i}"] for i in range(self.shape.layers)])
            for letter in "kv"
        ]
        return Step(out["logits"], *new)

    def tensors(self, tokens: int) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and codes of every tensor, constants included, after a step.

        Args:
          tokens: of the step: 1, or those of the prefill.
        """
        graph = int(tokens == 1)  # `build_cached` writes decode second
        for detail in self._interpreter.get_tensor_details(graph):
            if detail["name"]:
                yield detail["name"], self._interpreter.get_tensor(detail["index"], graph)


def mask_windows(names: Iterable[str]) -> list[int | None]:
    """Windows of the layers whose masks are among a signature's inputs; None for no window.

    >>> mask_windows(["ids", "mask", "mask_i8", "mask_window_512"])
    [None, 512]
    """
    found = [split for name in names if (split := split_mask_name(name)) is not None]
    return list(dict.fromkeys(window for local, window in found if local == "mask"))


def mask_codes(
    seen: Bool[np.ndarray, "t s"], inputs: Mapping[str, Any], window: int | None = None
) -> dict[str, Integer[np.ndarray, "1 r s"]]:
    """Returns codes of the masks that a signature takes (`shared_inputs.masks`).

    Args:
      seen: whether a token (row) may look at a key (column).
      inputs: details of the signature's inputs by name, as LiteRT gives them.
      window: of the layers that read them, which is part of the masks' names.

    Returns:
      Every `mask` and `keep` that the signature takes for this window, with a row for each token
      and query head.
    """
    codes = {}
    for name, detail in inputs.items():
        local, of = split_mask_name(name) or ("", None)
        if not local or of != window:
            continue
        real = masks(seen, int(detail["shape"][1]) // len(seen))[local]
        if local == "mask":
            codes[name] = graph_codes(real, 8 * np.dtype(detail["dtype"]).itemsize)
        else:
            codes[name] = np.rint(real / KEEP_SCALE).astype(np.int16)
    return codes
