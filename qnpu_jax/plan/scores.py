"""Scores by which other planners order the groups of a plan: the higher, the sooner raised.

All of them are taken on the same decoder, windows and references as our charges, so that what
differs between two plans is how they were chosen. e is what the low bits of a tensor cost it:
w_low - w_high of a weight, fq(x) - x of an activation. Where a group has several tensors, its worst
one speaks for it, unless the score is a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from qnpu_jax.fakequant import Edge, fake_quant, recorded_logits, token_nll
from qnpu_jax.graph import LAYERS, MASK, Decoder, Node, Tensors, TensorSpec, eval_op
from qnpu_jax.plan.bench import Bench
from qnpu_jax.plan.charges import Arrays, Mixed, arrays, divergences
from qnpu_jax.plan.groups import Choices

REMOVAL_WINDOWS = 2
"""Windows on which groups are raised one by one: a pass for every group and window."""
SEED = 0
"""Of the random order."""


class Norms(NamedTuple):
    """Sums over the elements of a tensor, masked scores left out; by layer where it has layers.

    Attributes:
      error, value: of |e| and of |x|.
      error2, value2: of e^2 and of x^2.
    """

    error: Any
    value: Any
    error2: Any
    value2: Any


@dataclass(frozen=True, eq=False)
class Known:
    """What scores are computed from.

    Attributes:
      bench: the decoder with its windows and costs.
      charges: of each group in the low plan, nats per position.
      base: KL of the plan that raises all groups.
    """

    bench: Bench
    charges: Float64[np.ndarray, " g"]
    base: float

    @cached_property
    def norms(self) -> dict[str, Norms]:
        """Norms of every tensor and of its error, by stacked global name, over all windows."""
        model = self.bench.model
        found = {
            n: _norms(e, model.params[n], n.startswith(LAYERS)) for n, e in _weights(model).items()
        }
        rows = [_rounded_norms(model.choices.low, arrays(model, ids)) for ids in self.bench.windows]
        total = jax.tree.map(lambda *x: sum(np.asarray(y, np.float64) for y in x), *rows)
        return found | total


def sqnr(known: Known) -> Float64[np.ndarray, " g"]:
    """Computes -10 log10(sum x^2 / sum e^2) of each group's tensor of least SQNR: -dB.

    Reference: ExecuTorch, backends/qualcomm, mix_precision_analyzer.py. It compares outputs of
    convolutions of the whole quantized model with float ones, and raises weights alone.
    """
    low = {
        n: 10 * np.log10((x.error2 + 1e-30) / (x.value2 + 1e-30)) for n, x in known.norms.items()
    }
    return _by_group(known.bench.model.choices, low, max)


def relative(known: Known) -> Float64[np.ndarray, " g"]:
    """Computes sum |e| / (sum |x| + 1e-8) of each group's worst tensor.

    Reference: Quant.npu (arXiv 2605.20295), the sensitivity of its adaptive mixed precision.
    """
    ratio = {n: x.error / (x.value + 1e-8) for n, x in known.norms.items()}
    return _by_group(known.bench.model.choices, ratio, max)


def fisher(known: Known) -> Float64[np.ndarray, " g"]:
    """Computes sum (g e)^2 over elements and tensors, g = d NLL / dx in the float model.

    e of a weight is the change of its linear's output, and g is taken there. The loss is that of
    the next tokens, as the KL to the float model has no slope at the float model itself.

    Reference: NVIDIA ModelOpt 0.47, torch/quantization/algorithms.py, AutoQuantizeGradientSearcher.
    It scores a linear's weight together with its input.
    """
    model = known.bench.model
    total: dict[str, np.ndarray] = {}
    for ids in known.bench.windows:
        for n, x in fisher_terms(model, ids).items():
            total[n] = total.get(n, 0.0) + np.asarray(x, np.float64)
    return _by_group(model.choices, total, sum)


def removal(known: Known) -> Float64[np.ndarray, " g"]:
    """Computes KL(low) - KL(low with one group raised), with all that must follow it, measured.

    Reference: Samsung TICO 0.3, quantization/analysis/sensitivity.py, LEAVE_ONE_FLOAT.
    """
    bench, found = known.bench, known.bench.model.choices
    few = np.unique(np.linspace(0, len(bench.windows) - 1, REMOVAL_WINDOWS).round().astype(int))
    windows, references = bench.windows[few], [bench.references[i] for i in few]
    none = [False] * len(found.groups)
    lost = lambda up: divergences(bench.model, windows, references, up).mean()  # noqa: E731
    low = lost(none)
    each = bench.watch.track(range(len(none)), len(none), "groups raised alone")
    return np.array([low - lost(found.closed(none, (i,))) for i in each])


def kurtosis(known: Known) -> Float64[np.ndarray, " g"]:
    """Computes E[(w - mean)^4] / std^4 of weights; activations have none, and rank last."""
    model = known.bench.model
    found = {}
    for name in _weights(model):
        w = np.asarray(model.params[name], np.float64)
        w = w.reshape(len(w) if name.startswith(LAYERS) else 1, -1)
        w = w - w.mean(1, keepdims=True)
        ratio = (w**4).mean(1) / np.maximum((w**2).mean(1) ** 2, 1e-30)
        found[name] = ratio if name.startswith(LAYERS) else ratio[0]
    return _by_group(model.choices, found, max)


def charge(known: Known) -> Float64[np.ndarray, " g"]:
    """Returns our charges: nats per position."""
    return known.charges


def charge_per_second(known: Known) -> Float64[np.ndarray, " g"]:
    """Computes charges by time, of each group with all that must follow it.

    Time is that of a token and that of a chunk, each relative to the low plan's, casts included;
    bytes of weights where there are no seconds. What takes none comes first, by its charge.
    """
    found, cost = known.bench.model.choices, known.bench.cost
    none = [False] * len(found.groups)

    def time(up: list[bool]) -> float:
        if not cost.timed:
            return cost.bytes(up) / cost.bytes(none)
        return cost.decode(up) / cost.decode(none) + cost.prefill(up) / cost.prefill(none)

    gains, base = np.maximum(known.charges, 0.0), time(none)
    alone = [found.closed(none, (i,)) for i in range(len(none))]
    return np.array([gains[up].sum() / max(time(up) - base, 1e-12) for up in alone])


def random(known: Known) -> Float64[np.ndarray, " g"]:
    """Draws scores at random, the same ones each time."""
    return np.random.default_rng(SEED).random(len(known.charges))


SCORES: dict[str, Callable[[Known], Float64[np.ndarray, " g"]]] = {
    "sqnr": sqnr,
    "relative": relative,
    "fisher": fisher,
    "removal": removal,
    "kurtosis": kurtosis,
    "charge": charge,
    "charge per second": charge_per_second,
    "random": random,
}
"""Scores by name."""


def _weights(model: Mixed) -> Tensors:
    """Errors of weights that are in groups."""
    return {n: e for n, e in model.errors.items() if n.endswith("weight")}


def _norms(e: Any, x: Any, layered: bool) -> Norms:
    axes = tuple(range(int(layered), jnp.ndim(e)))
    sums = (jnp.abs(e), jnp.abs(x), jnp.square(e), jnp.square(x))
    return Norms(*(np.asarray(jnp.sum(a, axes), np.float64) for a in sums))


def _by_group(
    found: Choices, of: Mapping[str, Any], join: Callable[[Any], float]
) -> Float64[np.ndarray, " g"]:
    """Joins values of each group's tensors; -inf where none has one."""
    made = []
    for group in found.groups:
        names = ((m.prefix + m.name, m.layer) for m in group.members)
        mine = [float(np.atleast_1d(of[n])[layer]) for n, layer in names if n in of]
        made.append(join(mine) if mine else -np.inf)
    return np.array(made)


