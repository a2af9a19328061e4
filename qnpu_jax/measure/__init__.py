"""How good a reading of the model is: perplexity, divergence, zero-shot tasks."""

from qnpu_jax.measure.perplexity import Logits, float_logits, kl_terms, mean_kl

__all__ = ["Logits", "float_logits", "kl_terms", "mean_kl"]
