"""Names of the inputs that layers share.

Layers of one kind (`config.LayerKind`) and of the same bits share RoPE tables, mask and epsilon.
Kinds that differ in RoPE or in their window share the rest, and so do layers that differ in the
bits of scores, rotated queries or norms. So a shared input has a name of its own: the local name in
a model where all layers have one value, with a suffix where there are several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from qnpu_jax.config import ModelConfig
from qnpu_jax.graph.graph import Graph
from qnpu_jax.graph.layered import T

if TYPE_CHECKING:
    from qnpu_jax.graph.decoder import Decoder


class Reader(NamedTuple):
    """The first graph and layer that reads a shared input, and the input's local name there."""

    graph: Graph
    name: str
    layer: int

    @property
    def bits(self) -> int:
        """Bits of the shared input."""
        return self.graph[self.name].quant.bits[self.layer]


def mask_name(name: str, window: int | None) -> str:
    """Shared name of `mask` or `keep` in layers with this window.

    >>> mask_name("mask", None), mask_name("mask", 512)
    ('mask', 'mask_window_512')
    """
    return name if window is None else f"{name}_window_{window}"


def split_mask_name(name: str) -> tuple[str, int | None] | None:
    """Local name and window of a shared mask; None of another name.

    >>> split_mask_name("mask"), split_mask_name("keep_window_512_i8"), split_mask_name("ids")
    (('mask', None), ('keep', 512), None)
    """
    found = re.fullmatch(r"(mask|keep)(?:_window_(\d+))?(?:_i\d+)?", name)
    return (found[1], int(found[2]) if found[2] else None) if found else None


def kind_name(config: ModelConfig, name: str, kind: int) -> str:
    """Shared name of an input of the layer graph in a model whose layers have the same bits.

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


def shared_name(dec: Decoder, graph: Graph, name: str, layer: int) -> str:
    """Shared name of an input of a graph in one layer: `kind_name`, with its bits where they are
    not those of layer 0, as in `mask_i8` or `mask_window_512_i16`.

    Args:
      name: local.
    """
    found = kind_name(dec.config, name, dec.config.layer_kinds[layer] if graph.layered else 0)
    bits = graph[name].quant.bits[layer]
    return found if bits == dec.layer[name].quant.bits[0] else f"{found}_i{bits}"


def shared_names(dec: Decoder) -> dict[str, Reader]:
    """First reader of every input of layers and head by shared name, in the order of the layers."""
    found: dict[str, Reader] = {}
    for graph in (dec.layer, dec.head):
        for layer in range(graph.layers):
            for t in graph.named("input"):
                name = shared_name(dec, graph, t.name, layer)
                found.setdefault(name, Reader(graph, t.name, layer))
    return found


def select_shared(
    dec: Decoder, graph: Graph, values: Mapping[str, T], layer: int = 0
) -> dict[str, T]:
    """Selects the shared inputs that a graph reads in one layer, by local name.

    Args:
      values: by shared name, whatever stands for them: arrays, codes, tensors of a file.
    """
    names = {t.name: shared_name(dec, graph, t.name, layer) for t in graph.named("input")}
    return {name: values[shared] for name, shared in names.items() if shared in values}
