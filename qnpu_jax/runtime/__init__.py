"""Who drives an exported model: sessions over a KV cache, sampling, packages for LiteRT-LM."""

from qnpu_jax.runtime.generation import Speed, generate_ids, prompt_ids, text_pieces
from qnpu_jax.runtime.litert_backend import LiteRTBackend
from qnpu_jax.runtime.sampling import Sampling
from qnpu_jax.runtime.session import Backend, Session, Shape, check_room
from qnpu_jax.runtime.simulator_backend import ROUNDING, SimulatedBackend

__all__ = [
    "ROUNDING",
    "Backend",
    "LiteRTBackend",
    "Sampling",
    "Session",
    "Shape",
    "SimulatedBackend",
    "Speed",
    "check_room",
    "generate_ids",
    "prompt_ids",
    "text_pieces",
]
