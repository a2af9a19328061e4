"""Scales of every quantization point, derived from the free ones.

Calibration and the optimizer choose the free scales only. The others follow from `ops.constraint`:
movement ops copy them, kernels fix them, and widening keeps them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qnpu_jax.graph.decoder import MASK_CODE, Decoder
from qnpu_jax.graph.graph import Graph, Node, TensorSpec, is_identity
from qnpu_jax.graph.ops import (
    HEADROOM,
    WIDENING,
    AddMask,
    Fixed,
    Free,
    FullyConnected,
    Masked,
    Narrowed,
    Same,
    constraint,
)
from qnpu_jax.graph.qparams import QParams, Scales


def is_free(graph: Graph, name: str) -> bool:
    """Tells whether calibration or learning must choose a tensor's scale and zero point.

    Those of other tensors are tied to another's, fixed by a kernel, or derived.

    Args:
      name: local name.
    """
    if graph.ties[name] != name:
        return False
    if graph[name].kind != "activation":
        return graph[name].kind == "param" and not name.endswith("bias")
    node = next(n for n in graph.nodes if n.output == name)
    match constraint(node.op):
        case Free():
            return True
        case Narrowed():
            return not all(_follows(graph, node))
        case Same() | Fixed() | Masked():
            return False


def _follows(graph: Graph, node: Node) -> list[bool]:
    """Tells for each layer whether a requantize takes its input's scale: it widens, or changes
    nothing."""
    source, target = graph[node.inputs[0]].quant, graph[node.output].quant
    return [
        b > a or is_identity(graph, node, i)
        for i, (a, b) in enumerate(zip(source.bits, target.bits, strict=True))
    ]


def resolve(dec: Decoder, free: Scales) -> Scales:
    """Fills in scale and zero point of every quantization point.

    The free scales may be tracers. Biases are left out: `freeze` derives their scale, s_x s_w.

    Args:
      free: QParams by stacked global name, of every tensor with `is_free`.

    Returns:
      QParams by stacked global name: (L,) arrays in `layers.*`, scalars elsewhere; with a last axis
      of channels for weights.
    """
    embed = _resolve_graph(dec.embed, free, {})
    first = embed["residual"]
    out = free["layers.mlp.residual"]
    into = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.reshape(jnp.asarray(a), (1,)), b[:-1]]), first, out
    )
    layer = _resolve_graph(dec.layer, free, {"input.residual": into})
    last = jax.tree.map(lambda a: a[-1], layer["mlp.residual"])
    head = _resolve_graph(dec.head, free, {"input.residual": last})
    parts = zip(dec.graphs, (embed, layer, head), strict=True)
    return {g.prefix + name: q for g, resolved in parts for name, q in resolved.items()}


def bias_scales(dec: Decoder, resolved: Scales) -> Scales:
    """Returns the QParams of the biases of FULLY_CONNECTED, whose codes are those of its sums:
    s_b = s_x s_w, by channel, as `freeze` rounds them.

    Args:
      resolved: of `resolve`, of every quantized tensor.
    """
    out: Scales = {}
    for graph in dec.graphs:
        for node in graph.nodes:
            if isinstance(node.op, FullyConnected):
                x, w = (resolved[graph.prefix + name] for name in node.inputs[:2])
                # Rounding a bias steers no scale: where its code is large, float32 leaves nothing
                # of the rounding error that would.
                scale = jax.lax.stop_gradient(x.scale[..., None] * w.scale)
                zero_point = np.zeros(scale.shape, np.float32)
                out[graph.prefix + node.inputs[2]] = QParams(scale=scale, zero_point=zero_point)
    return out


def _resolve_graph(graph: Graph, free: Scales, known: Scales) -> Scales:
    """QParams by local name. Tensors are visited in graph order; the root of a tie class comes
    first."""
    done = dict(known)
    producer = {n.output: n for n in graph.nodes}

    def of(name: str) -> QParams:
        root = graph.ties[name]
        if root not in done:
            done[root] = _of_root(graph, root, producer.get(root), free, of)
        return done[root]

    specs = [t for t in graph.tensors if not t.name.endswith("bias")]
    return {t.name: _known_zero(of(t.name)) if has_no_zero_point(t) else of(t.name) for t in specs}


def has_no_zero_point(spec: TensorSpec) -> bool:
    """Tells whether a tensor's zero point is 0 in every layer, whatever is chosen or learned."""
    return spec.quant.symmetric or min(spec.quant.bits) >= 16


