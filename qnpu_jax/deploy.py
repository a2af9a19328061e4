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
from qnpu_jax.npu import compare, hexagon
from qnpu_jax.npu.emulator import Emulated
from qnpu_jax.npu.profile import DEFAULT, PROFILES, Profile, ProfileName
from qnpu_jax.pipeline import Clock
from qnpu_jax.proof import Simulate, bound
from qnpu_jax.tflite import Positions

PREFILL = "prefill"


def export(
    out: Path,
    file: Path,
    prefill: int,
    logits: Positions,
    context: int | None = None,
    profile: ProfileName = "plain",
) -> None:
    """Writes the model of a folder of `qnpu quantize` to `file`, for another length.

    Args:
      context: write `prefill_<N>` and `decode` over a KV cache (`tflite.write_cached`)
        of so many positions; None writes one prefill without a cache.
      profile: which ops of an NPU's own it asks for.

    Raises:
      UserError: not such a folder, `file` exists, the model has fewer positions, or an accumulator
        can overflow at that length.
    """
    check_prefill(prefill)
    with artifacts.new_file(file) as partial:
        artifacts.read_report(out)
        model = freeze.load(out)
        stored = PROFILES[profile].stored(model)
        if context is None:
            bound(model, prefill, logits)
            tflite.build(model, prefill, logits, stored).write(partial)
        else:
            bound(model, context, logits)  # as many keys as every signature has
            tflite.build_cached(model, prefill, context, logits, stored).write(partial)


def tokenizer(out: Path) -> Tokenizer:
    """That of a folder of `qnpu quantize`.

    Raises:
      UserError: not such a folder, or a file of it changed since.
    """
    artifacts.read_report(out)
    return Tokenizer.load(out / artifacts.TOKENIZER)


def deployed(out: Path, prefill: int, context: int, profile: ProfileName = "plain") -> Path:
    """The file of a folder that generates text, written if it is not there yet; that of another
    profile is for its compiler.

    Raises:
      UserError: as `export`.
    """
    report = artifacts.read_report(out)
    # Named by the model, so that a folder written again does not meet the file of the old one.
    model = report["sha256"][artifacts.MODEL][:12]
    use = "generate" if profile == "plain" else profile
    file = out / f"{use}-{model}-{prefill}-{context}.tflite"
    if not file.exists():
        export(out, file, prefill, "last", context, profile)
    return file


def check_prefill(prefill: int) -> None:
    """Raises UserError for a prefill too short to be one."""
    if prefill < 2:
        raise UserError(f"prefill: {prefill} is too short; expected at least 2; raise --prefill")


def compiled(
    out: Path,
    soc: str,
    prefill: int,
    context: int,
    profile: ProfileName = DEFAULT,
    *,
    share: bool = False,
) -> hexagon.Compiled:
    """Compiles what `deployed` gives for an SoC, beside it; a file compiled before is replaced.

    Raises:
      UserError: as `deployed` and `hexagon.compile_file`.
    """
    hexagon.check_soc(soc)  # before anything is written
    hexagon.check_installed()
    source = deployed(out, prefill, context, profile)
    target = source.with_name(f"{soc}-{source.name}")
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
    profile: ProfileName = DEFAULT,
) -> dict[str, Any]:
    """The emulated NPU beside the simulator, on held-out text: `beside_simulator`.

    Args:
      windows: of `tokens` each that perplexity is measured on; 0 for none.

    Raises:
      UserError: as `beside_simulator`; not such a folder, or a text too short.
    """
    hexagon.check_soc(soc)
    hexagon.check_installed()
    artifacts.read_report(out)
    with clock.stage("load"):
        model = freeze.load(out)
        ids = texts.tokenized(text, tokenizer(out), model.config.vocab_size)
        read = ids.first(tokens, max(1, windows) * tokens).windows
    return beside_simulator(model, soc, layers, read, windows > 0, simulate, clock, profile)


def beside_simulator(
    model: IntegerModel,
    soc: str,
    layers: Sequence[int],
    windows: np.ndarray,
    score: bool,
    simulate: Simulate,
    clock: Clock,
    profile: ProfileName = DEFAULT,
) -> dict[str, Any]:
    """The emulated NPU beside the simulator: ops, layers and perplexity.

    Args:
      layers: whose ops are compared one by one, and that are compared with float.
      windows: (N, T) token ids; ops and layers see the first.
      score: whether to run the whole model.
      profile: of whole layers and of the model; single ops are those that the simulator has.

    Returns:
      `ops` (compare.OpDifference) and `layers` (compare.LayerDifference); with `score`,
      `perplexity` by reading and `differing`, the share of logits that differ.

    Raises:
      UserError: as `hexagon.compile_file`; a layer that there is not.
    """
    count, tokens = model.config.num_layers, windows.shape[1]
    if wrong := [i for i in layers if not 0 <= i < count]:
        raise UserError(f"--layers {wrong[0]}: expected 0 to {count - 1}; choose others")
    with clock.stage("simulate"):
        simulator = simulate(model, tokens, "all")
        values = simulator.tensors(windows[0])
    found: dict[str, Any] = {"ops": [], "layers": []}
    chosen = PROFILES[profile]
    with tempfile.TemporaryDirectory() as folder:
        for layer in layers:
            with clock.stage(f"layer {layer}"):
                file = _compiled_ops(model, tokens, layer, soc, Path(folder), chosen)
                arguments = (file, model, model.decoder(tokens), layer, values)
                found["ops"] += compare.op_differences(*arguments)
                found["layers"].append(compare.layer_difference(*arguments))
        if score:
            with clock.stage("compile"):
                whole = _compiled_whole(model, tokens, soc, Path(folder), chosen)
            emulator = Emulated(whole, f"{PREFILL}_{tokens}")
            found |= _perplexity(model, emulator, simulator.logits, windows, clock)
    return found


def _compiled_ops(
    model: IntegerModel, tokens: int, layer: int, soc: str, folder: Path, profile: Profile
) -> Path:
    source = folder / f"{layer}.tflite"
    dec = model.decoder(tokens)
    compare.build_ops(model, dec, layer, profile.stored(model)).write(source)
    return hexagon.compile_file(source, soc, folder / f"{layer}-{soc}.tflite").path


def _compiled_whole(
    model: IntegerModel, tokens: int, soc: str, folder: Path, profile: Profile
) -> Path:
    source = folder / "whole.tflite"
    tflite.build(model, tokens, "all", profile.stored(model)).write(source)
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
