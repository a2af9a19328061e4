"""Names of the inputs that layers share.

Layers of one kind (`config.LayerKind`) share RoPE tables, mask and epsilon. Kinds that differ in
RoPE or in their window share the rest. So a shared input has a name of its own: the local name in a
model with one kind, with a suffix where several kinds have several values.
"""

from __future__ import annotations

from collections.abc import Mapping

from qnpu_jax.config import ModelConfig
from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.layered import T


def mask_name(name: str, window: int | None) -> str:
    """Shared name of `mask` or `keep` in layers with this window.

    >>> mask_name("mask", None), mask_name("mask", 512)
    ('mask', 'mask_window_512')
    """
    return name if window is None else f"{name}_window_{window}"


def shared_name(config: ModelConfig, name: str, kind: int) -> str:
    """Shared name of an input of the layer graph.

    Kinds with equal RoPE tables share those of the first of them: `rope.cos` if it is kind 0, else
    `rope.cos_kind_1`. Kinds with equal windows share masks (`mask_name`).

    Args:
      name: local.
      kind: index into `config.kinds`.
    """
    if name in ("mask", "keep"):
        return mask_name(name, config.kinds[kind].window)
    if name not in ("rope.cos", "rope.sin"):
        return name
    ropes = [(k.rope_theta, k.rope_theta and k.rope_scaling) for k in config.kinds]
    first = ropes.index(ropes[kind])
    return f"{name}_kind_{first}" if first else name


def shared_names(config: ModelConfig, graph: Graph) -> dict[str, str]:
    """Local names of a graph's inputs by shared name, in the order of the layers' kinds."""
    kinds = dict.fromkeys(config.layer_kinds)
    names = [t.name for t in graph.named("input")]
    return {shared_name(config, name, kind): name for kind in kinds for name in names}


def select(config: ModelConfig, graph: Graph, values: Mapping[str, T], layer: int) -> dict[str, T]:
    """Selects the shared inputs that a graph reads in one layer, by local name.

    Args:
      values: by shared name, whatever stands for them: arrays, codes, tensors of a file.
    """
    kind = config.layer_kinds[layer] if graph.layered else 0
    names = {t.name: shared_name(config, t.name, kind) for t in graph.named("input")}
    return {name: values[shared] for name, shared in names.items() if shared in values}
