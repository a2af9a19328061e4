"""Theta: the learned parameters of a stage, and the model that they make of the one it starts from.

Every array of theta starts at zero (rotations at the identity) and is relative to that model. Units
are chosen so that one learning rate fits a group:

  kind           unit                                        the student computes with
  scale          logarithm                                   s = s0 exp(a)
  weight_scale   logarithm                                   s = s0 exp(a)
  zero_point     half the code range of 8 bits, 128 codes    z = clip(round(z0 + 128 b))
  bias, prefix   range of the tensor that it adds to         x0 + u range
  rounding       codes                                       w0 + u s
  diagonal       logarithm                                   `transform.scale_channels` by exp(u)
  rotation       the matrix itself                           `transform.rotate` by it

`student_reading` applies theta inside a traced forward pass; `merge_theta` applies it for good, in
float64. Both call the same functions of `qnpu_jax.transform`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qnpu_jax.config import ModelConfig
from qnpu_jax.fakequant import Reading, lsq_factor, round_ste, scale_gradient
from qnpu_jax.graph import (
    Decoder,
    Graph,
    Params,
    QParams,
    Scales,
    Tensors,
    TensorSpec,
    bias_scales,
    has_no_zero_point,
    is_constant,
    is_free,
    is_rotated,
    resolve,
)
from qnpu_jax.recipes import Stage
from qnpu_jax.transform import (
    Diagonal,
    Rotation,
    identity_diagonal,
    rotate,
    rotate_parameter,
    scale_channels,
    scale_parameter,
)

Kind = Literal[
    "scale", "weight_scale", "zero_point", "bias", "prefix", "rounding", "diagonal", "rotation"
]


class ThetaKey(NamedTuple):
    """Name of a learned array.

    Attributes:
      kind: what the array changes.
      tensor: stacked global name of the tensor that it changes; of a rotation `r1` or `r2`, of a
        diagonal its name in `transform.Diagonal`.

    Example:
      >>> str(ThetaKey("scale", "layers.mlp.act"))
      'scale/layers.mlp.act'
    """

    kind: Kind
    tensor: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.tensor}"


Theta = dict[ThetaKey, jax.Array]

R1, R2 = ThetaKey("rotation", "r1"), ThetaKey("rotation", "r2")
ZERO_POINT_UNIT = 128.0
"""Codes per unit of a zero point's parameter: half an 8-bit range."""
LEAST_FACTOR = np.float32(2**-10)
"""Least factor of a scale under SGD: scales stay positive."""
LEARNED = "layers.~"
"""Key prefix of learned per-layer arrays, which `scan` slices along with the weights."""


@struct.dataclass(kw_only=True)
class Base:
    """The model that a stage starts from: arguments of the compiled step, never constants of it.

    Attributes:
      params: folded parameters by global name, prefix K/V included.
      free: QParams of every free tensor.
      units: real value of one unit of each bias and prefix parameter, `theta_units`.
      teacher: parameters of the float model.
      basis: (D, D) product B of the rotations that earlier stages merged: where the teacher's
        residual stream is x, that of `params` is x B.
    """

    params: Any
    free: Any
    units: Any
    teacher: Any
    basis: Any


def group_of(key: ThetaKey) -> str:
    """Returns the group of `recipes.GROUPS` that a parameter belongs to.

    >>> group_of(ThetaKey("scale", "layers.attn.input")), group_of(R1)
    ('rotated', 'rotation')
    """
    match key.kind:
        case "scale" | "zero_point":
            return "rotated" if is_rotated(key.tensor) else "unrotated"
        case "weight_scale":
            return "weights"
        case "bias":
            return "biases"
        case kind:
            return kind


def initial_theta(dec: Decoder, free: Scales, groups: Iterable[str]) -> Theta:
    """Makes the parameters of some groups, at values that change nothing.

    Args:
      free: QParams of every free tensor.
      groups: names from `recipes.GROUPS`.

    Returns:
      float32 zeros; identity matrices for rotations.
    """
    cfg, groups = dec.config, set(groups)
    layers, k = cfg.num_layers, cfg.head_dim
    theta = {
        key: jnp.zeros(shape, jnp.float32)
        for key, shape in _shapes(dec, free).items()
        if group_of(key) in groups
    }
    if "rotation" in groups:
        eye = np.eye(k, dtype=np.float32)
        if cfg.merges_r1:
            theta[R1] = jnp.eye(cfg.hidden_size, dtype=jnp.float32)
        theta[R2] = jnp.asarray(np.broadcast_to(eye, (layers, k, k)).copy())
    return theta


