"""The output folder of `qnpu quantize`, as other commands read it."""

from __future__ import annotations

from pathlib import Path

from qnpu_jax import artifacts
from qnpu_jax.models import Tokenizer


def tokenizer(out: Path) -> Tokenizer:
    """That of a folder of `qnpu quantize`.

    Raises:
      UserError: not such a folder, or a file of it changed since.
    """
    artifacts.read_report(out)
    return Tokenizer.load(out / artifacts.TOKENIZER)
