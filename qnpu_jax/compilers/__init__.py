"""NPU vendors' compilers and emulators, driven on this machine."""

from qnpu_jax.compilers.emulation import Emulation
from qnpu_jax.compilers.emulator_differences import LayerDifference, OpDifference
from qnpu_jax.compilers.hexagon import SOCS, Compiled

__all__ = ["SOCS", "Compiled", "Emulation", "LayerDifference", "OpDifference"]