@partial(jax.jit, static_argnums=0)
def _rounded_norms(dec: Decoder, read: Arrays) -> dict[str, Norms]:
    """Norms of activations and of their errors in a pass of the low plan."""

    def edge(own: Tensors, kept: Tensors) -> Edge:
        def rounded(spec: TensorSpec, x: jax.Array) -> jax.Array:
            if spec.name not in own:
                return x
            if spec.kind != "activation":
                return x + own[spec.name]
            q, qmin, qmax = own[spec.name]
            y = fake_quant(x, q.scale, q.zero_point, qmin, qmax)
            # A masked score is -1e9, beside which nothing else counts.
            e, seen = (jnp.where(x <= MASK / 2, 0.0, z) for z in (y - x, x))
            kept[spec.name] = Norms(
                jnp.sum(jnp.abs(e)), jnp.sum(jnp.abs(seen)), jnp.sum(e**2), jnp.sum(seen**2)
            )
            return y

        return rounded

    return recorded_logits(dec, read.values, read.quant | read.errors, edge)[1]


def fisher_terms(model: Mixed, ids: Int[np.ndarray, " t"]) -> Tensors:
    """Computes sum (g e)^2 of one window, by stacked global name."""
    dec, read = model.choices.low, arrays(model, ids)
    params = {n: e for n, e in read.errors.items() if n in model.params}
    read = read._replace(errors=params)  # the float model reads exact tables
    shapes = jax.eval_shape(partial(_recorded, dec), read, None)[1]
    at = {n: jnp.zeros(shapes[n].shape) for n in read.quant}
    return _fisher(dec, read, jnp.asarray(ids, jnp.int32), at)


