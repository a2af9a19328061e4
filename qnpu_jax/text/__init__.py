"""Text to windows of token ids."""

from qnpu_jax.text.excerpts import Excerpt, Texts
from qnpu_jax.text.windows import Text

__all__ = ["Excerpt", "Text", "Texts"]
