"""Quantizers: pure functions from real values to codes and back, and the ties that leave only free scales.

xhat = (clip(round(x / s) + z, qmin, qmax) - z) s, s the scale, z the zero point (arXiv 2605.20295, eq. of the static
quantizer). Tensors of the layer graph carry a leading layer axis: scales are (L,) or (L, channels).
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.config import QuantSpec
from qnpu_jax.decoder import Decoder
from qnpu_jax.graph import Graph, Node, TensorSpec, is_identity
from qnpu_jax.ops import HEADROOM, Fixed, Free, Masked, Narrowed, Same, constraint

Array = jax.Array | np.ndarray
Scales = dict[str, "QParams"]
"""QParams by global name (`embed.*`, `layers.*`, `head.*`); those of `layers.*` have a leading layer axis."""


@flax.struct.dataclass(kw_only=True)
class QParams:
    """Scale (real units per code, float32, > 0) and zero point (code of real 0, integer-valued float32)."""

    scale: Any
    zero_point: Any


def code_range(spec: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
    """qmin and qmax per layer (float32). Parameters leave the lowest code out, as LiteRT's weights must."""
    assert spec.quant is not None
    qmax = 2.0 ** (np.asarray(spec.quant.bits, np.float32) - 1) - 1
    qmin = -qmax if spec.kind == "param" else -qmax - 1
    return qmin.astype(np.float32), qmax.astype(np.float32)


def round_ste(x: jax.Array) -> jax.Array:
    """round(x), half to even, with the gradient of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def fake_quant(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, qmin: jax.Array, qmax: jax.Array
) -> jax.Array:
    """xhat = (clip(round(x/s) + z, qmin, qmax) - z) s, straight through.

    Autodiff of this composition gives the published gradients (LSQ+, arXiv 2004.09576): dx = 1 inside and 0 outside
    the range, ds = round(u) - u inside (u = x/s) and q - z at a bound, dz = 0 inside and -s outside.

    Args:
      x: real values.
      scale, zero_point: broadcastable to x.
      qmin, qmax: the code range, broadcastable to x.
    """
    q = jnp.clip(round_ste(x / scale) + zero_point, qmin, qmax)
    return (q - zero_point) * scale


def quantize(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: TensorSpec, layer: int = 0):
    """Codes of x: clip(round(x / s) + z), rounded half to even in float64. Shapes as `fake_quant`; int64."""
    qmin, qmax = (int(r[layer]) for r in code_range(spec))
    q = np.rint(np.asarray(x, np.float64) / np.asarray(scale, np.float64)) + zero_point
    return np.clip(q, qmin, qmax).astype(np.int64)


def expand(scale: Array, spec: TensorSpec) -> Array:
    """A per-channel vector reshaped to broadcast along the tensor's channel axis; scalars as they are."""
    if spec.quant is None or spec.quant.axis is None:
        return scale
    shape = [1] * len(spec.shape)
    shape[spec.quant.axis] = spec.shape[spec.quant.axis]
    return scale.reshape(shape)


def from_range(lo: Array, hi: Array, bits: Array, symmetric: bool, narrow: bool = False) -> QParams:
    """The scale and zero point whose code range spans [min(lo, 0), max(hi, 0)].

    Args:
      lo, hi: real bounds, any shape.
      bits: broadcastable to lo.
      symmetric: zero point 0 (always so at 16 bits).
      narrow: leave out the lowest code (weights).
    """
    lo, hi = np.minimum(np.asarray(lo, np.float64), 0), np.maximum(np.asarray(hi, np.float64), 0)
    qmax = 2.0 ** (np.asarray(bits, np.float64) - 1) - 1
    qmin = -qmax if narrow else -qmax - 1
    even = np.logical_or(symmetric, np.asarray(bits) >= 16)
    scale = np.where(even, np.maximum(-lo, hi) / qmax, (hi - lo) / (qmax - qmin))
    scale = np.maximum(scale, np.finfo(np.float32).tiny * 2.0**40)  # an all-zero tensor: any scale will do
    zero_point = np.where(even, 0.0, np.clip(np.rint(qmin - lo / scale), qmin, qmax))
    return QParams(scale=scale.astype(np.float32), zero_point=zero_point.astype(np.float32))


