"""One optax transformation for all groups of learned parameters.

Rotations stay orthogonal (`orthogonal`), rounding offsets move by the sign of their gradient or by
Adam, and everything else moves by Adam or SGD.
"""

from __future__ import annotations

from collections.abc import Hashable

import jax
import optax

from qnpu_jax.learn.orthogonal import cayley_sgd, on_orthogonal_group
from qnpu_jax.learn.parameters import Theta, ThetaKey, group_of
from qnpu_jax.recipes import Stage


def optimizer(stage: Stage, steps: int) -> optax.GradientTransformation:
    """Builds the optimizer of a stage: each group at its own peak rate, which decays by a cosine to
    zero over `steps`.

    Returns:
      A transformation of `Theta`; parameters of a group that the stage does not learn are a
      ValueError.
    """
    # The mean of a cosine is half its peak: sign descent then gets as far as the stage allows.
    signs = {"rounding"} if stage.rounding_optimizer == "sign" else set()
    peaks = {g: 2 * r / steps if g in signs else r for g, r in stage.learn}
    parts: dict[Hashable, optax.GradientTransformation] = {
        g: _group_optimizer(stage, g, optax.cosine_decay_schedule(r, steps))
        for g, r in peaks.items()
    }
    inner = optax.multi_transform(parts, _group_labels)

    def update(updates, state, params=None):
        # optax multiplies float32 moments by Python and weakly typed scalars.
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _group_optimizer(
    stage: Stage, group: str, rate: optax.Schedule
) -> optax.GradientTransformation:
    match group:
        case "rotation" if stage.rotation_optimizer == "cayley_sgd":
            return cayley_sgd(rate)
        case "rotation":
            return on_orthogonal_group(optax.adam(rate))
        case "rounding":
            adam = stage.rounding_optimizer == "adam"
            return optax.adam(rate) if adam else optax.sign_sgd(rate)
        case _:
            return optax.adam(rate) if stage.optimizer == "adam" else optax.sgd(rate)


def _group_labels(theta: Theta) -> dict[ThetaKey, str]:
    return {key: group_of(key) for key in theta}
