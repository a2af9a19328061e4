"""Data parallelism: the sequences of a batch are shared out over devices, each of which has all
weights.

Sequences do not meet, so nothing is exchanged, and the bits are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_BATCH = "batch"
"""The one axis of a mesh."""
_ALL, _SHARE = PartitionSpec(), PartitionSpec(_BATCH)


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """The devices in a row."""
    return Mesh(np.asarray(devices), (_BATCH,))


def replicate(mesh: Mesh, arrays: Any) -> Any:
    """All arrays of a tree on every device."""
    return jax.device_put(arrays, NamedSharding(mesh, _ALL))


def spread(mesh: Mesh, ids: jax.Array) -> jax.Array:
    """(T,) ids on every device, (B, T) ids shared out: with sequences of token 0 after them up to a
    multiple of the devices, which change nothing in the others."""
    if ids.ndim == 1:
        return replicate(mesh, ids)
    padded = jnp.pad(ids, ((0, -ids.shape[0] % mesh.size), (0, 0)))
    return jax.device_put(padded, NamedSharding(mesh, _SHARE))


def shards(mesh: Mesh, function: Callable[..., Any], *, batched: bool) -> Callable[..., Any]:
    """function(constants..., values) on every device, with all constants and its own share of the
    values; with all of them where they are not `batched`."""
    share = _SHARE if batched else _ALL

    def call(*args: Any) -> Any:
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(*(_ALL for _ in args[1:]), share),
            out_specs=share,
            check_vma=False,  # JAX cannot see that what is not batched is computed alike everywhere
        )(*args)

    return call
