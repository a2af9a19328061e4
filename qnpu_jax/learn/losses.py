"""Losses of learning: the distance of the quantized student from its float teacher, or the text's
cross-entropy.

Logits of one sequence at a time are computed, and again in the backward pass, so that memory holds
(T, V) of student and teacher and never (B, T, V).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qnpu_jax.fakequant import Hidden, Reading, head, hidden, token_nll
from qnpu_jax.graph import Decoder, Params, Tensors, decoder
from qnpu_jax.learn.parameters import R1, Base, Theta, student_reading
from qnpu_jax.recipes import Stage
from qnpu_jax.transform import prefix_length

Logits = Float[Array, "t v"]
_Head = tuple[Tensors, Any]
"""Parameters and edge of the head, `Reading.whole`."""


class TopK(NamedTuple):
    """The teacher's k likeliest tokens of each position.

    Attributes:
      log_p: log-probabilities (nats), the largest first.
      ids: token ids.
    """

    log_p: Float[Array, "*b t k"]
    ids: Int[Array, "*b t k"]


class Batch(NamedTuple):
    """Sequences of one step.

    Attributes:
      ids: token ids.
      top_k: the teacher's likeliest tokens (B, T, K); None where the step computes the teacher.
    """

    ids: Int[Array, "b t"]
    top_k: TopK | None = None


def kl(teacher: Logits, student: Logits) -> Float[Array, " t"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of each position, in nats.

    Args:
      teacher: logits of p.
      student: logits of q.
    """
    log_p, log_q = jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def top_k(logits: Logits, k: int) -> TopK:
    """Returns the k likeliest tokens of each position (all of them where V < k), with their
    log-probabilities under the softmax over all tokens."""
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), min(k, logits.shape[-1]))
    return TopK(values, ids)


def teacher_decoder(dec: Decoder, teacher: Params) -> Decoder:
    """Stages the teacher for the student's windows, after the prefix that its parameters hold."""
    return decoder(dec.config, dec.plan, dec.tokens, prefix_length(teacher))


def float_hidden(dec: Decoder, teacher: Params, ids: Int[Array, "b t"]) -> Hidden:
    """Runs the float model on a batch: `hidden` with a leading axis, residual streams (B, L, T, D).

    No gradient passes.

    Args:
      dec: the student's. The teacher has a prefix of its own: its BOS, or none.
    """
    dec = teacher_decoder(dec, teacher)
    float_model = Reading(teacher, {})
    return jax.lax.stop_gradient(jax.vmap(lambda x: hidden(dec, float_model, x))(ids))


def teacher_top_k(dec: Decoder, teacher: Params, ids: Int[Array, "b t"], k: int) -> TopK:
    """Returns `top_k` of the float model's logits, (B, T, K)."""
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
    """Mean over layers of sum (x_fq - x)^2 / sum x^2, x the residual stream after a layer."""
    square = jnp.sum(jnp.square(student - teacher), axis=(1, 2))
    return jnp.mean(square / jnp.sum(jnp.square(teacher), axis=(1, 2)))


def objective(
    dec: Decoder,
    stage: Stage,
    base: Base,
    theta: Theta,
    batch: Batch,
    warm: Float[Array, ""],
) -> Float[Array, ""]:
    """Computes the stage's loss, the mean over the batch's tokens.

    loss = warm * local errors + hidden_mse * hidden_error + (KL or cross-entropy of the logits);
    hidden_error alone, with weight 1, where the stage's loss is `hidden`.

    Args:
      theta: what the loss is differentiated by.
      warm: 1 during warm-up, then 0.
    """
    student = student_reading(dec, stage, base, theta, measure=stage.warmup > 0)
    trace: Hidden = jax.vmap(lambda x: hidden(dec, student, x))(batch.ids)
    loss = warm * jnp.mean(trace.error) if stage.warmup > 0 else jnp.float32(0)
    weight = 1.0 if stage.loss == "hidden" else stage.hidden_mse
    needs_logits = stage.loss == "kl" and batch.top_k is None
    teacher: Hidden | None = None
    if weight or needs_logits:
        teacher = float_hidden(dec, base.teacher, batch.ids)
    if weight and teacher is not None:
        # The student's residual stream is the teacher's, rotated: x B R1.
        exactly = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        r1 = theta.get(R1)
        turn = base.basis if r1 is None else exactly(base.basis, r1)
        target = exactly(teacher.residuals, turn)
        loss = loss + weight * jnp.mean(jax.vmap(hidden_error)(trace.residuals, target))
    if stage.loss != "hidden":
        x_ref = teacher.last if teacher is not None and needs_logits else None
        heads = student.whole(dec.head), Reading(base.teacher, {}).whole(dec.head)
        loss = loss + _logit_loss(dec, stage, heads, _Streams(trace.last, x_ref, batch))
    return loss


class _Streams(NamedTuple):
    """Residual streams after the last layer, of a batch.

    Attributes:
      x: the student's.
      x_ref: the teacher's, None where its logits are not needed.
    """

    x: Float[Array, "b t d"]
    x_ref: Float[Array, "b t d"] | None
    batch: Batch


def _logit_loss(
    dec: Decoder, stage: Stage, heads: tuple[_Head, _Head], streams: _Streams
) -> Float[Array, ""]:
    """Cross-entropy or KL of the logits.

    Args:
      heads: the student's and the teacher's.
    """
    student, float_model = heads

    @jax.checkpoint
    def one(sequence) -> jax.Array:
        x, x_ref, (ids, likeliest) = sequence
        logits = head(dec, *student, x)
        if stage.loss == "ce":
            return jnp.mean(token_nll(logits, ids))
        if likeliest is not None:
            return jnp.mean(top_k_kl(likeliest, logits))
        teacher = jax.lax.stop_gradient(head(dec, *float_model, x_ref))
        if stage.top_k:
            return jnp.mean(top_k_kl(top_k(teacher, stage.top_k), logits))
        return jnp.mean(kl(teacher, logits))

    return jnp.mean(jax.lax.map(one, streams))


def held_out_kl(
    dec: Decoder, stage: Stage, base: Base, theta: Theta, ids: Int[Array, "b t"]
) -> Float[Array, " b"]:
    """Computes KL(float || student) over the whole vocabulary, the mean of each window's tokens, in
    nats."""
    student, teacher = student_reading(dec, stage, base, theta), Reading(base.teacher, {})
    heads = student.whole(dec.head), teacher.whole(dec.head)
    readings = (dec, student), (teacher_decoder(dec, base.teacher), teacher)

    def one(ids: jax.Array) -> jax.Array:
        x, x_ref = (hidden(*of, ids).last for of in readings)
        return jnp.mean(kl(head(dec, *heads[1], x_ref), head(dec, *heads[0], x)))

    return jax.lax.map(one, ids)
