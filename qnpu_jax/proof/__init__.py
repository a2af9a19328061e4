"""Proof that file and simulator agree, and that no accumulator can overflow."""

from qnpu_jax.proof.cached import CachedSimulator, prove_cached
from qnpu_jax.proof.comparison import Comparison, Difference, compare, op_names
from qnpu_jax.proof.prefill import bound, prove_prefill
from qnpu_jax.proof.simulated import Simulated, observed
from qnpu_jax.proof.verified import verified
from qnpu_jax.proof.widths import WIDTHS, Row, Widths

__all__ = [
    "WIDTHS",
    "CachedSimulator",
    "Comparison",
    "Difference",
    "Row",
    "Simulated",
    "Widths",
    "bound",
    "compare",
    "observed",
    "op_names",
    "prove_cached",
    "prove_prefill",
    "verified",
]
