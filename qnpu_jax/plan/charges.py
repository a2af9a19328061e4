"""Charges of the KL divergence to groups of a mixed decoder, by integrated gradients.

Every tensor i of a group has an error e_i and a factor t_i of it: 1 where it has its low bits, 0
where it has its high ones. Of a weight e_i is w_low - w_high, of its bias likewise; of an
activation fq(x) - x, fq at the low bits and x what it is at the plan where charges are measured:
raised, it counts as exact. RoPE tables and eps, which layers share, have the factor of the tensor
whose bits they have. What both plans give the same bits has a factor of 1, also where other layers
of its tensor are in groups. With these errors fixed, f(t) = KL(float || mixed) is a smooth
function, and a group is charged

    a_i = integral over s in [0, 1] of t_i df/dt_i at t0 + s (t - t0),    sum a_i = f(t) - f(t0)

at a plan t; t0 is the plan of all groups raised, 0 in every group. f grows with the square of
errors: where these are independent, a_i is also the amount by which f falls when group i alone is
raised. KL is from the float model after its prefix, whose minimum is where no error is; what the
prefix itself costs is no group's, and is learned away.

Reference: Sundararajan et al., Integrated Gradients (arXiv 1703.01365), Proposition 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from qnpu_jax.calibrate import weight_scales
from qnpu_jax.fakequant import (
    Edge,
    decoder_logits,
    fake_quant,
    recorded_logits,
    shared_inputs,
    under_roots,
    with_errors,
)
from qnpu_jax.graph import (
    MASK,
    Decoder,
    Graph,
    Params,
    Same,
    Scales,
    Tensors,
    TensorSpec,
    constraint,
    expand,
    is_widened,
    local,
    ranges_of,
    resolve,
    select_shared,
    shared_widths,
)
from qnpu_jax.measure import mean_kl
from qnpu_jax.plan.groups import Choices

POINTS = 3
"""Points of the Gauss-Legendre rule for the integral over s, as in `diagnose.attribution`."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """A decoder between two plans.

    Attributes:
      choices: its groups.
      params: real values at the high bits, by stacked global name.
      errors: w_low - w_high of weights in groups, and of their biases; fq(x) - x at the low bits of
        RoPE tables and eps, in each layer; by stacked global name.
      scales: resolved QParams of the low plan.
      tables: real values of the inputs that layers share, by shared name.
    """

    choices: Choices
    params: Tensors
    errors: Tensors
    scales: Scales
    tables: Tensors


class Arrays(NamedTuple):
    """Arrays that a pass reads, for `jax.jit`: as `Mixed`, of one window, with code ranges."""

    values: Tensors
    errors: Tensors
    quant: Tensors


def mixed(
    found: Choices, floats: Params, rounded: Params, free: Scales, weight_init: str = "mse"
) -> Mixed:
    """Puts a decoder between its low and its high plan.

    Args:
      floats: parameters that the high bits are rounded from.
      rounded: the same with the low bits' weights and biases, as GPTQ left them.
      free: QParams of every free tensor of the low plan.
      weight_init: how scales of high bits are set, as `Recipe.weight_init`.
    """
    scales = resolve(found.low, free)
    high = weight_scales(found.high, floats, weight_init)
    chosen = {m.prefix + m.name for m in found.index}
    params, errors = {}, {}
    for dec, source, its in (
        (found.high, floats, {**scales, **high}),
        (found.low, rounded, scales),
    ):
        for graph in dec.graphs:
            params_of = {t.name: t for t in graph.named("param")}
            ranges = ranges_of(graph, params_of)
            for spec in params_of.values():
                name = graph.prefix + spec.name
                x = jnp.asarray(source[name])
                if name in its:
                    x = _rounded(x, spec, its[name], ranges[spec.name])
                if dec is found.high:
                    params[name] = x
                elif name in chosen or name.removesuffix("bias") + "weight" in chosen:
                    errors[name] = x - params[name]
                else:
                    params[name] = x
    tables = shared_inputs(found.low)
    return Mixed(found, params, errors | _of_tables(found.low, scales, tables), scales, tables)


def _of_tables(dec: Decoder, scales: Scales, tables: Tensors) -> Tensors:
    """Rounding errors of the inputs that layers share, in each layer. Masks have none."""
    errors = {}
    for graph in (dec.layer, dec.head):
        inputs = {
            n: graph[n] for n in local(shared_widths(dec.config), graph.prefix) if n != "mask"
        }
        for name, bounds in ranges_of(graph, inputs).items():
            rows = []
            for layer in range(graph.layers):
                x = select_shared(dec, graph, tables, layer)[name]
                q = graph.at(scales[graph.prefix + name], layer)
                rows.append(fake_quant(x, q.scale, q.zero_point, *graph.at(bounds, layer)) - x)
            errors[graph.prefix + name] = jnp.stack(rows) if graph.layered else rows[0]
    return errors


def _rounded(x: jax.Array, spec: TensorSpec, q: Any, bounds: Any) -> jax.Array:
    layered = x.ndim == len(spec.shape) + 1
    one = lambda x, s, z, a, b: fake_quant(x, expand(s, spec), expand(z, spec), a, b)  # noqa: E731
    args = (x, jnp.asarray(q.scale), jnp.asarray(q.zero_point), *map(jnp.asarray, bounds))
    return jax.vmap(one)(*args) if layered else one(*args)


def factors(found: Choices, raised: Sequence[bool] | Bool[np.ndarray, " g"]) -> Tensors:
    """t of every tensor that is in a group in some layer, by stacked global name: (L,), or ()
    without layers."""
    made: dict[str, np.ndarray] = {}
    for member, i in found.index.items():
        layers = found.low.layer.layers if member.prefix == found.low.layer.prefix else None
        name = member.prefix + member.name
        t = made.setdefault(name, np.ones(() if layers is None else layers, np.float32))
        t[... if layers is None else member.layer] = 0.0 if raised[i] else 1.0
    return {n: jnp.asarray(t) for n, t in made.items()}


def all_raised(found: Choices) -> Tensors:
    """t0, the `factors` of the high plan: 0 in every group."""
    return factors(found, [True] * len(found.groups))


class Charged(NamedTuple):
    """Charges at a plan.

    Attributes:
      groups: a_i by window and group, nats per position; 0 where a group is raised.
      kl: f(t), by window.
      base: f(t0), by window: all groups raised.
    """

    groups: Float64[np.ndarray, "n g"]
    kl: Float64[np.ndarray, " n"]
    base: Float64[np.ndarray, " n"]


def charges(
    model: Mixed,
    windows: Int[np.ndarray, "n t"],
    references: Sequence[Float[Array, "t v"]],
    raised: Sequence[bool],
) -> Charged:
    """Charges the KL at a plan to its groups, window by window.

    Args:
      references: logits of the float model after its prefix, for each window.
      raised: the plan, by group.
    """
    found, at = model.choices, factors(model.choices, raised)
    none = all_raised(found)
    path = {n: t - none[n] for n, t in at.items()}
    rule = [] if all(raised) else list(zip(*np.polynomial.legendre.leggauss(POINTS), strict=True))
    rows, kls, bases = [], [], []
    for ids, reference in zip(windows, references, strict=True):
        read = arrays(model, ids)
        logits, errors = rounded_pass(found.low, read, at)
        fixed = read._replace(errors=read.errors | errors)
        total = {n: np.zeros(t.shape) for n, t in at.items()}
        for x, weight in rule:
            place = {n: none[n] + jnp.float32((x + 1) / 2) * d for n, d in path.items()}
            slope = _slopes(found.low, fixed, reference, place)
            more = {n: np.asarray(weight / 2 * slope[n] * path[n]) for n in total}
            total = {n: np.asarray(a + more[n]) for n, a in total.items()}
        rows.append([_of_group(group, total) for group in found.groups])
        kls.append(float(mean_kl(reference, logits)))
        bases.append(float(_fixed(found.low, fixed, reference, none)))
    return Charged(np.array(rows), np.array(kls), np.array(bases))


def without(
    model: Mixed,
    ids: Int[np.ndarray, " t"],
    reference: Float[Array, "t v"],
    raised: Sequence[bool],
    groups: Sequence[int],
) -> Float64[np.ndarray, " k"]:
    """KL of one window at a plan with the errors of one group after the other left out, all other
    errors as they were: what charges stand for, exactly."""
    dec, at = model.choices.low, factors(model.choices, raised)
    read = arrays(model, ids)
    _, errors = rounded_pass(dec, read, at)
    fixed = read._replace(errors=read.errors | errors)
    out = []
    for i in groups:
        one = [up or j == i for j, up in enumerate(raised)]
        out.append(float(_fixed(dec, fixed, reference, factors(model.choices, one))))
    return np.array(out)


def divergences(
    model: Mixed,
    windows: Int[np.ndarray, "n t"],
    references: Sequence[Float[Array, "t v"]],
    raised: Sequence[bool],
) -> Float64[np.ndarray, " n"]:
    """KL at a plan, by window (nats per position)."""
    dec, at = model.choices.low, factors(model.choices, raised)
    return np.array([
        float(mean_kl(reference, rounded_pass(dec, arrays(model, ids), at)[0]))
        for ids, reference in zip(windows, references, strict=True)
    ])  # fmt: skip


def _of_group(group: Any, total: dict[str, np.ndarray]) -> float:
    return float(sum(np.atleast_1d(total[m.prefix + m.name])[m.layer] for m in group.members))


def arrays(model: Mixed, ids: Int[np.ndarray, " t"]) -> Arrays:
    """Gathers what a pass over a window reads."""
    dec = model.choices.low
    values: Tensors = {g.prefix: dict(local(model.params, g.prefix)) for g in dec.graphs}
    rows = values[dec.embed.prefix]["weight"][ids]
    values[dec.embed.prefix] = {"weight": rows, "ids": jnp.arange(len(ids))}
    quant: Tensors = {}
    for graph in dec.graphs:
        activations = {t.name: t for t in graph.named("activation")}
        for name, bounds in ranges_of(graph, activations).items():
            if _rounds(graph, name):
                quant[graph.prefix + name] = (model.scales[graph.prefix + name], *bounds)
    return Arrays({**values, "tables": model.tables}, model.errors, quant)


def _rounds(graph: Graph, name: str) -> bool:
    """Whether an activation has errors of its own, and is no copy of another's codes."""
    node = next(n for n in graph.nodes if n.output == name)
    return not isinstance(constraint(node.op), Same) and not is_widened(name)


