"""Text to windows of token ids: read from files, or written by the model itself."""

from qnpu_jax.text.excerpts import Excerpt, Texts
from qnpu_jax.text.mixing import check_share, mixed
from qnpu_jax.text.starts import starts_of
from qnpu_jax.text.windows import Windows, token_ids

__all__ = ["Excerpt", "Texts", "Windows", "check_share", "mixed", "starts_of", "token_ids"]