def is_free(graph: Graph, name: str) -> bool:
    """True for the tensors whose scale and zero point someone must choose: the rest is tied, fixed or derived."""
    if graph.ties[name] != name or graph[name].quant is None:
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
    """Per layer: does this requantize take its input's scale (it widens, or changes nothing)?"""
    source, target = graph[node.inputs[0]].quant, graph[node.output].quant
    assert source is not None and target is not None
    return [
        b > a or is_identity(graph, node, i)
        for i, (a, b) in enumerate(zip(source.bits, target.bits, strict=True))
    ]


def resolve(dec: Decoder, free: Scales) -> Scales:
    """Scale and zero point of every quantization point, from the free ones: ties, fixed and derived filled in.

    Traceable: the free scales may be tracers. Biases are left out; `freeze` derives theirs (scale sx sw).

    Args:
      free: QParams by global name for every tensor with `is_free`.

    Returns:
      QParams by global name; (L,) arrays in `layers.*`, scalars elsewhere, (.., channels) for weights.
    """
    embed = _resolve_graph(dec.embed, free, {})
    first = embed["residual"]
    out = free["layers.mlp.residual"]
    into = jax.tree.map(lambda a, b: jnp.concatenate([jnp.reshape(jnp.asarray(a), (1,)), b[:-1]]), first, out)
    layer = _resolve_graph(dec.layer, free, {"input.residual": into})
    last = jax.tree.map(lambda a: a[-1], layer["mlp.residual"])
    head = _resolve_graph(dec.head, free, {"input.residual": last})
    parts = zip(dec.graphs, (embed, layer, head), strict=True)
    return {g.prefix + name: q for g, resolved in parts for name, q in resolved.items()}


def _resolve_graph(graph: Graph, free: Scales, known: Scales) -> Scales:
    """Local names. Tensors are visited in graph order, roots of tie classes before their members are needed."""
    done = dict(known)
    producer = {n.output: n for n in graph.nodes}

    def of(name: str) -> QParams:
        root = graph.ties[name]
        if root not in done:
            done[root] = _of_root(graph, root, producer.get(root), free, of)
        return done[root]

    names = [t.name for t in graph.tensors if t.quant is not None and not t.name.endswith("bias")]
    return {name: of(name) for name in names}


def _of_root(graph: Graph, name: str, node: Node | None, free: Scales, of: Any) -> QParams:
    spec = graph[name]
    assert spec.quant is not None
    layers = np.shape(spec.quant.bits)[0]

    def constant(values: Any) -> jax.Array:
        array = jnp.broadcast_to(jnp.asarray(values, jnp.float32), (layers,))
        return array if graph.prefix == "layers." else array[0]

    if spec.fixed is not None:
        return QParams(scale=constant(spec.fixed[0]), zero_point=constant(spec.fixed[1]))
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
            return QParams(
                scale=scores.scale + np.float32(HEADROOM / 32767), zero_point=scores.zero_point
            )
        case Narrowed():
            return _of_requantize(graph, node, free, of, constant)
        case Free() | Same():
            return free[graph.prefix + name]


def _of_requantize(graph: Graph, node: Node, free: Scales, of: Any, constant: Any) -> QParams:
    source = of(node.inputs[0])
    follows = _follows(graph, node)
    identity = [is_identity(graph, node, i) for i in range(len(follows))]
    followed = QParams(
        scale=source.scale,
        zero_point=jnp.where(constant(identity) > 0, source.zero_point, jnp.float32(0)),
    )
    if all(follows):
        return followed
    own = free[graph.prefix + node.output]
    return jax.tree.map(lambda a, b: jnp.where(constant(follows) > 0, a, b), followed, own)


def symmetric_spec(name: str, bits: int) -> TensorSpec:
    """A per-tensor symmetric spec, for quantizing a constant outside any graph."""
    return TensorSpec(name, (), "activation", QuantSpec((bits,), symmetric=True))
