"""Learning of scales, rotations, biases and rounding through fake-quantization."""

from qnpu_jax.learn.checkpoints import Checkpoints, check_checkpoints, last_checkpoint
from qnpu_jax.learn.stages import Calibrated, Learned, Store, learn, learns, schedule
from qnpu_jax.learn.train import History

__all__ = [
    "Calibrated",
    "Checkpoints",
    "History",
    "Learned",
    "Store",
    "check_checkpoints",
    "last_checkpoint",
    "learn",
    "learns",
    "schedule",
]
