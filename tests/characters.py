"""A tokenizer of characters, for tests of the text that a model writes."""

import tokenizers

from qnpu_jax.models.tokenizer import Tokenizer

EOS, BOS = 94, 95
TEMPLATE = "{{ bos_token }}U:{{ messages[0].content }}A:"


def characters(bos: bool, template: str | None) -> Tokenizer:
    """Printable ASCII, one token a character, "~" being EOS; and BOS."""
    vocab = {chr(32 + i): i for i in range(95)} | {"<s>": BOS}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.add_special_tokens(["<s>"])
    backend.decoder = tokenizers.decoders.Fuse()  # no spaces between tokens
    ids = [BOS if bos else None]
    return Tokenizer.build(backend, ids, [EOS], template, "characters", adds_bos=bos)
