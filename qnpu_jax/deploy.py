"""Files made of an output folder of `qnpu quantize`: for other lengths, with a KV cache, compiled
for an NPU. Also their proof, and the emulated NPU beside the simulator.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from qnpu_jax import artifacts
from qnpu_jax.choices import FormName, KernelSet, Positions
from qnpu_jax.compilers import (
    ACCELERATORS,
    SOCS,
    CompiledForArm,
    CompiledForHexagon,
    Emulation,
    LayerDifference,
    OpDifference,
    TextDifference,
    ethos,
    ethos_form,
    hexagon,
)
from qnpu_jax.errors import UserError
from qnpu_jax.integer import IntegerModel, Simulate
from qnpu_jax.output import OutputFolder
from qnpu_jax.progress import Clock, Observer
from qnpu_jax.proof import CachedProof, CachedSimulator, bound_accumulators, prove_cached
from qnpu_jax.runtime import litertlm_package
from qnpu_jax.text import excerpts
from qnpu_jax.tflite import (
    FORMS,
    HEXAGON_FORM,
    build_cached,
    build_prefill,
    check_name,
    check_prefill,
)


@dataclass(frozen=True)
class CachedFile:
    """A file with a KV cache that is asked for: signatures `prefill_<N>` and `decode`.

    Attributes:
      prefill: tokens of the long signature.
      context: positions after the prefix, at most.
      form: how the file holds the model.
    """

    prefill: int
    context: int
    form: FormName = "plain"


@dataclass(frozen=True)
class EmulationRequest:
    """Request to compare a model with the emulated NPU.

    Attributes:
      soc: one of `hexagon.SOCS`.
      layers: layers that are compared as a whole, and op by op.
      windows: windows of text that perplexity is measured on; 0 for none.
      tokens: tokens of a window.
      text: held-out text; None takes `pydoc_data.topics`.
      form: of the files of whole layers and of the model; single ops are written as `plain`.
    """

    soc: str
    layers: tuple[int, ...] = (0,)
    windows: int = 3
    tokens: int = 128
    text: Path | None = None
    form: FormName = HEXAGON_FORM


@dataclass(frozen=True)
class EmulatorDifferences:
    """The emulated NPU beside the simulator.

    Attributes:
      ops: every op that computes, of the layers that were asked for.
      layers: these layers as a whole.
      text: perplexity of the whole model; None where no windows were asked for.
    """

    ops: tuple[OpDifference, ...]
    layers: tuple[LayerDifference, ...]
    text: TextDifference | None


def export(
    folder: OutputFolder,
    file: Path,
    prefill: int,
    logits: Positions,
    context: int | None = None,
    form: FormName = "plain",
) -> None:
    """Writes the model of a folder of `qnpu quantize` to `file`, for another length.

    Args:
      prefill: tokens of the prefill.
      logits: positions that the prefill gives logits of.
      context: positions of a KV cache, for a file with `prefill_<N>` and `decode`
        (`cached.build_cached`); None writes one prefill without a cache.
      form: how the file holds the model.

    Raises:
      UserError: `file` exists or is named as a package, the prefill is too short, the model has
        fewer positions, or an accumulator can overflow at this length.
    """
    check_prefill(prefill)
    check_name(file)
    with artifacts.new_file(file) as partial:
        model = folder.model
        held = FORMS[form](model)
        if context is None:
            bound_accumulators(model, prefill, logits)
            build_prefill(model, prefill, logits, held).write(partial)
        else:
            bound_accumulators(model, context, logits)  # as many keys as every signature has
            build_cached(model, prefill, context, logits, held).write(partial)


def package(folder: OutputFolder, path: Path, asked: CachedFile) -> None:
    """Writes the model of a folder of `qnpu quantize` to `path`, as a package for LiteRT-LM.

    Raises:
      UserError: as `export` and `litertlm_package.write_package`.
    """
    check_prefill(asked.prefill)
    litertlm_package.load_builder()  # before the model is read
    with artifacts.new_file(path) as partial:
        bound_accumulators(folder.model, asked.context, "last")
        held = FORMS[asked.form](folder.model)
        litertlm_package.write_package(
            held, folder.tokenizer_folder, partial, asked.prefill, asked.context
        )


def cached_file(folder: OutputFolder, asked: CachedFile) -> Path:
    """Returns the path of a folder's file with a KV cache, which it writes if it is not there yet.

    In form `plain` it is the file that generates text; in form `hexagon` the one that Qualcomm's
    compiler takes.

    Raises:
      UserError: as `export`.
    """
    use = "generate" if asked.form == "plain" else asked.form
    file = folder.deployment(use, asked.prefill, asked.context)
    if not file.exists():
        export(folder, file, asked.prefill, "last", asked.context, asked.form)
    return file


def verify_cached(
    folder: OutputFolder,
    asked: CachedFile,
    text: Path | None,
    simulate: Callable[[IntegerModel, int, int], CachedSimulator],
    clock: Clock,
    kernels: KernelSet = "ref",
) -> CachedProof:
    """Compares the file of `cached_file` with the simulator: every tensor of both signatures while
    text fills the cache.

    Two chunks are fed, with single steps between and after, as far as there is room.

    Args:
      text: held-out text; None takes `pydoc_data.topics`.
      simulate: makes the simulator of a model for a prefill and a context, in the bits of
        `kernels`.
      kernels: LiteRT's.

    Raises:
      UserError: as `cached_file`; the text is too short.
    """
    file = cached_file(folder, asked)
    with clock.stage("load"):
        model = folder.model
        ids = excerpts.tokenized(text, folder.tokenizer, model.config.vocab_size)
        length = min(2 * asked.prefill + 4, asked.context)
        read = ids.first(length, length).windows[0]
        simulator = simulate(model, asked.prefill, asked.context)
    with clock.stage("verify"):
        return prove_cached(file, model, simulator, read, kernels)


def compile_for_hexagon(
    folder: OutputFolder, soc: str, asked: CachedFile, *, share: bool = False
) -> CompiledForHexagon:
    """Compiles the file of `cached_file` for an SoC, beside it; replaces a file compiled before.

    Args:
      soc: one of `hexagon.SOCS`.
      share: one copy of the weights for both signatures (`hexagon.compile_file`).

    Raises:
      UserError: as `cached_file` and `hexagon.compile_file`.
    """
    hexagon.check_soc(soc)  # before anything is written
    hexagon.check_installed()
    source = cached_file(folder, asked)
    target = source.with_name(f"{soc}-{source.name}")
    target.unlink(missing_ok=True)
    return hexagon.compile_file(source, soc, target, share=share)


def check_target(soc: str) -> None:
    """Raises UserError for a name that neither compiler knows."""
    if soc not in (*SOCS, *ACCELERATORS):
        raise UserError(
            f"--soc {soc}: the compiler does not know it; expected a Snapdragon, one of"
            f" {[*SOCS]}, or an Ethos-U, one of {[*ACCELERATORS]}"
        )


def compile_for_arm(
    folder: OutputFolder, accelerator: str, prefill: int, context: int
) -> dict[str, CompiledForArm]:
    """Compiles `prefill_<N>` and `decode` for an Ethos-U, a file each, in the folder.

    Replaces files compiled before. All of the files appear, or none.

    Args:
      accelerator: one of `ethos.ACCELERATORS`.
      prefill, context: as `CachedFile`.

    Returns:
      What was compiled, by the name of the signature.

    Raises:
      UserError: as `export` and `ethos.compile_file`.
    """
    ethos.check_accelerator(accelerator)  # before anything is written
    ethos.check_installed()
    check_prefill(prefill)
    model = folder.model
    bound_accumulators(model, context, "last")
    # Ethos-U65 has neither the products nor the gathers that other spellings need.
    form = ethos_form.arm_form(model, respell=accelerator.startswith("ethos-u85"))
    made, paths = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for key, tokens in ((f"prefill_{prefill}", prefill), ("decode", 1)):
            source = Path(scratch) / f"{key}.tflite"
            ethos_form.build_signature(model, form, tokens, context, key).write(source)
            paths[key] = folder.deployment(accelerator, prefill, context, key)
            target = Path(scratch) / paths[key].name
            made[key] = ethos.compile_file(source, accelerator, target)
            source.unlink()  # as large as the model
        with ExitStack() as files:
            for key, path in paths.items():
                path.unlink(missing_ok=True)
                shutil.copyfile(made[key].path, files.enter_context(artifacts.new_file(path)))
    return {key: replace(found, path=paths[key]) for key, found in made.items()}


def emulate(
    folder: OutputFolder, asked: EmulationRequest, simulate: Simulate, watch: Observer
) -> EmulatorDifferences:
    """Runs the emulated NPU beside the simulator, on held-out text.

    Raises:
      UserError: as `hexagon.compile_file`; a layer that the model does not have; a text too short.
    """
    hexagon.check_soc(asked.soc)
    hexagon.check_installed()
    with watch.stage("load"):
        model = folder.model
        count = model.config.num_layers
        if wrong := [i for i in asked.layers if not 0 <= i < count]:
            raise UserError(f"--layers {wrong[0]}: expected 0 to {count - 1}; choose others")
        ids = excerpts.tokenized(asked.text, folder.tokenizer, model.config.vocab_size)
        read = ids.first(asked.tokens, max(1, asked.windows) * asked.tokens).windows
        emulation = Emulation(model, asked.soc, read, simulate, asked.form)
    ops: list[OpDifference] = []
    layers: list[LayerDifference] = []
    for layer in asked.layers:
        with watch.stage(f"layer {layer}"):
            ops += emulation.ops(layer)
            layers.append(emulation.layer(layer))
    text = None
    if asked.windows:
        with watch.stage("perplexity"):
            text = emulation.text(watch.track)
    return EmulatorDifferences(tuple(ops), tuple(layers), text)
