"""Wide linears block by block: the accumulators of a vocabulary are a hundred megabytes, and
writing them to memory to read them again costs as much as the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 1024
"""Channels of a block: 2 MB of accumulators at 512 tokens, of which caches keep some."""
WIDE = 8 * BLOCK
"""Channels from which on blocks are faster; measured on CPUs, and used there only."""


def by_channels(
    function: Callable[[jax.Array, jax.Array, Any], jax.Array], x: jax.Array, w: jax.Array, c: Any
) -> jax.Array:
    """function(x, w, c), for `WIDE` weights and more over blocks of channels: the same bits.

    Args:
      function: of (T, K) codes, (N, K) weights and constants to (T, N), channel by channel.
      c: a tree of leaves () or (N,).
    """
    size = w.shape[0]
    if size < WIDE or jax.default_backend() != "cpu":
        return function(x, w, c)
    whole = size - size % BLOCK
    leaves, tree = jax.tree.flatten(c)

    def constants(of_channel: Callable[[jax.Array], jax.Array]) -> Any:
        return tree.unflatten([of_channel(leaf) if jnp.ndim(leaf) else leaf for leaf in leaves])

    def block(start: jax.Array) -> jax.Array:
        def cut(leaf: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(leaf, start, BLOCK)

        return function(x, cut(w), constants(cut))

    blocks = jax.lax.map(block, jnp.arange(0, whole, BLOCK, dtype=jnp.int32))
    y = blocks.swapaxes(0, 1).reshape(x.shape[0], whole)
    if whole == size:
        return y
    rest = function(x, w[whole:], constants(lambda leaf: leaf[whole:]))
    return jnp.concatenate([y, rest], 1)
