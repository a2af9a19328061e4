"""Table of `qnpu text`: what each domain has of a corpus."""

from __future__ import annotations

from qnpu_jax.cli.tables import show, table
from qnpu_jax.text import corpus


def print_shares(found: corpus.Corpus) -> None:
    """Prints documents, tokens and what was left out, the largest domain first."""
    columns = ("domain", "documents", "tokens", "share", "distinct", "loops", "repeats")
    made = table("written by the model", columns, left=["domain"])
    total = sum(share.tokens for share in found.shares.values())
    by_size = sorted(found.shares.items(), key=lambda pair: -pair[1].tokens)
    for domain, share in by_size:
        made.add_row(
            domain,
            f"{share.documents:,}",
            f"{share.tokens:,}",
            f"{100 * share.tokens / total:.1f}%",
            f"{100 * share.distinct:.0f}%",
            f"{share.loops:,}",
            f"{share.repeats:,}",
        )
    made.caption = (
        f"distinct: pieces of {corpus.GRAM} tokens that stand once; loops, repeats: left out"
    )
    show(made)