def _shapes(dec: Decoder, free: Scales) -> dict[ThetaKey, tuple[int, ...]]:
    """Shapes of all parameters but rotations. Factors of channels learn as diagonals alone."""
    cfg = dec.config
    layers, still = cfg.num_layers, identity_diagonal(cfg).given()
    shapes: dict[ThetaKey, tuple[int, ...]] = {
        ThetaKey("diagonal", name): x.shape for name, x in still.items()
    }
    for graph in dec.graphs:
        for spec in graph.tensors:
            name = graph.prefix + spec.name
            stacked = (layers, *spec.shape) if graph.layered else spec.shape
            if is_constant(spec):
                if not spec.name.endswith((".gamma", ".factor")):
                    shapes[ThetaKey("bias", name)] = stacked
            elif is_free(graph, spec.name):
                weight = spec.kind == "param"
                scale = free[name].scale.shape
                shapes[ThetaKey("weight_scale" if weight else "scale", name)] = scale
                if not (weight or has_no_zero_point(spec)):
                    shapes[ThetaKey("zero_point", name)] = scale
                if weight and graph.layered:
                    shapes[ThetaKey("rounding", name)] = stacked
            elif spec.kind == "param" and graph.layered:
                # The head's bias would learn the vocabulary of the calibration text.
                shapes[ThetaKey("bias" if name.endswith("bias") else "prefix", name)] = stacked
    return shapes


def theta_units(dec: Decoder, free: Scales) -> dict[ThetaKey, np.ndarray]:
    """Returns the real value of one unit of each bias and prefix parameter, s 2^(bits - 1).

    s and bits are those of the tensor that a bias is added to, of the cache that holds a prefix, or
    a constant's own.

    Returns:
      float32 (L, 1, ..), broadcastable to the parameter.
    """
    resolved = jax.tree.map(np.asarray, resolve(dec, free))
    out: dict[ThetaKey, np.ndarray] = {}

    def unit_of(name: str, like: str) -> np.ndarray:
        quant = dec.layer[like].quant
        half_range = 2.0 ** (np.asarray(quant.bits, np.float32) - 1)
        unit = (resolved["layers." + like].scale * half_range).astype(np.float32)
        return unit.reshape(-1, *[1] * len(dec.layer[name].shape))

    for node in dec.layer.nodes:
        for name in node.inputs:
            if is_constant(dec.layer[name]):
                out[ThetaKey("bias", f"layers.{name}")] = unit_of(name, name)
            elif name.endswith("bias"):
                out[ThetaKey("bias", f"layers.{name}")] = unit_of(name, node.output)
            elif ".prefix_" in name:
                out[ThetaKey("prefix", f"layers.{name}")] = unit_of(name, name)
    return out


def student_reading(
    dec: Decoder, stage: Stage, base: Base, theta: Theta, measure: bool = False
) -> Reading:
    """Builds the student: the base model moved by theta, fake-quantized, differentiable by theta.

    Args:
      measure: also sum up the local errors of all quantizers.
    """
    scales = student_scales(dec, stage, base.free, theta)
    params = dict(base.params)
    for key, x in theta.items():
        match key.kind:
            case "diagonal":
                params[LEARNED + key.tensor] = jnp.exp(x)
            case "rotation" if key != R1:  # R1 is one matrix for all layers
                params[LEARNED + key.tensor] = x
            case "bias" | "prefix":
                params[LEARNED + key.tensor] = x * base.units[key]
            case "rounding":
                params[LEARNED + key.tensor] = x * scales[key.tensor].scale[..., None]
    fields = [key.tensor for key in theta if key.kind == "diagonal"]
    turn = _Turn(theta.get(R1), fields, dec.config.qk_norm is not None)

    def prepare(graph: Graph, values: Tensors) -> Tensors:
        return _moved_params(graph, values, turn)

    return Reading(params, scales, prepare, stage.masked, measure)


class _Turn(NamedTuple):
    """What moves the parameters of all layers alike.

    Attributes:
      r1: learned rotation of the residual stream.
      fields: of `Diagonal` that learn.
      normed: queries and keys are normed.
    """

    r1: jax.Array | None
    fields: list[str]
    normed: bool


def _moved_params(graph: Graph, values: Tensors, turn: _Turn) -> Tensors:
    """A graph's parameters in one layer: rotated, scaled by channel, then moved by their offset."""
    mark = LEARNED.removeprefix("layers.")
    learned = {k.removeprefix(mark): v for k, v in values.items() if k.startswith(mark)}
    r2 = learned.get(R2.tensor)
    factors = {name: learned[name] for name in turn.fields if name in learned}
    out = {}
    for spec in graph.named("param"):
        name, x = graph.prefix + spec.name, values[spec.name]
        if turn.r1 is not None or r2 is not None:
            x = rotate_parameter(name, x, turn.r1, r2)
        if factors:
            x = scale_parameter(name, x, Diagonal(**factors), normed=turn.normed)
        out[spec.name] = x + learned[name] if name in learned else x
    return out


def student_scales(dec: Decoder, stage: Stage, free: Scales, theta: Theta) -> Scales:
    """Returns the QParams of every tensor that the stage quantizes, moved by theta."""
    resolved = resolve(dec, learned_scales(dec, stage, free, theta))
    if stage.quantized == "all":
        return resolved | bias_scales(dec, resolved)
    roots = {g.prefix + t.name: g.prefix + g.ties[t.name] for g in dec.graphs for t in g.tensors}
    return {n: q for n, q in resolved.items() if n.endswith("weight") or is_rotated(roots[n])}


