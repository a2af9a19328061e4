"""Generated text, printed token by token."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from qnpu_jax.models import Tokenizer
from qnpu_jax.runtime import Backend, Sampling, Session, Speed, generate_ids, text_pieces


def stream(
    runner: Backend,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    limit: int,
    *,
    raw: bool,
) -> None:
    """Prints up to `limit` new tokens on stdout as they come, then on stderr how fast they came.

    Args:
      raw: the new text goes on with that of `ids`, and answers nothing.
    """
    speed = Speed()
    made = generate_ids(Session(runner), ids, sampling, limit, tokenizer.eos_ids, speed)
    for piece in text_pieces(made, tokenizer, ids if raw else ()):
        typer.echo(piece, nl=False)
    typer.echo()
    typer.echo(str(speed), err=True)
