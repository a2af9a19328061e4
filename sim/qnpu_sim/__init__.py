"""A bit-exact, jitted simulator of integer decoder models.

    from qnpu_sim import compile_model, run
    program = compile_model(model, model.decoder(tokens=128), "litert_ref")
    codes = run(program, ids, keep=lambda name: name.startswith("layers.0."))

It sees op types, graphs and frozen integers, never the float definitions: shared rounding code
would hide shared mistakes.
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
