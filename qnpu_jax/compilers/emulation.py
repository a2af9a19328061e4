"""Emulated NPU beside the simulator: single ops, whole layers, and perplexity of the model."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np

from qnpu_jax.choices import FormName
from qnpu_jax.compilers import emulator_differences, hexagon
from qnpu_jax.compilers.emulator_differences import (
    LayerDifference,
    OpDifference,
    TensorCodes,
    TextDifference,
)
from qnpu_jax.compilers.hexagon_emulator import EmulatedSignature
from qnpu_jax.integer import IntegerModel, Simulate
from qnpu_jax.measure import perplexity
from qnpu_jax.progress import Track, untracked
from qnpu_jax.tflite import FORMS, HEXAGON_FORM, ModelWriter, build_prefill


class Emulation:
    """Compiles parts of a model and runs them in the emulator, on the simulator's inputs.

    Every method raises UserError as `hexagon.compile_file`.

    Args:
      soc: one of `hexagon.SOCS`.
      windows: (N, T) token ids of some text; ops and layers see the first window.
      simulate: makes the simulator.
      form: of the files of whole layers and of the model; single ops are written as `plain`.
    """

    def __init__(
        self,
        model: IntegerModel,
        soc: str,
        windows: np.ndarray,
        simulate: Simulate,
        form: FormName = HEXAGON_FORM,
    ) -> None:
        self._model, self._soc, self._windows = model, soc, windows
        self._form = FORMS[form](model)
        self._tokens = windows.shape[1]
        self._decoder = model.decoder(self._tokens)
        self._simulator = simulate(model, self._tokens, "all")

    @cached_property
    def _tensors(self) -> TensorCodes:
        return self._simulator.tensors(self._windows[0])

    def ops(self, layer: int) -> list[OpDifference]:
        """Compares each op of a layer that does more than move codes."""
        with tempfile.TemporaryDirectory() as folder:
            writer = emulator_differences.build_ops(self._model, self._decoder, layer)
            file = self._compiled(writer, folder)
            arguments = (self._model, self._decoder, layer, self._tensors)
            return [*emulator_differences.op_differences(file, *arguments)]

    def layer(self, layer: int) -> LayerDifference:
        """Compares a whole layer with the simulator, and both with float."""
        with tempfile.TemporaryDirectory() as folder:
            file = self._compiled(
                emulator_differences.build_layer(self._form, self._decoder, layer), folder
            )
            arguments = (self._model, self._decoder, layer, self._tensors)
            return emulator_differences.layer_difference(file, *arguments)

    def text(self, track: Track = untracked) -> TextDifference:
        """Compares perplexity of the whole model on all windows.

        Args:
          track: shows progress over the windows.
        """
        with tempfile.TemporaryDirectory() as folder:
            writer = build_prefill(self._model, self._tokens, "all", self._form)
            emulated = EmulatedSignature(self._compiled(writer, folder), f"prefill_{self._tokens}")
        simulator, emulator, differing = [], [], []
        for ids in track(self._windows, len(self._windows), "emulate"):
            expected = np.asarray(self._simulator.logits(ids))
            got = emulated.run({"ids": ids})["logits"]
            simulator.append(self._perplexity(expected, ids))
            emulator.append(self._perplexity(got, ids))
            differing.append(float(np.mean(got != expected)))
        return TextDifference(tuple(simulator), tuple(emulator), float(np.mean(differing)))

    def _perplexity(self, codes: np.ndarray, ids: np.ndarray) -> float:
        """Returns the perplexity of one window, from codes of its logits."""
        return perplexity.perplexity(
            perplexity.integer_logits(self._model, lambda _: codes), ids[None]
        )

    def _compiled(self, writer: ModelWriter, folder: str) -> Path:
        source, target = Path(folder) / "source.tflite", Path(folder) / "compiled.tflite"
        writer.write(source)
        return hexagon.compile_file(source, self._soc, target).path
