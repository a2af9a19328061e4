"""NPU vendors' compilers and emulators, driven on this machine."""

from qnpu_jax.compilers.emulation import Emulation
from qnpu_jax.compilers.emulator_differences import LayerDifference, OpDifference, TextDifference
from qnpu_jax.compilers.ethos import ACCELERATORS, CompiledForArm
from qnpu_jax.compilers.hexagon import SOCS, CompiledForHexagon

__all__ = [
    "ACCELERATORS",
    "SOCS",
    "CompiledForArm",
    "CompiledForHexagon",
    "Emulation",
    "LayerDifference",
    "OpDifference",
    "TextDifference",
]
