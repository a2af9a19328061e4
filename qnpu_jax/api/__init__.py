"""The functions of the library: what `import qnpu_jax as qnpu` gives.

Each checks what the caller passes, and calls the folder that does the work.
"""

from qnpu_jax.api.making import quantize, write_tflite
from qnpu_jax.api.measuring import divergence, perplexity
from qnpu_jax.api.running import generate, simulate, verify

__all__ = [
    "divergence",
    "generate",
    "perplexity",
    "quantize",
    "simulate",
    "verify",
    "write_tflite",
]
