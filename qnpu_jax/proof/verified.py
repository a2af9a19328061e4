"""Comparison of a .tflite with the simulator, whether it has one prefill or a KV cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int32

from qnpu_jax.choices import KernelSet
from qnpu_jax.errors import UserError
from qnpu_jax.integer import IntegerModel
from qnpu_jax.proof.cached import prove_cached
from qnpu_jax.proof.comparison import Comparison, compare_tensors, op_names
from qnpu_jax.proof.simulated import Simulated
from qnpu_jax.runtime import LiteRTBackend, SimulatedBackend
from qnpu_jax.tflite import LiteRT, open_interpreter


def verify_file(
    path: Path, model: IntegerModel, ids: Int32[np.ndarray, " t"], kernels: KernelSet
) -> Comparison:
    """Compares every tensor that LiteRT computes with the simulator's.

    A file with one prefill of N tokens runs the first N ids. A file with a KV cache is fed two
    chunks of N and four single tokens, as far as ids and context reach.

    Args:
      path: file written of the model.
      ids: token ids of some text.
      kernels: kernels of LiteRT, whose rounding the simulator takes on.

    Raises:
      UserError: no such file, a file of another model, or too few ids to run every signature.
    """
    if "decode" in open_interpreter(path, kernels).get_signature_list():
        backend = LiteRTBackend(path, kernels)
        shape, logits = backend.shape, backend.logits
        _check_length(ids, shape.prefill + 1, path)
        simulator = SimulatedBackend(model, shape.prefill, shape.context, logits, kernels)
        length = min(len(ids), 2 * shape.prefill + 4, shape.context)
        return prove_cached(path, model, simulator, ids[:length], kernels, logits).comparison
    runner = LiteRT(path, kernels, keep_tensors=True)
    _check_length(ids, runner.tokens, path)
    ids = ids[: runner.tokens]
    runner.run(ids)
    simulator = Simulated(model, runner.tokens, runner.logits, kernels)
    ops = op_names(model.decoder(runner.tokens, logits=runner.logits))
    return compare_tensors(runner.tensors(), simulator.tensors(ids), ops)


def _check_length(ids: np.ndarray, least: int, path: Path) -> None:
    if len(ids) < least:
        raise UserError(
            f"ids: {len(ids)} are too few for {path}; expected at least {least}; give a longer text"
        )