@partial(jax.jit, static_argnums=0)
def rounded_pass(dec: Decoder, read: Arrays, at: Tensors) -> tuple[jax.Array, Tensors]:
    """Computes the logits at a plan, and the errors of activations there."""
    factor = {n: at.get(n, jnp.ones(jnp.shape(q[0].scale))) for n, q in read.quant.items()}
    extra = {n: (q, factor[n]) for n, q in read.quant.items()} | _as_read(dec, read, at)
    positive = under_roots(dec)

    def edge(own: Tensors, kept: Tensors) -> Edge:
        def rounded(spec: TensorSpec, x: jax.Array) -> jax.Array:
            if spec.name not in own:
                return x
            what, t = own[spec.name]
            if spec.kind != "activation":
                return x + t * what
            q, qmin, qmax = what
            y = fake_quant(x, q.scale, q.zero_point, qmin, qmax)
            if spec.name in positive:  # 1 / sqrt(0), a kernel's largest code, has no real value
                y = jnp.where((x > 0) & (y <= 0), q.scale / 2, y)
            # A masked score is -1e9, beside which float32 has nothing left of a code.
            kept[spec.name] = jnp.where(x <= MASK / 2, 0.0, y - x)
            return jnp.where(t > 0, y, x)

        return rounded

    return recorded_logits(dec, read.values, extra, edge)


