"""Where a quantized model loses precision, tensor by tensor."""

from qnpu_jax.diagnose.run import Diagnosis

__all__ = ["Diagnosis"]
