"""Where a quantized model loses precision, tensor by tensor."""

from qnpu_jax.diagnose.run import Diagnosis, DiagnosisRequest, write_diagnosis

__all__ = ["Diagnosis", "DiagnosisRequest", "write_diagnosis"]
