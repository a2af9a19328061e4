"""The .tflite file: written, and run by LiteRT."""

from qnpu_jax.tflite.cached import add_cached, at_positions, cached_decoder
from qnpu_jax.tflite.emitter import Emitter, emit
from qnpu_jax.tflite.export_profiles import DEFAULT, PROFILES, ProfileName
from qnpu_jax.tflite.flatbuffer import ModelWriter, SubgraphWriter
from qnpu_jax.tflite.forms import Composite, Integers, Reals, Stored, Unpacked
from qnpu_jax.tflite.interpreter import KernelSet, LiteRT, open_interpreter
from qnpu_jax.tflite.operators import add_op
from qnpu_jax.tflite.square_sums import are_squares
from qnpu_jax.tflite.writer import build, check_prefill

__all__ = [
    "DEFAULT",
    "PROFILES",
    "Composite",
    "Emitter",
    "Integers",
    "KernelSet",
    "LiteRT",
    "ModelWriter",
    "ProfileName",
    "Reals",
    "Stored",
    "SubgraphWriter",
    "Unpacked",
    "add_cached",
    "add_op",
    "are_squares",
    "at_positions",
    "build",
    "cached_decoder",
    "check_prefill",
    "emit",
    "open_interpreter",
]
