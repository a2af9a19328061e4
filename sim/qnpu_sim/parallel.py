"""Data parallelism: every device has all weights and runs a share of a batch's sequences.

Sequences do not depend on each other, so devices exchange nothing, and the bits are those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BATCH = "batch"
"""Name of the mesh's only axis."""
_ALL, _SHARE = PartitionSpec(), PartitionSpec(_BATCH)


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """Puts devices into a mesh of one axis."""
    return Mesh(np.asarray(devices), (_BATCH,))


def replicate(mesh: Mesh, arrays: Any) -> Any:
    """Copies every array of a pytree to every device."""
    return jax.device_put(arrays, NamedSharding(mesh, _ALL))


def spread(mesh: Mesh, ids: jax.Array) -> jax.Array:
    """Shares token ids out over the devices.

    Args:
      ids: (B, T), padded with sequences of token 0 to a multiple of the devices; or (T,), copied to
        every device.
    """
    if ids.ndim == 1:
        return replicate(mesh, ids)
    padded = jnp.pad(ids, ((0, -ids.shape[0] % mesh.size), (0, 0)))
    return jax.device_put(padded, NamedSharding(mesh, _SHARE))


def shards(mesh: Mesh, function: Callable[..., Any], *, batched: bool) -> Callable[..., Any]:
    """Wraps function(*constants, values) to run on every device of the mesh.

    Args:
      batched: each device gets its share of the values, along their first axis; otherwise it gets
        all of them. Constants are the same everywhere.
    """
    share = _SHARE if batched else _ALL

    def call(*args: Any) -> Any:
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(*(_ALL for _ in args[1:]), share),
            out_specs=share,
            check_vma=False,  # JAX cannot prove that unbatched results are the same on every device
        )(*args)

    return call
