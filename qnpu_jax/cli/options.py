"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="Output folder of `qnpu quantize`.")]
Prefill = Annotated[int, typer.Option(help="Tokens that the signature takes.")]
Context = Annotated[int, typer.Option(help="Positions of the KV cache.")]
Threads = Annotated[int, typer.Option(min=1, help="Of LiteRT.")]
EvalText = Annotated[
    Path | None, typer.Option(help="Held-out text or JSONL; without it, Python's documentation.")
]
