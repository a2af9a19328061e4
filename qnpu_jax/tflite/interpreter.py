"""LiteRT's interpreter on a .tflite, with every tensor readable by name."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qnpu_jax import extras
from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.errors import UserError

RESOLVERS = {
    "ref": OpResolverType.BUILTIN_REF,
    "opt": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "xnn": OpResolverType.BUILTIN,
}
"""LiteRT's op resolver of each kernel set: reference kernels; optimized ones; those of an
application, in which XNNPACK takes the ops that it can."""


class LiteRT:
    """Interpreter of a file that `write_prefill` wrote.

    Args:
      path: a .tflite with one signature, ids (T,) int32 to codes of the logits.
      kernels: `ref`, `opt` or `xnn`; `tf` for TensorFlow (extra `tensorflow`).
      keep_tensors: keeps every intermediate tensor readable after a run. XNNPACK then gets one op
        at a time.
      threads: number of threads; None leaves it to LiteRT.

    Raises:
      UserError: the file is missing or not a .tflite that LiteRT can run.
    """

    def __init__(
        self,
        path: Path,
        kernels: KernelSet = "ref",
        *,
        keep_tensors: bool = False,
        threads: int | None = None,
    ) -> None:
        self._interpreter = open_interpreter(path, kernels, keep_tensors, threads)
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]

    @property
    def tokens(self) -> int:
        """Static length T of the signature."""
        return int(self._input["shape"][0])

    @property
    def logits(self) -> Positions:
        """Whether the file gives logits of all positions, or of the last only."""
        return "all" if self._output["shape"][0] == self.tokens else "last"

    def run(self, ids: np.ndarray) -> np.ndarray:
        """Runs ids (T,) and returns codes of the logits, (T, V) or (1, V)."""
        self._interpreter.set_tensor(self._input["index"], np.asarray(ids, np.int32))
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output["index"])

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and codes of every tensor after a run, constants and the input included."""
        for detail in self._interpreter.get_tensor_details():
            if detail["name"]:
                yield detail["name"], self._interpreter.get_tensor(detail["index"])


def _engine(kernels: KernelSet) -> tuple[Any, Any]:
    """Interpreter class and op resolver of a kernel set.

    Raises:
      UserError: TensorFlow is asked for and not installed.
    """
    if kernels != "tf":
        return Interpreter, RESOLVERS[kernels]
    extras.version("tensorflow", "tensorflow")
    lite = importlib.import_module("tensorflow").lite
    return lite.Interpreter, lite.experimental.OpResolverType.BUILTIN_REF


def open_interpreter(
    path: Path, kernels: KernelSet, keep_tensors: bool = False, threads: int | None = None
) -> Any:
    """Opens a .tflite and allocates its tensors.

    Args:
      kernels, keep_tensors, threads: as `LiteRT`.

    Raises:
      UserError: the file is missing or not a .tflite that LiteRT can run.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .tflite; run `qnpu quantize` first")
    try:
        with _quiet(), warnings.catch_warnings():
            if kernels == "tf":  # says that LiteRT has replaced it
                warnings.simplefilter("ignore")
            engine, resolver = _engine(kernels)
            # LiteRT warns that kept tensors cost memory; the caller asked for them.
            warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors.*")
            interpreter = engine(
                model_path=str(path),
                experimental_op_resolver_type=resolver,
                experimental_preserve_all_tensors=keep_tensors,
                num_threads=threads,
            )
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        name = "TensorFlow" if kernels == "tf" else "LiteRT"
        # TensorFlow 2.21 has no QUANTIZE from int8 to int16.
        other = "choose --kernels ref, or a recipe of 8 bits everywhere, such as w8a8i8"
        way_out = other if kernels == "tf" else "write it again"
        raise UserError(f"{path}: {name} cannot load it ({reason}); {way_out}") from None
    return interpreter


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences messages that the runtime's C++ code writes to stderr while it loads a file."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
