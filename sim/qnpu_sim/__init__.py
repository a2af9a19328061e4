"""Bit-exact simulator of integer decoder models, jitted by JAX.

    from qnpu_sim import compile_model, run
    program = compile_model(model, model.decoder(tokens=128), "litert_ref")
    codes = run(program, ids, keep="layers.0.attn.*")

It imports op types, graphs and frozen integers, never the float side: rounding code shared with the
float side would hide a mistake that both make.
"""

from qnpu_sim.observe import observed_accumulators, observed_ranges
from qnpu_sim.program import Program, compile_model, run
from qnpu_sim.rounding import Npu, Profile, ProfileName

__all__ = [
    "Npu",
    "Profile",
    "ProfileName",
    "Program",
    "compile_model",
    "observed_accumulators",
    "observed_ranges",
    "run",
]
