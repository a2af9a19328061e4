"""What is made of an output folder of `qnpu quantize`: files for other lengths, with a KV cache, or
compiled for an NPU, and how an NPU's arithmetic compares.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from qnpu_jax import artifacts
from qnpu_jax.compilers import Emulation, ethos, ethos_form, hexagon
from qnpu_jax.errors import UserError
from qnpu_jax.graph import Positions
from qnpu_jax.integer import IntegerModel, Simulate
from qnpu_jax.output import OutputFolder
from qnpu_jax.progress import Clock, Track, untracked
from qnpu_jax.proof import CachedSimulator, bound, prove_cached
from qnpu_jax.runtime import litertlm_package
from qnpu_jax.text import excerpts
from qnpu_jax.tflite import DEFAULT, PROFILES, KernelSet, ProfileName, cached, check_prefill, writer


def export(
    folder: OutputFolder,
    file: Path,
    prefill: int,
    logits: Positions,
    context: int | None = None,
    profile: ProfileName = "plain",
) -> None:
    """Writes the model of a folder of `qnpu quantize` to `file`, for another length.

    Args:
      context: write `prefill_<N>` and `decode` over a KV cache (`cached.write_cached`)
        of so many positions; None writes one prefill without a cache.
      profile: one of npu.profile.PROFILES: how the file holds the model.

    Raises:
      UserError: not such a folder, `file` exists, the model has fewer positions, or an accumulator
        can overflow at that length.
    """
    check_prefill(prefill)
    with artifacts.new_file(file) as partial:
        model = folder.model
        stored = PROFILES[profile](model)
        if context is None:
            bound(model, prefill, logits)
            writer.build(model, prefill, logits, stored).write(partial)
        else:
            bound(model, context, logits)  # as many keys as every signature has
            cached.build_cached(model, prefill, context, logits, stored).write(partial)


def package(
    folder: OutputFolder, file: Path, prefill: int, context: int, profile: ProfileName = "plain"
) -> None:
    """Writes the model of a folder of `qnpu quantize` to `file`, as a package for LiteRT-LM.

    Raises:
      UserError: as `export` and `litertlm_package.write`.
    """
    check_prefill(prefill)
    litertlm_package.load_builder()  # before the model is read
    with artifacts.new_file(file) as partial:
        bound(folder.model, context, "last")
        stored = PROFILES[profile](folder.model)
        litertlm_package.write(stored, folder.tokenizer_folder, partial, prefill, context)


def deployed(
    folder: OutputFolder, prefill: int, context: int, profile: ProfileName = "plain"
) -> Path:
    """The file of a folder that generates text, written if it is not there yet; that of `hexagon`
    is for its compiler.

    Raises:
      UserError: as `export`.
    """
    file = folder.deployment("generate" if profile == "plain" else profile, prefill, context)
    if not file.exists():
        export(folder, file, prefill, "last", context, profile)
    return file


def verified(
    folder: OutputFolder,
    prefill: int,
    context: int,
    text: Path | None,
    simulate: Callable[[IntegerModel, int, int], CachedSimulator],
    clock: Clock,
    kernels: KernelSet = "ref",
) -> dict[str, Any]:
    """The file of `deployed` against the simulator, every tensor of both signatures while text
    fills the cache: two chunks, with single steps between and after, as far as there is room.

    Returns:
      As the entry `verify` of `prefill.prove_prefill`, and `steps`, the tokens of each.

    Raises:
      UserError: as `deployed`; the text is too short.
    """
    file = deployed(folder, prefill, context)
    with clock.stage("load"):
        model = folder.model
        ids = excerpts.tokenized(text, folder.tokenizer, model.config.vocab_size)
        length = min(2 * prefill + 4, context)
        read = ids.first(length, length).windows[0]
        simulator = simulate(model, prefill, context)
    with clock.stage("verify"):
        found, taken = prove_cached(file, model, simulator, read, kernels)
    return {
        "tensors": found.tensors,
        "elements": found.elements,
        "differing": found.differing,
        "differences": [str(d) for d in found.differences],
        "steps": taken,
    }


def compiled(
    folder: OutputFolder,
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
    source = deployed(folder, prefill, context, profile)
    target = source.with_name(f"{soc}-{source.name}")
    target.unlink(missing_ok=True)
    return hexagon.compile_file(source, soc, target, share=share)


def check_target(soc: str) -> None:
    """Raises UserError for a name that neither compiler knows."""
    if soc not in (*hexagon.SOCS, *ethos.ACCELERATORS):
        raise UserError(
            f"--soc {soc}: the compiler does not know it; expected a Snapdragon, one of"
            f" {[*hexagon.SOCS]}, or an Ethos-U, one of {[*ethos.ACCELERATORS]}"
        )


def compiled_for_arm(
    folder: OutputFolder, accelerator: str, prefill: int, context: int
) -> dict[str, ethos.Compiled]:
    """Compiles the signatures of `export` for an Ethos-U into one file each, in the folder.

    Files compiled before are replaced. All of them appear, or none.

    Returns:
      By the name of the signature.

    Raises:
      UserError: as `deployed` and `ethos.compile_file`.
    """
    ethos.check_accelerator(accelerator)  # before anything is written
    ethos.check_installed()
    check_prefill(prefill)
    model = folder.model
    bound(model, context, "last")
    # Ethos-U65 has neither the products nor the gathers of the other spelling.
    stored = ethos_form.arm_form(model, respell=accelerator.startswith("ethos-u85"))
    made, paths = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for key, tokens in ((f"prefill_{prefill}", prefill), ("decode", 1)):
            source = Path(scratch) / f"{key}.tflite"
            ethos_form.build(model, stored, tokens, context, key).write(source)
            paths[key] = folder.deployment(accelerator, prefill, context, key)
            target = Path(scratch) / paths[key].name
            made[key] = ethos.compile_file(source, accelerator, target)
            source.unlink()  # as large as the model
        with ExitStack() as files:
            for key, path in paths.items():
                path.unlink(missing_ok=True)
                shutil.copyfile(made[key].path, files.enter_context(artifacts.new_file(path)))
    return {key: replace(found, path=paths[key]) for key, found in made.items()}


def emulated(
    folder: OutputFolder,
    soc: str,
    layers: Sequence[int],
    windows: int,
    tokens: int,
    text: Path | None,
    simulate: Simulate,
    clock: Clock,
    profile: ProfileName = DEFAULT,
    track: Track = untracked,
) -> dict[str, Any]:
    """The emulated NPU beside the simulator, on held-out text.

    Args:
      layers: whose ops are compared one by one, and that are compared with float.
      windows: of `tokens` each that perplexity is measured on; 0 for none.
      profile: of whole layers and of the model; single ops are spelled as in `plain`.
      track: wraps the iteration over windows, for a progress bar: (items, length, what).

    Returns:
      `ops` (compare.OpDifference), `layers` (compare.LayerDifference), and `text`
      (compare.TextDifference), if windows were asked for.

    Raises:
      UserError: as `hexagon.compile_file`; a layer that there is not; a text too short.
    """
    hexagon.check_soc(soc)
    hexagon.check_installed()
    with clock.stage("load"):
        model = folder.model
        count = model.config.num_layers
        if wrong := [i for i in layers if not 0 <= i < count]:
            raise UserError(f"--layers {wrong[0]}: expected 0 to {count - 1}; choose others")
        ids = excerpts.tokenized(text, folder.tokenizer, model.config.vocab_size)
        read = ids.first(tokens, max(1, windows) * tokens).windows
        emulation = Emulation(model, soc, read, simulate, profile)
    found: dict[str, Any] = {"ops": [], "layers": []}
    for layer in layers:
        with clock.stage(f"layer {layer}"):
            found["ops"] += emulation.ops(layer)
            found["layers"].append(emulation.layer(layer))
    if windows:
        with clock.stage("perplexity"):
            found["text"] = emulation.text(track)
    return found
