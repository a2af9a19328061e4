"""The choice of norms taken twice (`graph.norms.rms_norm`): where tokens differ too much in length.

A model whose first token is massive, and whose prefix does not take that from it (Qwen2.5), has
tokens 120 times as long as the others. Of the others' sums of squares 16 bits then keep two codes.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.fakequant import passes
from qnpu_jax.graph import Graph, Params, decoder
from qnpu_jax.transform.prefix import prefix_length

MOST = 1000.0
"""Largest ratio of squared lengths that one norm is left with: 33 codes for the median token, whose
length is then wrong by 0.4% on average."""
WINDOWS = 4
"""Windows that are looked at: where the first token is massive, it is in each."""


def widest_lengths(
    config: ModelConfig, plan: BitPlan, params: Params, windows: Int[np.ndarray, "n t"]
) -> float:
    """Measures the longest token over the median one, squared, before any norm of the layers'
    residual stream, in float.

    Args:
      params: folded parameters, prefix K/V included.
      windows: (N, T) token ids; the first WINDOWS are read.
    """
    dec = decoder(config, plan, windows.shape[1], prefix_length(params))
    ids = jnp.asarray(windows[:WINDOWS], jnp.int32)
    found = [1.0]
    for graph, layer, env in passes(dec, params, ids, _stream_norms):
        sums = (np.asarray(x) for name, x in env.items() if name.endswith("norm.sum"))
        found += [float(x.max() / np.median(x)) for x in sums]
        if graph is dec.layer and layer == config.num_layers - 1:
            break  # the head's logits are larger than all else; its norm is none of the widest
    return max(found)


def with_double_norms(
    config: ModelConfig, plan: BitPlan, params: Params, windows: Int[np.ndarray, "n t"]
) -> ModelConfig:
    """Returns the configuration, with `double_norms` where lengths differ by more than MOST.

    Args:
      params, windows: as `widest_lengths`.
    """
    once = replace(config, double_norms=False)
    return replace(once, double_norms=widest_lengths(once, plan, params, windows) > MOST)


def _stream_norms(graph: Graph) -> tuple[str, ...]:
    """Sums of squares of the norms of the residual stream: not of queries, keys and outputs."""
    names = (node.output for node in graph.nodes)
    return tuple(n for n in names if n.endswith("norm.sum") and not n.endswith("_norm.norm.sum"))
