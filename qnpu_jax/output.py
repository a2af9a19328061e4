"""The output folder of `qnpu quantize`, read back by the commands that deploy, prove, diagnose."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qnpu_jax import artifacts
from qnpu_jax.errors import UserError
from qnpu_jax.integer import IntegerModel, storage
from qnpu_jax.models import Tokenizer
from qnpu_jax.recipes import Recipe

_AGAIN = "run `qnpu quantize` again"


@dataclass(frozen=True)
class OutputFolder:
    """An output folder of `qnpu quantize` whose files are those that its report speaks of.

    Make one with `OutputFolder.open`. The model and the tokenizer are read when they are first
    asked for, and once.

    Attributes:
      path: where it is.
      report: the content of report.json.
    """

    path: Path
    report: dict[str, Any] = field(repr=False, compare=False)  # hundreds of lines

    @staticmethod
    def open(path: str | Path) -> OutputFolder:
        """Reads report.json and compares the SHA-256 of every file with it.

        Raises:
          UserError: no such folder, a damaged report or one of another format version, or a file
            that was changed or cut short since.
        """
        path = Path(path)
        report = _read_report(path / artifacts.REPORT)
        artifacts.check_files(path, report["sha256"], f"by {artifacts.REPORT}", _AGAIN)
        return OutputFolder(path, report)

    @cached_property
    def model(self) -> IntegerModel:
        """The integers of the model.

        Raises:
          UserError: as `storage.load`; a folder of an older version of qnpu holds them in another
            form.
        """
        return storage.load(self.path)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the model was made by.

        Raises:
          UserError: recipe.json is missing or damaged.
        """
        return Recipe.from_json(self._made_by["recipe"], str(self.path / artifacts.RECIPE))

    @property
    def original_sha256(self) -> str | None:
        """SHA-256 of the float model's weights; None where the folder does not say."""
        model = self._made_by.get("inputs", {}).get("model", {})
        return model.get("sha256")

    @cached_property
    def _made_by(self) -> dict[str, Any]:
        """The content of recipe.json."""
        path = self.path / artifacts.RECIPE
        try:
            data = artifacts.parse_json(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {_AGAIN}") from None
        if not isinstance(data, dict) or not isinstance(data.get("recipe"), dict):
            raise UserError(f"{path}: damaged; expected an object with a recipe; {_AGAIN}")
        return data

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with its chat template."""
        return Tokenizer.load(self.tokenizer_folder)

    @property
    def prefix(self) -> tuple[int, ...]:
        """Token ids of the prefix, whose keys and values are constants of the model."""
        return tuple((self.report.get("prefix") or {}).get("tokens", ()))

    @property
    def tokenizer_folder(self) -> Path:
        """Where `Tokenizer.save` wrote the tokenizer."""
        return self.path / artifacts.TOKENIZER

    @property
    def tflite(self) -> Path:
        """The integer-only .tflite file."""
        return self.path / artifacts.MODEL

    @property
    def sha256(self) -> str:
        """SHA-256 of the .tflite file, hexadecimal."""
        return self.report["sha256"][artifacts.MODEL]

    def deployment(self, use: str, prefill: int, context: int, signature: str = "") -> Path:
        """Place in this folder of a file made of its model; arguments as `artifacts.deployment`."""
        return self.path / artifacts.deployment(use, self.sha256, prefill, context, signature)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = artifacts.parse_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: missing; expected an output folder of `qnpu quantize`; run it first"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected JSON; {_AGAIN}") from None
    if not isinstance(report, dict) or report.get("format") != artifacts.FORMAT:
        got = report.get("format") if isinstance(report, dict) else type(report).__name__
        raise UserError(
            f"{path}: format {got}; expected {artifacts.FORMAT}; {_AGAIN}, with this version"
        )
    hashes = report.get("sha256")
    if not isinstance(hashes, dict) or artifacts.MODEL not in hashes:
        raise UserError(
            f"{path}: no hash of {artifacts.MODEL}; expected those of all files; {_AGAIN}"
        )
    return report
