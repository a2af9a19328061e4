"""Scale ties as data: from the free scales to those of every quantization point.

An optimizer or a calibration sees only the free ones; what movement ops copy, kernels fix and
widening keeps is filled in here, from `ops.constraint`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.graph.decoder import Decoder
from qnpu_jax.graph.graph import Graph, Node, is_identity
from qnpu_jax.graph.ops import HEADROOM, WIDENING, Fixed, Free, Masked, Narrowed, Same, constraint
from qnpu_jax.graph.qparams import QParams, Scales


def is_free(graph: Graph, name: str) -> bool:
    """True for the tensors whose scale and zero point someone must choose: the rest is tied, fixed
    or derived."""
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
    """Per layer: does this requantize take its input's scale (it widens, or changes nothing)?"""
    source, target = graph[node.inputs[0]].quant, graph[node.output].quant
    return [
        b > a or is_identity(graph, node, i)
        for i, (a, b) in enumerate(zip(source.bits, target.bits, strict=True))
    ]


def resolve(dec: Decoder, free: Scales) -> Scales:
    """Scale and zero point of every quantization point, from the free ones: ties, fixed and derived
    filled in.

    Traceable: the free scales may be tracers. Biases are left out; `freeze` derives theirs (scale
    sx sw).

    Args:
      free: QParams by global name for every tensor with `is_free`.

    Returns:
      QParams by global name; (L,) arrays in `layers.*`, scalars elsewhere, (.., channels) for
      weights.
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


def _resolve_graph(graph: Graph, free: Scales, known: Scales) -> Scales:
    """Local names. Tensors are visited in graph order, roots of tie classes before their members
    are needed."""
    done = dict(known)
    producer = {n.output: n for n in graph.nodes}

    def of(name: str) -> QParams:
        root = graph.ties[name]
        if root not in done:
            done[root] = _of_root(graph, root, producer.get(root), free, of)
        return done[root]

    names = [t.name for t in graph.tensors if not t.name.endswith("bias")]
    return {name: of(name) for name in names}


def _of_root(graph: Graph, name: str, node: Node | None, free: Scales, of: Any) -> QParams:
    spec = graph[name]
    layers = np.shape(spec.quant.bits)[0]

    def constant(values: Any) -> jax.Array:
        array = jnp.broadcast_to(jnp.asarray(values, jnp.float32), (layers,))
        return array if graph.layered else array[0]

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
            below = constant([HEADROOM / (2 ** (b - 1) - 1) for b in spec.quant.bits])
            return QParams(scale=scores.scale + below, zero_point=scores.zero_point)
        case Narrowed():
            return _of_requantize(graph, node, free, of, constant)
        case Free() | Same():
            return free[graph.prefix + name]


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
