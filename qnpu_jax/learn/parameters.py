"""All that learning can move, as one flat dict of arrays, and what it makes of a model.

A name is "<group>/<tensor>". Every array starts at zero (rotations at the identity) and is relative
to the model that a stage starts from, in units that make one learning rate fit a group: scales in
their logarithm, zero points in half code ranges, biases and prefix in the range of their tensor,
rounding offsets in codes. `reading` applies them inside a traced forward pass, `merged` for good,
in float64; both by the same functions of `rotate` and `equivalent`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qnpu_jax.config import ModelConfig
from qnpu_jax.fakequant import Reading, lsq_factor, round_ste, scale_gradient
from qnpu_jax.graph import (
    Bounds,
    Decoder,
    Graph,
    Params,
    QParams,
    Scales,
    Tensors,
    is_free,
    is_rotated,
    ranges_of,
    resolve,
)
from qnpu_jax.recipes import Stage
from qnpu_jax.transform import Diagonal, Rotation, rotate, rotated, scale, scaled

Theta = dict[str, jax.Array]
ZERO_UNIT = 128.0
"""Codes of zero point per unit of its parameter: half an 8-bit range."""
LEAST = np.float32(2**-10)
"""Least factor of a scale under SGD: scales stay positive."""
LAYERED = "layers.~"
"""What marks our arrays among the parameters that the scan over layers cuts in slices."""


@struct.dataclass(kw_only=True)
class Base:
    """What a stage starts from; arguments of the compiled step, never constants of it.

    Attributes:
      params: folded parameters by global name, prefix K/V included.
      free: QParams of every free tensor.
      ranges: qmin and qmax of every quantized tensor.
      units: real value of one unit of a bias or prefix parameter, by its name in Theta.
      teacher: parameters of the float model.
      basis: (D, D), takes the teacher's residual stream x to that of `params`, x basis.
    """

    params: Any
    free: Any
    ranges: Any
    units: Any
    teacher: Any
    basis: Any


def group_of(name: str) -> str:
    """The group of recipes.GROUPS that a parameter belongs to."""
    kind, _, tensor = name.partition("/")
    match kind:
        case "scale" | "zero_point":
            return "rotated" if is_rotated(tensor) else "unrotated"
        case "weight_scale":
            return "weights"
        case _:
            return {"bias": "biases"}.get(kind, kind)


def initial(dec: Decoder, free: Scales, groups: Iterable[str]) -> Theta:
    """Parameters of the groups, where they change nothing."""
    cfg, groups = dec.config, set(groups)
    layers, kv, k = cfg.num_layers, cfg.num_kv_heads, cfg.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "diagonal/up_down": (layers, cfg.intermediate_size),
        "diagonal/v_o": (layers, kv, k),
        "diagonal/q_k": (layers, kv, k // 2),
    }
    for graph in dec.graphs:
        for spec in graph.tensors:
            name = graph.prefix + spec.name
            stack = (layers, *spec.shape) if graph is dec.layer else spec.shape
            if is_free(graph, spec.name):
                weight = spec.kind == "param"
                shapes[("weight_scale/" if weight else "scale/") + name] = free[name].scale.shape
                if not (weight or _symmetric(graph, spec.name)):
                    shapes[f"zero_point/{name}"] = free[name].scale.shape
                if weight and graph is dec.layer:
                    shapes[f"rounding/{name}"] = stack
            elif spec.kind == "param" and graph is dec.layer:
                # The head's bias would learn the vocabulary of the calibration text.
                shapes[f"{'bias' if name.endswith('bias') else 'prefix'}/{name}"] = stack
    theta = {n: jnp.zeros(s, jnp.float32) for n, s in shapes.items() if group_of(n) in groups}
    if "rotation" in groups:
        eye = np.eye(k, dtype=np.float32)
        theta["rotation/r1"] = jnp.eye(cfg.hidden_size, dtype=jnp.float32)
        theta["rotation/r2"] = jnp.asarray(np.broadcast_to(eye, (layers, k, k)).copy())
    return theta


def _symmetric(graph: Graph, name: str) -> bool:
    quant = graph[name].quant
    return quant.symmetric or min(quant.bits) >= 16


def ranges(dec: Decoder) -> dict[str, Bounds]:
    """Code ranges of every quantized tensor by global name."""
    return {
        graph.prefix + name: bounds
        for graph in dec.graphs
        for name, bounds in ranges_of(graph, {t.name: t for t in graph.tensors}).items()
    }


def units(dec: Decoder, free: Scales) -> dict[str, np.ndarray]:
    """Real value of one unit of each bias and prefix parameter: the range of what it adds to."""
    resolved = jax.tree.map(np.asarray, resolve(dec, free))
    out: dict[str, np.ndarray] = {}

    def span(name: str, like: str) -> np.ndarray:
        quant = dec.layer[like].quant
        reach = 2.0 ** (np.asarray(quant.bits, np.float32) - 1)
        unit = (resolved["layers." + like].scale * reach).astype(np.float32)
        return unit.reshape(-1, *[1] * len(dec.layer[name].shape))

    for node in dec.layer.nodes:
        for name in node.inputs:
            if name.endswith("bias"):
                out[f"bias/layers.{name}"] = span(name, node.output)
            elif ".prefix_" in name:
                out[f"prefix/layers.{name}"] = span(name, name)
    return out


def reading(dec: Decoder, stage: Stage, base: Base, theta: Theta, measure: bool = False) -> Reading:
    """How the student reads the model, under autodiff."""
    scales = student_scales(dec, stage, base.free, theta)
    params = dict(base.params)
    for name, x in theta.items():
        kind, _, tensor = name.partition("/")
        if kind in ("rotation", "diagonal") and tensor != "r1":
            params[LAYERED + name] = jnp.exp(x) if kind == "diagonal" else x
        elif kind in ("bias", "prefix"):
            params[LAYERED + tensor] = x * base.units[name]
        elif kind == "rounding":
            params[LAYERED + tensor] = x * scales[tensor].scale[..., None]
    r1 = theta.get("rotation/r1")

    def prepare(graph: Graph, values: Tensors) -> Tensors:
        return _prepared(graph, values, r1)

    return Reading(params, scales, base.ranges, prepare, stage.masked, measure)


def _prepared(graph: Graph, values: Tensors, r1: jax.Array | None) -> Tensors:
    """The graph's parameters: rotated, scaled, then moved by what is learned of each."""
    mark = LAYERED.removeprefix("layers.")
    ours = {k.removeprefix(mark): v for k, v in values.items() if k.startswith(mark)}
    diagonal: list[Any] = [ours.get(f"diagonal/{n}") for n in ("up_down", "v_o", "q_k")]
    out = {}
    for spec in graph.named("param"):
        name, x = graph.prefix + spec.name, values[spec.name]
        if r1 is not None:
            x = rotated(name, x, r1, ours.get("rotation/r2"))
        if diagonal[0] is not None and graph.layered:
            x = scaled(name, x, *diagonal)
        out[spec.name] = x + ours[name] if name in ours else x
    return out


