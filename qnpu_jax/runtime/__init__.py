"""Who drives an exported model: sessions over a KV cache, sampling, packages for LiteRT-LM."""

from qnpu_jax.runtime.litert_backend import LiteRTBackend
from qnpu_jax.runtime.sampling import Sampling
from qnpu_jax.runtime.session import Backend, Session, Shape, Step, check_room
from qnpu_jax.runtime.simulator_backend import PROFILES, SimulatedBackend

__all__ = [
    "PROFILES",
    "Backend",
    "LiteRTBackend",
    "Sampling",
    "Session",
    "Shape",
    "SimulatedBackend",
    "Step",
    "check_room",
]
