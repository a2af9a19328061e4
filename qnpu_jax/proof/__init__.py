"""Proof that file and simulator agree, and that no accumulator can overflow."""

from qnpu_jax.proof.cached import CachedProof, CachedSimulator, prove_cached
from qnpu_jax.proof.comparison import Comparison
from qnpu_jax.proof.prefill import PrefillProof, bound_accumulators, prove_prefill
from qnpu_jax.proof.simulated import Simulated, observe_accumulators
from qnpu_jax.proof.verified import verify_file
from qnpu_jax.proof.widths import WIDTHS, AccumulatorRow, Widths

__all__ = [
    "WIDTHS",
    "AccumulatorRow",
    "CachedProof",
    "CachedSimulator",
    "Comparison",
    "PrefillProof",
    "Simulated",
    "Widths",
    "bound_accumulators",
    "observe_accumulators",
    "prove_cached",
    "prove_prefill",
    "verify_file",
]
