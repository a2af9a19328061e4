"""Checkpoints on disk, by orbax: a run killed at any step and started again goes on from the last.

    <folder>/run.json             inputs of the run; `check_checkpoints` compares every entry
    <folder>/stage0/<step>/       the state of stage 0 after a step, written by orbax
    <folder>/stage0-<step>.json   losses, and a SHA-256 of each of orbax's files; written last

The last two states of a stage are kept. Orbax commits a state whole or not at all, but reads
flipped bits as other numbers, and cuts arrays of another shape to the one asked for: the hashes
and `_restore_leaf` turn both into errors.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.learn.train import History, Progress, TrainState

FORMAT = 3
RUN = "run.json"
PACKAGES = ("qnpu", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")
"""Another version of any of these may compute, or store, something else."""
LONGEST_VALUE = 40
"""Characters of a value in a message."""


def check_checkpoints(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Checks that a folder can hold the checkpoints of this run.

    Args:
      folder: new, empty, or of an earlier run with the same inputs.
      inputs: everything that decides the result, as JSON; entries that are not known yet are left
        out.

    Raises:
      UserError: it is a file, it holds something else, or it is of another run.
    """
    with artifacts.system_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; expected a folder; choose another --checkpoints")
        if not folder.is_dir() or not {p.name for p in folder.iterdir()} - {_partial(RUN)}:
            return
    if not (folder / RUN).is_file():
        raise UserError(
            f"{folder}: holds no {RUN}, so it is not ours to write to; expected a new or empty"
            " folder, or one of an earlier run; choose another --checkpoints"
        )
    held = _flat(_read(folder / RUN))
    for name, expected in _flat(_described(inputs)).items():
        if (got := held.pop(name, None)) != expected:
            raise _another_run(folder, name, expected, got)
    given = tuple(_described(inputs))
    for name, got in held.items():  # what is left: a stage more than ours is a difference too
        if re.split(r"[.[]", name)[0] in given:
            raise _another_run(folder, name, None, got)


def _described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs, with versions and device: what `run.json` holds."""
    versions = {name: artifacts.version(name) for name in PACKAGES}
    device = jax.devices()[0].device_kind
    return {"format": FORMAT, "versions": versions, "device": device, **inputs}


def _another_run(folder: Path, name: str, expected: Any, got: Any) -> UserError:
    def short(value: Any) -> str:
        text = "nothing" if value is None else str(value)
        return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."

    return UserError(
        f"{folder}: checkpoints of another run: {name}: expected {short(expected)}, got"
        f" {short(got)}; give what that run was given to go on with it, or remove the folder, or"
        " choose another --checkpoints"
    )


def last_checkpoint(folder: Path) -> tuple[int, int] | None:
    """Returns stage (from 0) and step of the last checkpoint; None where there is none."""
    return max(_records(folder).values(), default=None)


def _records(folder: Path) -> dict[Path, tuple[int, int]]:
    """Records in a folder, and the stage and step of each."""
    names = {p: re.fullmatch(r"stage(\d+)-(\d+)\.json", p.name) for p in folder.glob("stage*")}
    return {path: (int(found[1]), int(found[2])) for path, found in names.items() if found}


class Checkpoints:
    """A folder of checkpoints: a `stages.Store`."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        """Makes the folder, or opens it where it is of the same run.

        Args:
          inputs: everything that decides the result, as JSON.

        Raises:
          UserError: as `check_checkpoints`, or the folder cannot be written.
        """
        check_checkpoints(folder, inputs)
        self.folder = folder
        with artifacts.system_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / RUN).exists():
                _write(folder / RUN, _described(inputs))

    def load(self, stage: int, like: TrainState) -> Progress | None:
        """Reads the last state saved of a stage; None where there is none.

        Args:
          stage: its number, from 0.
          like: a state of equal structure, whose dtypes and kinds of array the result takes.

        Raises:
          UserError: it is damaged, or of another shape.
        """
        step = max(self._steps(stage), default=None)
        if step is None:
            return None
        path, record = self._place(stage, step)
        kept = _read(record)
        history = _history(kept)
        if history is None or "sha256" not in kept:
            raise UserError(f"{record}: incomplete or damaged; {_way_out(record)}")
        artifacts.check_files(path, kept["sha256"], f"by {record.name}", _way_out(record))
        self._clean(stage)
        stored = _read_arrays(path)
        return Progress(_restore(path, stored, like), history)

    def save(self, stage: int, state: TrainState, history: History) -> None:
        """Writes a state; until it is whole on disk, the one before counts.

        Args:
          stage: its number, from 0.

        Raises:
          UserError: it cannot be written.
        """
        with artifacts.system_errors(self.folder):
            for old in sorted(self._steps(stage))[:-1]:
                self._place(stage, old)[1].unlink()
        self._clean(stage)
        path, record = self._place(stage, int(state.step))
        _write_arrays(path, {name: np.asarray(x) for name, x in _leaves(state)})
        with artifacts.system_errors(path):
            sums = {"sha256": artifacts.digests(path)}
            _write(record, dataclasses.asdict(history) | sums)

    def _steps(self, stage: int) -> list[int]:
        return [step for at, step in _records(self.folder).values() if at == stage]

    def _place(self, stage: int, step: int) -> tuple[Path, Path]:
        """The folder of a state, and its record."""
        return self.folder / f"stage{stage}" / str(step), self.folder / f"stage{stage}-{step}.json"

    def _clean(self, stage: int) -> None:
        """Removes states without a record: a killed run left them half written or half removed."""
        kept = {str(step) for step in self._steps(stage)}
        with artifacts.system_errors(self.folder):
            for path in (self.folder / f"stage{stage}").glob("*"):
                if path.name not in kept:
                    shutil.rmtree(path)

    def forget(self, stage: int) -> None:
        """Removes the states of a stage.

        Args:
          stage: its number, from 0.
        """
        with artifacts.system_errors(self.folder):
            for step in self._steps(stage):
                self._place(stage, step)[1].unlink()
        self._clean(stage)

    def remove(self) -> None:
        """Removes the checkpoints, and the folder unless somebody keeps something else in it."""
        with artifacts.system_errors(self.folder):
            for file in _records(self.folder):  # first: without its record, a state does not count
                file.unlink()
            for stage in self.folder.glob("stage*"):
                if re.fullmatch(r"stage\d+", stage.name):
                    shutil.rmtree(stage)
            (self.folder / RUN).unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


def _read_arrays(path: Path) -> Mapping[str, Any]:
    """Arrays by name, of the folder of a state."""
    import orbax.checkpoint as ocp  # takes a second, and most runs keep no checkpoint

    with _orbax_errors(path), _manager(path.parent) as manager:
        return manager.restore(int(path.name), args=ocp.args.PyTreeRestore())


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the folder of a state."""
    import orbax.checkpoint as ocp

    with _orbax_errors(path), _manager(path.parent) as manager:
        manager.save(int(path.name), args=ocp.args.PyTreeSave(arrays))