@partial(jax.jit, static_argnums=0)
def _fisher(dec: Decoder, read: Arrays, ids: jax.Array, at: Tensors) -> Tensors:
    def loss(at: Tensors) -> tuple[jax.Array, Tensors]:
        logits, errors = _recorded(dec, read, at)
        return token_nll(logits, ids).mean(), errors

    slopes, errors = jax.grad(loss, has_aux=True)(at)
    output = {
        g.prefix + w: g.prefix + node.output
        for g in dec.graphs
        for node in g.nodes
        for w in node.inputs
        if g.prefix + w in read.errors
    }
    made = {}
    for name, e in errors.items():
        first = int(name.startswith(LAYERS))
        terms = jnp.square(slopes[output.get(name, name)] * e)
        made[name] = jnp.sum(terms, axis=tuple(range(first, terms.ndim)))
    return made


def _recorded(dec: Decoder, read: Arrays, at: Tensors | None) -> tuple[jax.Array, Tensors]:
    """Logits of the float model, and what the low bits of each tensor alone change in it.

    Args:
      at: added to activations, for slopes there; None adds nothing.
    """
    readers = _readers(dec, read.errors)
    probed = {n: (q, None if at is None else at[n]) for n, q in read.quant.items()}

    def edge(own: Tensors, kept: Tensors) -> Edge:
        seen: Tensors = {}
        erring = {n: e for n, e in own.items() if not isinstance(e, tuple)}

        def recorded(spec: TensorSpec, x: jax.Array) -> jax.Array:
            node = readers.get(spec.name)
            if node is not None and erring.keys() & set(node.inputs):
                weight = next(n for n in node.inputs if n.endswith("weight"))
                moved = (seen[n] + erring.get(n, 0.0) for n in node.inputs)
                kept[weight] = jax.lax.stop_gradient(eval_op(node.op, *moved) - x)
            if spec.name in own and spec.kind == "activation":
                (q, qmin, qmax), probe = own[spec.name]
                e = fake_quant(x, q.scale, q.zero_point, qmin, qmax) - x
                kept[spec.name] = jax.lax.stop_gradient(jnp.where(x <= MASK / 2, 0.0, e))
                x = x if probe is None else x + probe
            seen[spec.name] = x
            return x

        return recorded

    return recorded_logits(dec, read.values, probed | read.errors, edge)


def _readers(dec: Decoder, errors: Tensors) -> dict[str, Node]:
    """Ops that read a weight with an error, by local output name."""
    found: dict[str, Node] = {}
    for graph in dec.graphs:
        for node in graph.nodes:
            if any(graph.prefix + n in errors for n in node.inputs):
                assert node.output not in found, f"{node.output}: an output of two graphs"
                found[node.output] = node
    return found
