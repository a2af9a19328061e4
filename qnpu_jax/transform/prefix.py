"""Prefix tokens whose keys and values go before every sequence: attention sinks as constants.

A decoder gives some token early in a sequence a massive activation, hundreds of times larger
than all others, which no static scale can hold. Their K and V are computed once in float and stored
as constants; every later token attends to them and grows no sink of its own.

Reference: Chen et al., PrefixQuant (arXiv 2410.05265).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.fakequant import passes
from qnpu_jax.graph import Params, decoder


def add_prefix(
    config: ModelConfig, plan: BitPlan, params: Params, tokens: tuple[int, ...]
) -> Params:
    """Adds the keys and values of a prefix to the parameters.

    Args:
      params: folded float parameters.
      tokens: P ids; with none the parameters have no prefix.

    Returns:
      The parameters with `layers.attn.prefix_k` (L, N, P, K), after RoPE, and
      `layers.attn.prefix_v` (L, N, K, P), float32.
    """
    params = without_prefix(params)
    if not tokens:
        return params
    rows = prefix_rows(config, plan, params, tokens, len(tokens))
    return {**params, **{name: np.asarray(x) for name, x in rows.items()}}


def without_prefix(params: Params) -> Params:
    """Drops the keys and values of a prefix."""
    return {name: x for name, x in params.items() if ".prefix_" not in name}


def prefix_length(params: Params) -> int:
    """Counts the tokens whose keys and values these parameters hold."""
    rows = params.get("layers.attn.prefix_k")
    return 0 if rows is None else rows.shape[2]


def prefix_rows(
    config: ModelConfig, plan: BitPlan, params: Params, tokens: tuple[int, ...], slots: int
) -> dict[str, jax.Array]:
    """Computes `layers.attn.prefix_{k,v}` with `slots` places, the tokens in the first of them.

    The model is causal: what fills the other places changes nothing of those before.
    """
    dec = decoder(config, plan, slots)
    ids = np.zeros((1, slots), np.int32)
    ids[0, : len(tokens)] = tokens
    rows: dict[str, list[jax.Array]] = {"k": [], "v": []}
    for graph, layer, env in passes(dec, without_prefix(params), jnp.asarray(ids), _outputs):
        if graph is dec.layer:
            for letter, stack in rows.items():
                stack.append(env[f"attn.{letter}_rows"][0])
            if layer == config.num_layers - 1:
                break  # the head is not looked at
    return {f"layers.attn.prefix_{x}": jnp.stack(stack) for x, stack in rows.items()}


def _outputs(graph) -> tuple[str, ...]:
    return graph.outputs
