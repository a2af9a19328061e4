"""What is made of an output folder of `qnpu quantize`: files for other lengths, with a KV cache, or
compiled for an NPU, and how an NPU's arithmetic compares.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qnpu_jax import artifacts, evaluation, freeze, texts, tflite
from qnpu_jax.config import UserError
from qnpu_jax.freeze import IntegerModel
from qnpu_jax.models import Tokenizer
from qnpu_jax.npu import compare, hexagon, litertlm
from qnpu_jax.npu.emulator import Emulated
from qnpu_jax.pipeline import Clock
from qnpu_jax.proof import Simulate, bound
from qnpu_jax.tflite import Positions

PREFILL = "prefill"


def export(
    out: Path, file: Path, prefill: int, logits: Positions, context: int | None = None
) -> None:
    """Writes the model of a folder of `qnpu quantize` to `file`, for another length.

    Args:
      context: write `prefill_<N>` and `decode` over a KV cache (`tflite.write_cached`)
        of so many positions; None writes one prefill without a cache.

    Raises:
      UserError: not such a folder, `file` exists, the model has fewer positions, or an accumulator
        can overflow at that length.
    """
    check_prefill(prefill)
    with artifacts.new_file(file) as partial:
        artifacts.read_report(out)
        model = freeze.load(out)
        if context is None:
            bound(model, prefill, logits)
            tflite.write(model, partial, prefill, logits)
        else:
            bound(model, context, logits)  # as many keys as every signature has
            tflite.write_cached(model, partial, prefill, context, logits)


def package(out: Path, file: Path, prefill: int, context: int) -> None:
    """Writes the model of a folder of `qnpu quantize` to `file`, as a package for LiteRT-LM.

    Raises:
      UserError: as `export` and `litertlm.write`.
    """
    check_prefill(prefill)
    litertlm.load_builder()  # before the model is read
    with artifacts.new_file(file) as partial:
        artifacts.read_report(out)
        model = freeze.load(out)
        bound(model, context, "last")
        litertlm.write(model, out / artifacts.TOKENIZER, partial, prefill, context)


def tokenizer(out: Path) -> Tokenizer:
    """That of a folder of `qnpu quantize`.

    Raises:
      UserError: not such a folder, or a file of it changed since.
    """
    artifacts.read_report(out)
    return Tokenizer.load(out / artifacts.TOKENIZER)


def deployed(out: Path, prefill: int, context: int) -> Path:
    """The file of a folder that generates text, written if it is not there yet.

    Raises:
      UserError: as `export`.
    """
    report = artifacts.read_report(out)
    # Named by the model, so that a folder written again does not meet the file of the old one.
    model = report["sha256"][artifacts.MODEL][:12]
    file = out / f"generate-{model}-{prefill}-{context}.tflite"
    if not file.exists():
        export(out, file, prefill, "last", context)
    return file


def check_prefill(prefill: int) -> None:
    """Raises UserError for a prefill too short to be one."""
    if prefill < 2:
        raise UserError(f"prefill: {prefill} is too short; expected at least 2; raise --prefill")


def compiled(
    out: Path, soc: str, prefill: int, context: int, *, share: bool = False
) -> hexagon.Compiled:
    """Compiles what `deployed` gives for an SoC, beside it; a file compiled before is replaced.

    Raises:
      UserError: as `deployed` and `hexagon.compile_file`.
    """
    hexagon.check_soc(soc)  # before anything is written
    hexagon.check_installed()
    source = deployed(out, prefill, context)
    target = source.with_name(source.name.replace("generate-", f"{soc}-"))
    target.unlink(missing_ok=True)
    return hexagon.compile_file(source, soc, target, share=share)


def emulated(
    out: Path,
    soc: str,
    layers: Sequence[int],
    windows: int,
    tokens: int,
    text: Path | None,
    simulate: Simulate,
    clock: Clock,
) -> dict[str, Any]:
    """The emulated NPU beside the simulator, on held-out text.

    Args:
      layers: whose ops are compared one by one, and that are compared with float.
      windows: of `tokens` each that perplexity is measured on; 0 for none.

    Returns:
      `ops` (compare.OpDifference) and `layers` (compare.LayerDifference), `perplexity` by reading,
      `differing`: the share of logits that differ.

    Raises:
      UserError: as `hexagon.compile_file`; a layer that there is not; a text too short.
    """
    hexagon.check_soc(soc)
    hexagon.check_installed()
    artifacts.read_report(out)
    with clock.stage("load"):
        model = freeze.load(out)
        for layer in layers:
            if not 0 <= layer < model.config.num_layers:
                raise UserError(
                    f"--layers {layer}: expected 0 to {model.config.num_layers - 1}; choose others"
                )
        ids = texts.tokenized(text, tokenizer(out), model.config.vocab_size)
        read = ids.first(tokens, max(1, windows) * tokens).windows
        simulator = simulate(model, tokens, "all")
        values = simulator.tensors(read[0])
    found: dict[str, Any] = {"ops": [], "layers": []}
    with tempfile.TemporaryDirectory() as folder:
        for layer in layers:
            with clock.stage(f"layer {layer}"):
                file = _compiled_ops(model, tokens, layer, soc, Path(folder))
                arguments = (file, model, model.decoder(tokens), layer, values)
                found["ops"] += compare.op_differences(*arguments)
                found["layers"].append(compare.layer_difference(*arguments))
        if windows:
            with clock.stage("compile"):
                whole = _compiled_whole(model, tokens, soc, Path(folder))
            emulator = Emulated(whole, f"{PREFILL}_{tokens}")
            found |= _perplexity(model, emulator, simulator.logits, read, clock)
    return found


def _compiled_ops(model: IntegerModel, tokens: int, layer: int, soc: str, folder: Path) -> Path:
    source = folder / f"{layer}.tflite"
    compare.build_ops(model, model.decoder(tokens), layer).write(source)
    return hexagon.compile_file(source, soc, folder / f"{layer}-{soc}.tflite").path


def _compiled_whole(model: IntegerModel, tokens: int, soc: str, folder: Path) -> Path:
    source = folder / "whole.tflite"
    tflite.write(model, source, tokens, "all")
    return hexagon.compile_file(source, soc, folder / f"whole-{soc}.tflite").path


def _perplexity(
    model: IntegerModel, emulator: Emulated, simulate: Any, windows: np.ndarray, clock: Clock
) -> dict[str, Any]:
    differing = []

    def run(ids: np.ndarray) -> np.ndarray:
        codes = emulator.run({"ids": ids})["logits"]
        differing.append(float(np.mean(codes != np.asarray(simulate(ids)))))
        return codes

    scores = {}
    for name, codes in (("simulator", simulate), ("emulator", run)):
        with clock.stage(f"score {name}"):
            logits = evaluation.integer_logits(model, codes)
            scores[name] = evaluation.perplexity(logits, windows)
    return {"perplexity": scores, "differing": float(np.mean(differing))}