def _manager(folder: Path) -> Any:
    """orbax's manager of the states of a stage."""
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        folder.absolute(),
        # Weights are noise to a compressor: a sixth smaller, in seven times the time.
        item_handlers=ocp.PyTreeCheckpointHandler(use_compression=False),
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    )


@contextmanager
def _orbax_errors(path: Path) -> Iterator[None]:
    """Turns any error of orbax about a folder into a UserError."""
    try:
        yield
    except Exception as error:  # it documents none: ValueError, KeyError, OSError and others come
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: orbax cannot read or write it ({type(error).__name__}: {what}); expected a"
            " checkpoint and room on the disk; check the disk, or remove the folder that it is in"
            " to learn afresh"
        ) from None


def _way_out(file: Path) -> str:
    """Advice for a damaged file. Without its record, the checkpoint before it counts."""
    before = "" if file.name == RUN else f"remove {file} to go on from the checkpoint before, or "
    return f"{before}remove {file.parent} to learn afresh"


def _leaves(state: TrainState) -> list[tuple[str, Any]]:
    """Arrays by path, as in ".theta['scale/embed.residual']"."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    return [("".join(map(_entry, path)), x) for path, x in paths]


def _entry(entry: Any) -> str:
    """One entry of a path. A key of a dict is named as in messages, whatever its type."""
    return f"[{str(entry.key)!r}]" if isinstance(entry, jax.tree_util.DictKey) else str(entry)


def _restore(path: Path, stored: Mapping[str, Any], like: TrainState) -> TrainState:
    """Replaces the values of `like` by the stored ones."""
    names = [name for name, _ in _leaves(like)]
    if odd := set(names) ^ set(stored):
        raise UserError(
            f"{path}: array {min(odd)} is {'missing' if min(odd) in names else 'unknown'}; expected"
            " the arrays of this stage; remove the folder that it is in to learn afresh"
        )
    leaves = [_restore_leaf(path, name, stored[name], x) for name, x in _leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _restore_leaf(path: Path, name: str, stored: Any, like: Any) -> Any:
    """Checks one array, and makes it of the kind of `like`, as the compiled step takes it."""
    found = np.asarray(stored)
    if (found.shape, found.dtype) != (np.shape(like), like.dtype):
        raise UserError(
            f"{path}: {name}: expected {like.dtype}{list(np.shape(like))}, got"
            f" {found.dtype}{list(found.shape)}; remove the folder that it is in to learn afresh"
        )
    if isinstance(like, jax.Array):
        return jnp.array(found)  # a copy: the step donates it
    return np.array(found) if isinstance(like, np.ndarray) else found.dtype.type(found)


def _partial(name: str) -> str:
    return f".{name}.partial"


def _write(path: Path, data: Any) -> None:
    """Writes JSON that appears whole or not at all."""
    partial = path.with_name(_partial(path.name))
    artifacts.write_json(partial, data)
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = artifacts.parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected JSON; {_way_out(path)}"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {type(data).__name__}; {_way_out(path)}"
        )
    return data


def _history(kept: Mapping[str, Any]) -> History | None:
    """The record of a stage; None where it is none, or parts of it are missing."""
    try:
        held_out = [(int(step), float(kl)) for step, kl in kept["held_out"]]
        domains = {name: [float(kl) for kl in kls] for name, kls in kept["domains"].items()}
        loss = [float(x) for x in kept["loss"]]
        retreats = int(kept["retreats"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    whole = bool(domains) == bool(held_out)  # neither at the first step of a stage begun anew
    whole = whole and all(len(kls) == len(held_out) for kls in domains.values())
    return History(loss, held_out, domains, retreats) if whole else None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of JSON by path, as in `recipe.stages[0].share`."""
    if isinstance(value, Mapping):
        parts = {f"{name}.{k}" if name else str(k): v for k, v in value.items()}
    elif isinstance(value, list | tuple):
        parts = {f"{name}[{i}]": v for i, v in enumerate(value)}
    else:
        return {name: value}
    return {k: v for part, x in parts.items() for k, v in _flat(x, part).items()}
