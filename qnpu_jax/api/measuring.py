"""A float model or its integers, measured on text."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from qnpu_jax.api.arguments import Ids, ids_of, room, unexpected
from qnpu_jax.errors import UserError
from qnpu_jax.integer import IntegerModel
from qnpu_jax.measure import Logits, float_logits
from qnpu_jax.measure import perplexity as readings
from qnpu_jax.models import Checkpoint
from qnpu_jax.proof import Simulated
from qnpu_jax.recipes import RECIPES
from qnpu_jax.text import starts_of
from qnpu_jax.transform import add_prefix, fold_norms


def perplexity(
    model: Checkpoint | IntegerModel, windows: Ids, *, prefix: Sequence[int] | None = None
) -> float:
    """Measures exp(mean -log p(next token)) on text; the first token of a window is not scored.

    Args:
      model: a checkpoint, in float32; or integers, in the simulator.
      windows: (N, T) token ids, T at least 2.
      prefix: of a checkpoint: token ids before each window; by default BOS, where there is one. To
        compare with integers, pass their `prefix`. Integers have their own.

    Raises:
      UserError: neither a checkpoint nor integers; windows that are no integers, empty, outside the
        vocabulary or longer than the model has room for.

    Returns:
      The perplexity, 1 or more.

    Example:
      >>> gap = qnpu.perplexity(model, windows) / qnpu.perplexity(checkpoint, windows)
      >>> 0.5 < gap < 2.0
      True
    """
    logits, ids = _scored(model, windows, 2, prefix)
    return readings.perplexity(logits, ids)


def divergence(
    reference: Checkpoint | IntegerModel,
    other: Checkpoint | IntegerModel,
    windows: Ids,
    *,
    prefix: Sequence[int] | None = None,
) -> readings.Divergence:
    """Measures how far a model's predictions lie from another's.

    KL(p || q) = sum_v p_v log(p_v / q_v), mean over all positions, p of the reference and q of the
    other; and how often both find the same token most likely.

    Args:
      reference, other: checkpoints, in float32, or integers, in the simulator, of one vocabulary.
      windows: (N, T) token ids.
      prefix: of checkpoints: token ids before each window; by default that of the integers beside
        them, else BOS.

    Returns:
      `kl` in nats, 0 or more, and `top1`, 0 to 1.

    Raises:
      UserError: as `perplexity`; vocabularies of different sizes.

    Example:
      >>> found = qnpu.divergence(checkpoint, model, windows)
      >>> found.kl >= 0, 0 <= found.top1 <= 1
      (True, True)
    """
    if prefix is None:
        own = [m.prefix for m in (reference, other) if isinstance(m, IntegerModel)]
        prefix = own[0] if own else None
    p, ids = _scored(reference, windows, 1, prefix)
    q, _ = _scored(other, windows, 1, prefix)
    sizes = [m.config.vocab_size for m in (reference, other)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"divergence: vocabularies of {sizes[0]} and {sizes[1]}; expected equal ones"
        )
    return readings.divergence(p, q, ids)


def _scored(
    model: Checkpoint | IntegerModel, windows: Ids, least: int, prefix: Sequence[int] | None
) -> tuple[Logits, np.ndarray]:
    """Logits of a model, and the windows, checked against its vocabulary and positions."""
    if isinstance(model, IntegerModel):
        ids = ids_of(windows, model.config, "windows", room(model), least=least)
        simulator = Simulated(model, ids.shape[1])
        return readings.integer_logits(model, simulator.logits), ids
    if not isinstance(model, Checkpoint):
        way_out = "pass what `load` or `quantize` gives"
        raise unexpected("model", "a Checkpoint or an IntegerModel", model, way_out)
    config = model.config
    before = _prefix(model, prefix)
    ids = ids_of(windows, config, "windows", config.max_positions - len(before), least=least)
    return _float_logits(model, before), ids


def _prefix(checkpoint: Checkpoint, prefix: Sequence[int] | None) -> tuple[int, ...]:
    """Token ids before each window, by default what the model's own rule puts there."""
    config = checkpoint.config
    if prefix is None:
        return starts_of(checkpoint.tokenizer).bos
    if not len(prefix):
        return ()
    return tuple(ids_of(prefix, config, "prefix", config.max_positions - 1, ranks=(1,)).tolist())


def _float_logits(checkpoint: Checkpoint, prefix: tuple[int, ...]) -> Logits:
    config, plan = checkpoint.config, RECIPES["w8a8"].bits  # float evaluation ignores bits
    params = fold_norms(config, checkpoint.params)
    if prefix:
        params = add_prefix(config, plan, params, prefix)
    return float_logits(config, plan, {name: jnp.asarray(x) for name, x in params.items()})
