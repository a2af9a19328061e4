"""The float teacher's likeliest tokens, kept on the host: the teacher never learns, so what it says
of a window is the same at every step that reads the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qnpu_jax.errors import UserError
from qnpu_jax.graph import Decoder, Params
from qnpu_jax.learn.losses import TopK, likeliest
from qnpu_jax.learn.train import Cached, batches, jitted, nothing, precision
from qnpu_jax.recipes import Effort, Stage

BYTES = 8
"""Of one token kept: its log-probability in float32 and its id in int32."""


@dataclass(frozen=True)
class Kept:
    """The teacher's K likeliest tokens of some of the learning windows.

    Attributes:
      windows: their indices, ascending.
      log_p: log-probabilities (nats), the largest first.
      ids: whose they are.
    """

    windows: Int[np.ndarray, " n"]
    log_p: Float[np.ndarray, "n t k"]
    ids: Int[np.ndarray, "n t k"]

    def __call__(self, rows: Int[np.ndarray, " b"]) -> TopK:
        """Those of a batch (B, T, K), on the device.

        Args:
          rows: indices of windows, each one of `windows`.
        """
        at = np.searchsorted(self.windows, rows)
        return TopK(jnp.asarray(self.log_p[at]), jnp.asarray(self.ids[at]))


def check_room(
    dec: Decoder,
    stage: Stage,
    effort: Effort,
    steps: int,
    windows: Int[np.ndarray, "n t"],
    seed: int,
) -> Int[np.ndarray, " m"]:
    """Indices of the windows whose teacher is kept, ascending: those that some step reads; none
    where the stage reads no top-k, all of the teacher, or `effort.teacher_bytes` is 0.

    Raises:
      UserError: 8 bytes x windows x length x k are more than `effort.teacher_bytes`.
    """
    reads = stage.loss == "kl" and stage.top_k > 0 and not stage.hidden_mse
    if not (reads and effort.teacher_bytes and steps and len(windows)):
        return np.zeros(0, np.int64)
    # From the first step on also where a run resumes: the batches in which they are computed, and
    # so their last bits, must not depend on when it was killed.
    rows = np.unique(list(islice(batches(len(windows), effort.batch, seed, 0), steps)))
    length, k = windows.shape[1], _k(dec, stage)
    needed = BYTES * len(rows) * length * k
    if needed > effort.teacher_bytes:
        raise UserError(
            f"effort {effort.name}: the teacher's likeliest tokens ({len(rows)} windows x {length}"
            f" tokens x top {k}) take {needed:,} bytes; expected at most teacher_bytes ="
            f" {effort.teacher_bytes:,}; learn from fewer tokens, lower the stage's top_k, raise"
            " teacher_bytes, or set it to 0 to recompute them"
        )
    return rows


def keep(
    dec: Decoder,
    stage: Stage,
    effort: Effort,
    steps: int,
    teacher: Params,
    windows: Int[np.ndarray, "n t"],
    seed: int,
) -> Cached:
    """Computes what is kept for a stage: `likeliest` of every window of `check_room`.

    Args:
      dec: staged for T tokens.
      teacher: float parameters by global name, prefix K/V included.
      windows: token ids to learn from.
      seed: as in `train.fit`.

    Returns:
      From indices of windows to a `TopK` (B, T, K); to None where nothing is kept.

    Raises:
      UserError: as `check_room`, before anything is computed.
    """
    rows = check_room(dec, stage, effort, steps, windows, seed)
    if not len(rows):
        return nothing
    shape = (len(rows), windows.shape[1], _k(dec, stage))
    log_p, ids = np.empty(shape, np.float32), np.empty(shape, np.int32)
    read = jitted(lambda teacher, ids: likeliest(dec, teacher, ids, stage.top_k))
    part = -(-effort.batch // effort.accumulate)  # what the step has memory for
    with precision(effort):
        for at in range(0, len(rows), part):
            batch = windows[np.resize(rows[at : at + part], part)]  # of one shape: compiled once
            found = read(dict(teacher), jnp.asarray(batch, jnp.int32))
            count = len(rows[at : at + part])
            log_p[at : at + part], ids[at : at + part] = (np.asarray(x)[:count] for x in found)
    return Kept(rows, log_p, ids)


def _k(dec: Decoder, stage: Stage) -> int:
    """Tokens kept of each position: `top_k` of all that there are."""
    return min(stage.top_k, dec.config.vocab_size)
