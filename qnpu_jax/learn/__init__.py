"""Learning of scales, rotations, biases and rounding through fake-quantization."""

from qnpu_jax.learn.checkpoints import Checkpoints, check, last
from qnpu_jax.learn.parameters import Base, Theta, initial, merged, ranges, student_scales, units
from qnpu_jax.learn.stages import Report, Store, learn, learns, schedule
from qnpu_jax.learn.teacher import check_room, keep
from qnpu_jax.learn.train import Cached, History, TrainState, ended, fit, nothing, start

__all__ = [
    "Base",
    "Cached",
    "Checkpoints",
    "History",
    "Report",
    "Store",
    "Theta",
    "TrainState",
    "check",
    "check_room",
    "ended",
    "fit",
    "initial",
    "keep",
    "last",
    "learn",
    "learns",
    "merged",
    "nothing",
    "ranges",
    "schedule",
    "start",
    "student_scales",
    "units",
]
