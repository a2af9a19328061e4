"""What learning minimises: how far the quantized student is from its float teacher or the text.

Logits are made one sequence at a time and made again in the backward pass: (T, V) of student and
teacher, never (B, T, V).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qnpu_jax.fakequant import Hidden, Reading, head, hidden, token_nll
from qnpu_jax.graph import Decoder, Params
from qnpu_jax.learn.parameters import Base, Theta, reading
from qnpu_jax.recipes import Stage

Logits = Float[Array, "t v"]


class TopK(NamedTuple):
    """The teacher's k largest log-probabilities of each position, and whose they are."""

    log_p: Float[Array, "*b t k"]
    ids: Int[Array, "*b t k"]


def kl(teacher: Logits, student: Logits) -> Float[Array, " t"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of each position, nats."""
    log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def top_k(logits: Logits, k: int) -> TopK:
    """log softmax over all tokens, the k likeliest of each position (all of them if fewer)."""
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), min(k, logits.shape[-1]))
    return TopK(values, ids)


def float_hidden(dec: Decoder, teacher: Params, ids: Int[Array, "b t"]) -> Hidden:
    """The float model's `hidden`, of a batch: residual streams (B, L, T, D)."""
    float_model = Reading(teacher, {})
    return jax.lax.stop_gradient(jax.vmap(lambda x: hidden(dec, float_model, x))(ids))


def likeliest(dec: Decoder, teacher: Params, ids: Int[Array, "b t"], k: int) -> TopK:
    """`top_k` of the float model's logits, (B, T, K): what `objective` takes as `cached`."""
    last = float_hidden(dec, teacher, ids).last
    whole = Reading(teacher, {}).whole(dec.head)
    return jax.lax.map(lambda x: top_k(head(dec, *whole, x), k), last)


def top_k_kl(teacher: TopK, student: Logits) -> Float[Array, " t"]:
    """KL over the teacher's k likeliest tokens, both distributions renormalised over them."""
    chosen = jnp.take_along_axis(student, teacher.ids, axis=-1)
    return kl(teacher.log_p, chosen)


def hidden_error(
    student: Float[Array, "l t d"], teacher: Float[Array, "l t d"]
) -> Float[Array, ""]:
    """Mean over layers of sum (x_fq - x)^2 / sum x^2."""
    square = jnp.sum(jnp.square(student - teacher), axis=(1, 2))
    return jnp.mean(square / jnp.sum(jnp.square(teacher), axis=(1, 2)))


def objective(
    dec: Decoder,
    stage: Stage,
    base: Base,
    theta: Theta,
    ids: Int[Array, "b t"],
    warm: Float[Array, ""],
    cached: TopK | None = None,
) -> Float[Array, ""]:
    """The stage's loss, mean over the batch's tokens.

    Args:
      warm: weight of the local errors (1 during warm-up, then 0).
      cached: the teacher's likeliest tokens (B, T, K), where they were kept.
    """
    student = reading(dec, stage, base, theta, measure=stage.warmup > 0)
    trace: Hidden = jax.vmap(lambda x: hidden(dec, student, x))(ids)
    loss = warm * jnp.mean(trace.error) if stage.warmup > 0 else jnp.float32(0)
    weight = 1.0 if stage.loss == "hidden" else stage.hidden_mse
    follows = stage.loss == "kl" and cached is None
    original: Hidden | None = None
    if weight or follows:
        original = float_hidden(dec, base.teacher, ids)
    if weight and original is not None:
        exactly = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        r1 = theta.get("rotation/r1")
        turn = base.basis if r1 is None else exactly(base.basis, r1)
        target = exactly(original.residuals, turn)
        loss = loss + weight * jnp.mean(jax.vmap(hidden_error)(trace.residuals, target))
    if stage.loss != "hidden":
        last = original.last if original is not None and follows else None
        loss = loss + _of_logits(dec, stage, base, student, trace.last, last, ids, cached)
    return loss


def _of_logits(
    dec: Decoder,
    stage: Stage,
    base: Base,
    student: Reading,
    x: Float[Array, "b t d"],
    original: Float[Array, "b t d"] | None,
    ids: Int[Array, "b t"],
    cached: TopK | None,
) -> Float[Array, ""]:
    """Cross-entropy or KL of the last residual stream's logits."""
    whole = student.whole(dec.head)
    float_whole = Reading(base.teacher, {}).whole(dec.head)

    @jax.checkpoint
    def one(sequence) -> jax.Array:
        x, original, ids, cached = sequence
        logits = head(dec, *whole, x)
        if stage.loss == "ce":
            return jnp.mean(token_nll(logits, ids))
        if cached is not None:
            return jnp.mean(top_k_kl(cached, logits))
        teacher = jax.lax.stop_gradient(head(dec, *float_whole, original))
        if stage.top_k:
            return jnp.mean(top_k_kl(top_k(teacher, stage.top_k), logits))
        return jnp.mean(kl(teacher, logits))

    return jnp.mean(jax.lax.map(one, (x, original, ids, cached)))


def held_out_kl(
    dec: Decoder, stage: Stage, base: Base, theta: Theta, ids: Int[Array, "b t"]
) -> Float[Array, ""]:
    """Mean KL(float || student) over all tokens and the whole vocabulary."""
    student, teacher = reading(dec, stage, base, theta), Reading(base.teacher, {})
    heads = student.whole(dec.head), teacher.whole(dec.head)

    def one(ids: jax.Array) -> jax.Array:
        x, original = (hidden(dec, r, ids).last for r in (student, teacher))
        return jnp.mean(kl(head(dec, *heads[1], original), head(dec, *heads[0], x)))

    return jnp.mean(jax.lax.map(one, ids))