@partial(jax.jit, static_argnums=0)
def _slopes(dec: Decoder, read: Arrays, reference: jax.Array, at: Tensors) -> Tensors:
    return jax.grad(lambda t: divergence(dec, read, reference, t))(at)


@partial(jax.jit, static_argnums=0)
def _fixed(dec: Decoder, read: Arrays, reference: jax.Array, at: Tensors) -> jax.Array:
    return divergence(dec, read, reference, at)


def divergence(dec: Decoder, read: Arrays, reference: jax.Array, at: Tensors) -> jax.Array:
    """Computes f(t), with all errors fixed."""
    one = {n: jnp.ones(jnp.shape(q[0].scale)) for n, q in read.quant.items()}
    errors = {n: (read.errors[n], at.get(n, t)) for n, t in one.items()}
    extra = errors | _as_read(dec, read, at)
    logits = decoder_logits(dec, read.values, extra, with_errors(dec))
    return mean_kl(reference, logits)


def _as_read(dec: Decoder, read: Arrays, at: Tensors) -> Tensors:
    """Errors of what no op makes, with their factors: those of biases are of their weights, those
    of shared inputs of the tensor whose bits they have."""
    shared, found = shared_widths(dec.config), {}
    like = {n: n.partition(".")[0] + "." + x for n, x in shared.items()}
    for name, e in read.errors.items():
        if name in like:
            one = jnp.ones(e.shape[: int(name.startswith(dec.layer.prefix))])
            found[name] = (e, at.get(like[name], one))
        elif name not in read.quant:
            found[name] = (e, at[name if name in at else name.removesuffix("bias") + "weight"])
    return found