def _known_zero(q: QParams) -> QParams:
    """Replaces the zero point by a NumPy 0: it is known under jit, so that layers may share it."""
    return QParams(scale=q.scale, zero_point=np.zeros(np.shape(q.zero_point), np.float32))


def _of_root(graph: Graph, name: str, node: Node | None, free: Scales, of: Any) -> QParams:
    spec = graph[name]
    layers = np.shape(spec.quant.bits)[0]

    def constant(values: Any) -> Any:
        known = not isinstance(values, Tracer)  # stays so under jit: layers may share it
        xp: Any = np if known else jnp
        array = xp.broadcast_to(xp.asarray(values, xp.float32), (layers,))
        return array if graph.layered else array[0]

    if spec.fixed is not None:
        return QParams(scale=constant(spec.fixed), zero_point=constant(0))
    if name == "mask":
        masked = [of(n.inputs[0]).scale for n in graph.nodes if isinstance(n.op, AddMask)]
        return QParams(scale=constant(_mask_scales(masked, spec)), zero_point=constant(0))
    if node is None:
        return free[graph.prefix + name]
    match constraint(node.op):
        case Fixed(int8=int8, int16=int16):
            pairs = [int8 if b == 8 else int16 for b in spec.quant.bits]
            return QParams(
                scale=constant([p[0] for p in pairs]), zero_point=constant([p[1] for p in pairs])
            )
        case Masked():
            scores = of(node.inputs[0])
            below = constant([HEADROOM / (2 ** (b - 1) - 1) for b in spec.quant.bits])
            return QParams(scale=scores.scale + below, zero_point=scores.zero_point)
        case Narrowed():
            return _of_requantize(graph, node, free, of, constant)
        case Free() | Same():
            return free[graph.prefix + name]


def _mask_scales(scores: list[Any], spec: TensorSpec) -> Any:
    """Scales of the mask, one for layers of the same bits: () where all are, else (L,).

    Args:
      scores: scales (L,) of the scores of each KV head.
    """
    bits = np.asarray(spec.quant.bits)
    found: Any = None
    for width in dict.fromkeys(spec.quant.bits):
        of_width = np.flatnonzero(bits == width)
        widest = jnp.max(jnp.stack([jnp.max(s[of_width]) for s in scores]))
        scale = mask_scale(widest, width)
        found = scale if found is None else jnp.where(bits == width, scale, found)
    return found


MASK_SCALE = {8: 2.0, 16: 1 / 16}
"""Least scale of the mask by its bits."""


def mask_scale(scores: jax.Array, bits: int) -> jax.Array:
    """Computes the scale m of the mask: the least power of two that hides the highest score.

    Hidden means that the sum saturates at the lowest code of masked scores, whose scale is
    s + HEADROOM / qmax: qmax s + code m + (qmax + 1) (s + HEADROOM / qmax) <= 0. A power of two
    keeps the ADD's rescaling of 16-bit scores exact to 1/200 of a code. A mask no lower than it
    must be keeps Hexagon's 8-bit ADD precise.

    Args:
      scores: the largest scale s of the scores of layers that share the mask.
      bits: of the mask.
    """
    qmax = 2.0 ** (bits - 1) - 1
    masked = scores + np.float32(HEADROOM / qmax)
    needed = (np.float32(qmax) * scores + np.float32(qmax + 1) * masked) / -MASK_CODE[bits]
    needed = jnp.maximum(jax.lax.stop_gradient(needed), np.float32(MASK_SCALE[bits]))
    fraction, exponent = jnp.frexp(needed)
    return jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5).astype(exponent.dtype))


def _of_requantize(graph: Graph, node: Node, free: Scales, of: Any, constant: Any) -> QParams:
    source = of(node.inputs[0])
    follows = _follows(graph, node)
    identity = [is_identity(graph, node, i) for i in range(len(follows))]
    unchanged = constant(identity) > 0
    followed = QParams(
        scale=jnp.where(unchanged, source.scale, source.scale / np.float32(WIDENING)),
        zero_point=jnp.where(unchanged, source.zero_point, jnp.float32(0)),
    )
    if all(follows):
        return followed
    own = free[graph.prefix + node.output]
    return jax.tree.map(lambda a, b: jnp.where(constant(follows) > 0, a, b), followed, own)
