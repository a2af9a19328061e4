"""Cache of the float teacher's likeliest tokens, in host memory.

The teacher never learns, so its output for a window is the same at every step that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Params
from qnpu_jax.learn.losses import TopK, teacher_top_k
from qnpu_jax.learn.train import (
    TeacherCache,
    TrainSettings,
    batches,
    jit_for_stage,
    matmul_precision,
    uncached,
)

BYTES_PER_TOKEN = 8
"""Bytes of one likely token: its log-probability in float32 and its id in int32."""


@dataclass(frozen=True)
class CachedTopK:
    """The teacher's K likeliest tokens, for some of the learning windows: a `TeacherCache`.

    Attributes:
      windows: indices of the windows, ascending.
      log_p: log-probabilities (nats), the largest first.
      ids: token ids.
    """

    windows: Int[np.ndarray, " n"]
    log_p: Float[np.ndarray, "n t k"]
    ids: Int[np.ndarray, "n t k"]

    def __call__(self, rows: Int[np.ndarray, " b"]) -> TopK:
        """Returns those of a batch (B, T, K), on the device.

        Args:
          rows: indices of windows, each one of `windows`.
        """
        at = np.searchsorted(self.windows, rows)
        return TopK(jnp.asarray(self.log_p[at]), jnp.asarray(self.ids[at]))


def check_teacher_bytes(
    settings: TrainSettings, windows: Int[np.ndarray, "n t"]
) -> Int[np.ndarray, " m"]:
    """Checks that the cache of a stage fits, and returns the windows that it will hold.

    Returns:
      Indices of the windows that some step reads, ascending; none where the stage reads no top-k,
      where it reads more of the teacher, or where `effort.teacher_bytes` is 0.

    Raises:
      UserError: 8 bytes x windows x length x k are more than `effort.teacher_bytes`.
    """
    stage, effort, steps = settings.stage, settings.effort, settings.steps
    reads = stage.loss == "kl" and stage.top_k > 0 and not stage.hidden_mse
    if not (reads and effort.teacher_bytes and steps and len(windows)):
        return np.zeros(0, np.int64)
    # From the first step on also where a run resumes: the batches in which they are computed, and
    # so their last bits, must not depend on when it was killed.
    rows = np.unique(list(islice(batches(len(windows), effort.batch, settings.seed, 0), steps)))
    length, k = windows.shape[1], _cached_per_position(settings)
    needed = BYTES_PER_TOKEN * len(rows) * length * k
    if needed > effort.teacher_bytes:
        raise UserError(
            f"effort {effort.name}: the teacher's likeliest tokens ({len(rows)} windows x {length}"
            f" tokens x top {k}) take {needed:,} bytes; expected at most teacher_bytes ="
            f" {effort.teacher_bytes:,}; learn from fewer tokens, lower the stage's top_k, raise"
            " teacher_bytes, or set it to 0 to recompute them"
        )
    return rows


def cache_teacher(
    settings: TrainSettings, teacher: Params, windows: Int[np.ndarray, "n t"]
) -> TeacherCache:
    """Computes the teacher's likeliest tokens for every window of `check_teacher_bytes`.

    Args:
      teacher: float parameters by global name, prefix K/V included.
      windows: token ids to learn from.

    Returns:
      From indices of windows to a `TopK` (B, T, K); `uncached` where nothing is stored.

    Raises:
      UserError: as `check_teacher_bytes`, before anything is computed.
    """
    dec, stage, effort = settings.dec, settings.stage, settings.effort
    rows = check_teacher_bytes(settings, windows)
    if not len(rows):
        return uncached
    shape = (len(rows), windows.shape[1], _cached_per_position(settings))
    log_p, ids = np.empty(shape, np.float32), np.empty(shape, np.int32)
    read = jit_for_stage(lambda teacher, ids: teacher_top_k(dec, teacher, ids, stage.top_k))
    part = -(-effort.batch // effort.accumulate)  # what the step has memory for
    with matmul_precision(effort):
        for at in range(0, len(rows), part):
            batch = windows[np.resize(rows[at : at + part], part)]  # of one shape: compiled once
            found = read(dict(teacher), jnp.asarray(batch, jnp.int32))
            count = len(rows[at : at + part])
            log_p[at : at + part], ids[at : at + part] = (np.asarray(x)[:count] for x in found)
    return CachedTopK(rows, log_p, ids)


def _cached_per_position(settings: TrainSettings) -> int:
    """Tokens stored of each position: the stage's `top_k`, at most the vocabulary."""
    return min(settings.stage.top_k, settings.dec.config.vocab_size)
