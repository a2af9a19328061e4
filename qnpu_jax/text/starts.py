"""How sequences of a model begin, read from its tokenizer."""

from __future__ import annotations

from qnpu_jax.models import Tokenizer
from qnpu_jax.transform import Starts

ASKED = [{"role": "user", "content": ""}]
"""A chat whose rendering shows the markers of turns."""


def starts_of(tokenizer: Tokenizer) -> Starts:
    """Reads the model's BOS rule, and collects tokens that may do well as a prefix.

    Those are BOS, the special tokens that the chat template prints, and a newline: what text of
    this model has often met at its start.
    """
    bos = tokenizer.bos_id
    likely = [] if bos is None else [bos]
    if tokenizer.chat_template is not None:
        added = tokenizer.backend.get_added_tokens_decoder()
        likely += [t for t in tokenizer.chat(ASKED, bos=False) if t in added and added[t].special]
    likely += tokenizer.encode("\n")[-1:]
    first = (bos,) if bos is not None and tokenizer.adds_bos else ()
    return Starts(first, tuple(dict.fromkeys(likely)))
