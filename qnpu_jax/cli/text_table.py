"""Tables of `qnpu text`: what each domain has of a corpus, and which windows coverage chose."""

from __future__ import annotations

from collections import Counter

from qnpu_jax.calibrate import Served
from qnpu_jax.cli.tables import show, table
from qnpu_jax.graph import LAYERS
from qnpu_jax.own_text import CHOSEN, Choice
from qnpu_jax.text import corpus

SHOWN = 16
"""Chosen windows that are listed, the first ones; the others have only their place in the curve."""
DOMAINS = 2
"""Of a window that are named."""


def print_shares(found: corpus.Corpus, choice: Choice | None = None) -> None:
    """Prints documents, tokens and what was left out, the largest domain first."""
    columns = ["domain", "documents", "tokens", "share", "distinct", "loops", "repeats"]
    of_chosen = Counter[str]()
    if choice is not None:
        columns.append(CHOSEN)
        of_chosen = sum(choice.domains, of_chosen)
    made = table("written by the model", columns, left=["domain"])
    total = sum(share.tokens for share in found.shares.values())
    by_size = sorted(found.shares.items(), key=lambda pair: -pair[1].tokens)
    for domain, share in by_size:
        chosen = [f"{100 * of_chosen[domain] / of_chosen.total():.1f}%"] if of_chosen else []
        made.add_row(
            domain,
            f"{share.documents:,}",
            f"{share.tokens:,}",
            f"{100 * share.tokens / total:.1f}%",
            f"{100 * share.distinct:.0f}%",
            f"{share.loops:,}",
            f"{share.repeats:,}",
            *chosen,
        )
    made.caption = (
        f"distinct: pieces of {corpus.GRAM} tokens that stand once; loops, repeats: left out"
    )
    if of_chosen:
        made.caption += "; chosen: share of the chosen windows' tokens"
    show(made)


def print_choice(choice: Choice) -> None:
    """Prints the curve of coverage, and what each of the first windows serves."""
    curve = table("coverage of activation peaks", ("windows", "chosen", "first"))
    count = len(choice.coverage.curve)
    for k in [*(2**i for i in range(count.bit_length()) if 2**i < count), count]:
        values = (choice.coverage.curve[k - 1], choice.first[k - 1])
        curve.add_row(f"{k:,}", *(f"{100 * value:.1f}%" for value in values))
    columns = ("window", "coverage", "domains", "serves most")
    made = table("chosen windows", columns, left=columns[2:])
    rows = zip(
        choice.coverage.windows,
        choice.coverage.curve,
        choice.domains,
        choice.coverage.serves,
        strict=True,
    )
    for window, reached, domains, serves in list(rows)[:SHOWN]:
        named = ", ".join(domain for domain, _ in domains.most_common(DOMAINS))
        made.add_row(f"{window:,}", f"{100 * reached:.1f}%", named, ", ".join(map(_named, serves)))
    more = f"and {count - SHOWN:,} more; " if count > SHOWN else ""
    made.caption = (
        f"{more}coverage: mean over tensors of the largest |x| that these windows show, in units of"
        f" the largest of all {choice.pool:,} windows of {choice.length} tokens"
    )
    show(curve, made)


def _named(served: Served) -> str:
    """`layers.3.attn.q` of layer 3."""
    return served.tensor.replace(LAYERS, f"{LAYERS}{served.layer}.", 1)
