"""The .tflite file: written, and run by LiteRT."""

from qnpu_jax.tflite.cached import add_cached, at_positions, build_cached, cached_decoder
from qnpu_jax.tflite.emitter import Emitter, emit
from qnpu_jax.tflite.flatbuffer import ModelWriter, SubgraphWriter
from qnpu_jax.tflite.forms import Composite, FileForm, Integers, Reals, Unpacked
from qnpu_jax.tflite.interpreter import LiteRT, open_interpreter
from qnpu_jax.tflite.named_forms import FORMS, HEXAGON_FORM
from qnpu_jax.tflite.op_versions import DType
from qnpu_jax.tflite.operators import add_op
from qnpu_jax.tflite.packing import TensorType
from qnpu_jax.tflite.square_sums import are_squares
from qnpu_jax.tflite.writer import build_prefill, check_name, check_prefill, write_prefill

__all__ = [
    "FORMS",
    "HEXAGON_FORM",
    "Composite",
    "DType",
    "Emitter",
    "FileForm",
    "Integers",
    "LiteRT",
    "ModelWriter",
    "Reals",
    "SubgraphWriter",
    "TensorType",
    "Unpacked",
    "add_cached",
    "add_op",
    "are_squares",
    "at_positions",
    "build_cached",
    "build_prefill",
    "cached_decoder",
    "check_name",
    "check_prefill",
    "emit",
    "open_interpreter",
    "write_prefill",
]