def learned_scales(dec: Decoder, stage: Stage, free: Scales, theta: Theta) -> Scales:
    """Moves the free scales by theta: s = s0 exp(a), z = clip(round(z0 + 128 b)).

    Under SGD s = s0 max(1 + a, 2^-10), and a step moves s and z as SGD on s and z itself would,
    with LSQ's factor f = 1 / sqrt(numel qmax) on their gradients: s by -rate f dL/ds. Autodiff
    gives dL/da = s0 dL/ds, and a step of a moves s by s0 times as much; so the gradient of a is
    multiplied by f / s0^2, and that of b by f / 128^2.

    Reference: Esser et al., Learned step size quantization (arXiv 1902.08153), section 2.2.
    """
    out = {}
    for graph in dec.graphs:
        for spec in graph.tensors:
            name = graph.prefix + spec.name
            if name not in free:
                continue
            q = free[name]
            kind = "weight_scale" if spec.kind == "param" else "scale"
            a = theta.get(ThetaKey(kind, name))
            b = theta.get(ThetaKey("zero_point", name))
            if stage.optimizer == "sgd":
                channel = spec.shape[1:] if spec.kind == "param" and spec.quant.axis == 0 else None
                numel = math.prod(channel or spec.shape)
                factor = lsq_factor(numel, _highest(graph, spec, q.scale))
                # A channel of zeros has a scale whose square underflows, and a gradient of 0.
                square = jnp.square(jnp.maximum(q.scale, np.float32(1e-18)))
                a = None if a is None else scale_gradient(a, factor / square)
                b = None if b is None else scale_gradient(b, factor / ZERO_POINT_UNIT**2)
            out[name] = QParams(
                scale=q.scale if a is None else q.scale * _scale_factor(stage, a),
                zero_point=q.zero_point if b is None else _zero_point(graph, spec.name, q, b),
            )
    return out


def _highest(graph: Graph, spec: TensorSpec, scale: Any) -> Any:
    """Highest code of each layer, to multiply scales with: (L, 1, ..), or () without layers."""
    highest = (2.0 ** (np.asarray(spec.quant.bits) - 1) - 1).astype(np.float32)
    return highest.reshape(-1, *(1,) * (np.ndim(scale) - 1)) if graph.layered else highest[0]


def _scale_factor(stage: Stage, a: jax.Array) -> jax.Array:
    """exp(a) under Adam, max(1 + a, 2^-10) under SGD.

    Steps of plain SGD are as large as the gradient: an exponential would run away on the first.
    """
    if stage.optimizer != "sgd":
        return jnp.exp(a)
    # The gradient passes the floor: a scale that was thrown there can come back.
    return 1 + a + jax.lax.stop_gradient(jnp.maximum(1 + a, LEAST_FACTOR) - (1 + a))


def _zero_point(graph: Graph, name: str, q: QParams, b: jax.Array) -> jax.Array:
    """clip(round(z0 + 128 b), qmin, qmax), an integer; 0 in layers of 16 bits."""
    quant = graph[name].quant
    bits = np.asarray(quant.bits, np.float32)
    bits = bits if graph.layered else bits[0]
    qmax = (2 ** (bits - 1) - 1).astype(np.float32)
    narrow = (bits < 16).astype(np.float32)
    z = jnp.clip(q.zero_point + np.float32(ZERO_POINT_UNIT) * b, -qmax - 1, qmax)
    return round_ste(z) * narrow


def merge_theta(
    dec: Decoder, stage: Stage, params: Params, free: Scales, theta: Mapping[ThetaKey, Any]
) -> tuple[dict[str, np.ndarray], Scales]:
    """Merges what was learned into parameters and free scales; products are float64.

    Args:
      params, free: those that the stage started from.

    Returns:
      float32 parameters and free scales of the model that `student_reading` computes.

    Raises:
      UserError: a rotation is not orthogonal, a factor not positive.
    """
    cfg: ModelConfig = dec.config
    out = {n: np.asarray(x) for n, x in params.items()}
    if R2 in theta:
        r1 = np.asarray(theta[R1]) if R1 in theta else None
        out = rotate(cfg, out, Rotation(r1=r1, r2=np.asarray(theta[R2])))
    logs = {k.tensor: np.asarray(x, np.float64) for k, x in theta.items() if k.kind == "diagonal"}
    if logs:
        out = scale_channels(cfg, out, Diagonal(**{n: np.exp(x) for n, x in logs.items()}))
    learned = jax.tree.map(np.asarray, learned_scales(dec, stage, free, dict(theta)))
    real = theta_units(dec, free)
    for key, x in theta.items():
        name = key.tensor
        if key.kind in ("bias", "prefix"):
            out[name] = out[name] + np.asarray(x) * real[key]
        elif key.kind == "rounding":
            out[name] = out[name] + np.asarray(x) * learned[name].scale[..., None]
    return out, learned
