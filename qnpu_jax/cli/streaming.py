"""Generated text, printed token by token."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from qnpu_jax.models import Tokenizer
from qnpu_jax.runtime import Backend, Sampling, Session, Speed, generate_ids, text_pieces


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, raw: bool) -> list[int]:
    """Token ids of a user's turn in the model's chat template, or, with `raw`, of the text
    itself."""
    if raw:
        return tokenizer.encode(prompt)
    return tokenizer.chat([{"role": "user", "content": prompt}], bos=False)


def stream(
    runner: Backend, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling, limit: int
) -> None:
    """Prints up to `limit` new tokens on stdout as they come, then on stderr how fast they came."""
    speed = Speed()
    made = generate_ids(Session(runner), ids, sampling, limit, tokenizer.eos_ids, speed)
    for piece in text_pieces(made, tokenizer):
        typer.echo(piece, nl=False)
    typer.echo()
    typer.echo(str(speed), err=True)
