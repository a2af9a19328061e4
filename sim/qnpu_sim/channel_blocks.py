"""Wide linears in blocks of output channels, so that accumulators stay in the CPU's caches.

The int32 accumulators of a whole vocabulary take a hundred megabytes. Writing them to memory and
reading them again costs as much as the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 1024
"""Channels of a block: 2 MB of accumulators at 512 tokens."""
WIDE = 8 * BLOCK
"""Fewest channels for which blocks are faster, measured on CPUs."""


def by_channels(
    function: Callable[[jax.Array, jax.Array, Any], jax.Array], x: jax.Array, w: jax.Array, c: Any
) -> jax.Array:
    """Computes function(x, w, c), on a CPU in blocks of channels if there are `WIDE` or more.

    The bits are the same: each output channel depends on its own weights and constants only.

    Args:
      function: maps (T, K) codes, (N, K) weights and constants to (T, N), channel by channel.
      x: (T, K) codes.
      w: (N, K) codes.
      c: a pytree of constants; every leaf is a scalar or (N,).

    Returns:
      (T, N).
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
