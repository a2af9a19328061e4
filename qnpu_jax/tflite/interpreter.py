"""A .tflite run in LiteRT's interpreter, every tensor by name."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qnpu_jax.choices import KernelSet, Positions
from qnpu_jax.errors import UserError

RESOLVERS = {
    "ref": OpResolverType.BUILTIN_REF,
    "opt": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "xnn": OpResolverType.BUILTIN,
}
"""Reference kernels; optimized ones; what an application gets (XNNPACK takes what it can)."""


class LiteRT:
    """An interpreter of one file and one kernel set.

    Args:
      path: a .tflite with one signature, ids (T,) int32 to logits.
      kernels: `ref`, `opt` or `xnn`.
      keep_tensors: keep every intermediate tensor readable after a run; XNNPACK then gets one op at
        a time.
      threads: of the interpreter.

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
        """The static length T."""
        return int(self._input["shape"][0])

    @property
    def logits(self) -> Positions:
        """Whether it gives logits of all positions, or of the last only."""
        return "all" if self._output["shape"][0] == self.tokens else "last"

    def run(self, ids: np.ndarray) -> np.ndarray:
        """Codes of the logits (T or 1, V) for ids (T,)."""
        self._interpreter.set_tensor(self._input["index"], np.asarray(ids, np.int32))
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output["index"])

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and codes of every tensor of the last run, constants and the input included."""
        for detail in self._interpreter.get_tensor_details():
            if detail["name"]:
                yield detail["name"], self._interpreter.get_tensor(detail["index"])


def open_interpreter(
    path: Path, kernels: KernelSet, keep_tensors: bool = False, threads: int | None = None
) -> Interpreter:
    """An interpreter with its tensors allocated.

    Raises:
      UserError: as `LiteRT`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .tflite; run `qnpu quantize` first")
    try:
        with _quiet(), warnings.catch_warnings():
            # Keeping tensors costs memory under XNNPACK too: the caller asked for them.
            warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors.*")
            interpreter = Interpreter(
                model_path=str(path),
                experimental_op_resolver_type=RESOLVERS[kernels],
                experimental_preserve_all_tensors=keep_tensors,
                num_threads=threads,
            )
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: LiteRT cannot load it ({reason}); write it again") from None
    return interpreter


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the runtime's C++ writes to stderr while it loads a file."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
