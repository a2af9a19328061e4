"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qnpu_jax.choices import FormName, KernelSet, Positions
from qnpu_jax.errors import UserError

Model = Annotated[
    str, typer.Argument(help="smollm2-135m, a .gguf file, a Hugging Face folder, or org/name.")
]
Folder = Annotated[Path, typer.Argument(help="Output folder of `qnpu quantize`.")]
RecipeName = Annotated[
    str,
    typer.Option(
        help="w8a8, w4a8, w8a16 or w4a16, w8a8 or w4a8 followed by s8 or i8, one of these after a"
        " method (quarot-w4a8), or a JSON file (see `qnpu recipe`)."
    ),
]
Prefill = Annotated[
    int, typer.Option(help="Tokens that the signature takes; multiples of 64 are fastest.")
]
Context = Annotated[int, typer.Option(help="Positions of the KV cache.")]
Logits = Annotated[Positions, typer.Option(help="Positions to give logits of.")]
Kernels = Annotated[
    KernelSet,
    typer.Option(
        help="LiteRT's: ref (reference), opt (optimized), or xnn (XNNPACK); or tf (TensorFlow's"
        " interpreter, extra: tensorflow)."
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Of LiteRT.")]
Profile = Annotated[
    FormName,
    typer.Option(
        help="plain: 4-bit weights two to a byte; unpacked: one to a byte in prefill, which is"
        " faster on CPUs with AMX; hexagon: norms as the NPU's own op."
    ),
]
EvalText = Annotated[
    Path | None, typer.Option(help="Held-out text or JSONL; without it, Python's documentation.")
]


def check_unused(name: str, value: object, default: object, by: str) -> None:
    """Raises UserError where an option is given that nothing would read."""
    if value != default:
        raise UserError(f"--{name} {value}: not for {by}; expected none; leave it out")
