"""Centred keys: one constant vector per layer and KV head is taken from every key after RoPE.

softmax_j(q . k_j) = softmax_j(q . (k_j - c)): the term q . c is the same for every key, the
prefix's included, so attention does not change. What a bias of k leaves in slow RoPE channels is
the same for all tokens, and can be a hundred times their spread (Qwen2.5): c takes it out of the
8 bits of the KV cache.

Reference: Zhang et al., SageAttention (arXiv 2410.02367), section 4.2, which does it at run time.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.fakequant import passes
from qnpu_jax.graph import Graph, Params, decoder
from qnpu_jax.transform.fold import CENTRE

KEYS = "attn.rope.k_out"
SINKS = 4
"""First positions of a window that the mean leaves out: their keys are sinks, unlike all others."""


def key_centres(
    config: ModelConfig,
    plan: BitPlan,
    params: Params,
    windows: Int[np.ndarray, "n t"],
    batch: int = 8,
) -> Float32[np.ndarray, "L N K"]:
    """Computes the mean key after RoPE of every layer and KV head, in float.

    Args:
      params: folded parameters, without prefix.
      windows: (N, T) token ids, more than SINKS a window.
    """
    dec = decoder(replace(config, centred_keys=False), plan, windows.shape[1])

    def keep(graph: Graph) -> tuple[str, ...]:
        return (KEYS,) if graph is dec.layer else ()

    total = np.zeros((config.num_layers, config.num_kv_heads, config.head_dim))
    for start in range(0, len(windows), batch):
        ids = jnp.asarray(windows[start : start + batch], jnp.int32)
        for graph, layer, env in passes(dec, params, ids, keep):
            if graph is dec.layer:
                total[layer] += np.asarray(env[KEYS][:, SINKS:].sum(axis=(0, 1)))
            if graph is dec.layer and layer == config.num_layers - 1:
                break  # the head is not looked at
    return (total / (windows.size - SINKS * len(windows))).astype(np.float32)


def centre_keys(
    config: ModelConfig, params: Params, centres: Float32[np.ndarray, "L N K"]
) -> tuple[ModelConfig, Params]:
    """Takes the centres from all keys: the same function.

    Args:
      params: folded parameters, without prefix: a prefix is made of the centred model.

    Returns:
      The configuration with `centred_keys`, and the parameters with `layers.attn.rope.k_centre`
      (L, 1, N, K), which the graph adds: minus the centres.
    """
    return replace(config, centred_keys=True), {**params, CENTRE: -centres[:, None]}