def student_scales(dec: Decoder, stage: Stage, free: Scales, theta: Theta) -> Scales:
    """Scales of every tensor that the stage quantizes."""
    resolved = resolve(dec, learned_scales(dec, stage, free, theta))
    if stage.quantized == "all":
        return resolved
    roots = {g.prefix + t.name: g.prefix + g.ties[t.name] for g in dec.graphs for t in g.tensors}
    return {n: q for n, q in resolved.items() if n.endswith("weight") or is_rotated(roots[n])}


def learned_scales(dec: Decoder, stage: Stage, free: Scales, theta: Theta) -> Scales:
    """Free scales where theta has moved them: s = s0 exp(a), z = clip(round(z0 + 128 b)).

    Under SGD s = s0 max(1 + a, 2^-10), and gradients are those of s and z themselves times LSQ's
    1/sqrt(numel qmax): a step of b then moves z, and one of a moves s, as Quant.npu's would.
    """
    out = {}
    for graph in dec.graphs:
        for spec in graph.tensors:
            name = graph.prefix + spec.name
            if name not in free:
                continue
            q = free[name]
            a = theta.get(f"scale/{name}", theta.get(f"weight_scale/{name}"))
            b = theta.get(f"zero_point/{name}")
            if stage.optimizer == "sgd":
                channel = spec.shape[1:] if spec.kind == "param" and spec.quant.axis == 0 else None
                numel = math.prod(channel or spec.shape)
                factor = lsq_factor(numel, 2.0 ** (max(spec.quant.bits) - 1) - 1)
                # A channel of zeros has a scale whose square underflows, and a gradient of 0.
                square = jnp.square(jnp.maximum(q.scale, np.float32(1e-18)))
                a = None if a is None else scale_gradient(a, factor / square)
                b = None if b is None else scale_gradient(b, factor / ZERO_UNIT**2)
            out[name] = QParams(
                scale=q.scale if a is None else q.scale * _factor(stage, a),
                zero_point=q.zero_point if b is None else _moved(graph, spec.name, q, b),
            )
    return out


def _factor(stage: Stage, a: jax.Array) -> jax.Array:
    """What a learned scale is multiplied by. The steps of plain SGD are as large as the gradients:
    an exponential would run away on the first."""
    if stage.optimizer != "sgd":
        return jnp.exp(a)
    # The gradient passes the floor: a scale that was thrown there can come back.
    return 1 + a + jax.lax.stop_gradient(jnp.maximum(1 + a, LEAST) - (1 + a))


def _moved(graph: Graph, name: str, q: QParams, b: jax.Array) -> jax.Array:
    """The zero point, an integer of the code range; 0 in layers of 16 bits."""
    quant = graph[name].quant
    bits = np.asarray(quant.bits, np.float32)
    bits = bits if graph.layered else bits[0]
    qmax = (2 ** (bits - 1) - 1).astype(np.float32)
    narrow = (bits < 16).astype(np.float32)
    z = jnp.clip(q.zero_point + np.float32(ZERO_UNIT) * b, -qmax - 1, qmax)
    return round_ste(z) * narrow


def merged(
    dec: Decoder, stage: Stage, params: Params, free: Scales, theta: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], Scales]:
    """Parameters and free scales with what was learned in them, products in float64.

    Raises:
      UserError: a rotation is not orthogonal, a factor not positive.
    """
    cfg: ModelConfig = dec.config
    out = {n: np.asarray(x) for n, x in params.items()}
    if "rotation/r1" in theta:
        r1, r2 = np.asarray(theta["rotation/r1"]), np.asarray(theta["rotation/r2"])
        out = rotate(cfg, out, Rotation(r1=r1, r2=r2))
    if "diagonal/up_down" in theta:
        up_down, v_o, q_k = (
            np.exp(np.asarray(theta[f"diagonal/{n}"], np.float64))
            for n in ("up_down", "v_o", "q_k")
        )
        out = scale(cfg, out, Diagonal(up_down=up_down, v_o=v_o, q_k=q_k))
    learned = jax.tree.map(np.asarray, learned_scales(dec, stage, free, dict(theta)))
    real = units(dec, free)
    for name, x in theta.items():
        kind, _, tensor = name.partition("/")
        if kind in ("bias", "prefix"):
            out[tensor] = out[tensor] + np.asarray(x) * real[name]
        elif kind == "rounding":
            out[tensor] = out[tensor] + np.asarray(x) * learned[tensor].scale[..., None]
    return out, learned
