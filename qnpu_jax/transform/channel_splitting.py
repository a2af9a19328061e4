"""Outlier channel splitting: the MLP's loudest channels in several copies, each with its share.

  down(x) = sum_j W_j x_j,  x_j = f(gate_j) up_j
  channel j in k copies: gate_j in each, up_j / k in each, and W_j for each

The sum is the same, and the copies of x_j reach a k-th as far: one range holds all channels of a
static tensor, and where two of them reach ten times further than the others, those are left a tenth
of the codes. A factor on the channel would do that too, and its inverse would make the column of
`down` louder, which 4-bit weights do not bear; copies leave the column as it is. The price is a
wider MLP.

Letters: L layers, F intermediate size, D hidden size.

Reference: Zhao et al., Improving Neural Network Quantization without Retraining using Outlier
Channel Splitting (arXiv 1901.09504), section 3, with a channel in more than two copies.
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qnpu_jax.config import ModelConfig
from qnpu_jax.graph import Params

_CHANNEL_AXIS = {"gate.weight": 1, "gate.bias": 1, "up.weight": 1, "up.bias": 1, "down.weight": 2}
"""Of the tensors `layers.mlp.*`: the axis of the channels, after that of the layers."""


def channel_copies(peaks: Float[np.ndarray, "L F"], extra: int) -> Int[np.ndarray, "L F"]:
    """Chooses copies k, 1 or more, of which each layer gets F + `extra`, so that the furthest
    reaching copy of a layer, max_j peak_j / k_j, is as near as can be.

    >>> channel_copies(np.asarray([[1.0, 9.0, 4.0]]), 3).tolist()
    [[1, 3, 2]]

    Args:
      peaks: largest |x| of each channel, 0 or more (`channel_peaks`).
      extra: 0 or more.
    """
    copies = np.ones(peaks.shape, np.int64)
    for of, k in zip(peaks.astype(np.float64), copies, strict=True):
        furthest = [(-peak, j) for j, peak in enumerate(of)]
        heapq.heapify(furthest)
        for _ in range(extra):
            j = furthest[0][1]
            k[j] += 1
            heapq.heapreplace(furthest, (-of[j] / k[j], j))
    return copies


def split_channels(
    config: ModelConfig, params: Params, copies: Int[np.ndarray, "L F"]
) -> tuple[ModelConfig, Params]:
    """Returns configuration and parameters of the same function, with the MLP's channels in copies.

    Args:
      params: folded parameters, with a prefix or without.
      copies: of each channel, 1 or more; as many in all in every layer (`channel_copies`).

    Example:
      >>> sizes = dict(family="a", hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
      >>> sizes |= dict(num_kv_heads=1, head_dim=8, vocab_size=8, max_positions=8)
      >>> split_channels(ModelConfig(**sizes), {}, np.full((1, 8), 2))[0].intermediate_size
      16
    """
    _, channels = copies.shape
    of = np.stack([np.repeat(np.arange(channels), k) for k in copies])
    share = (1 / np.take_along_axis(copies, of, axis=1)).astype(np.float32)
    made = dict(params)
    for name, axis in _CHANNEL_AXIS.items():
        if (full := f"layers.mlp.{name}") in params:
            shape = [len(of), 1, 1][: params[full].ndim]
            shape[axis] = of.shape[1]
            x = jnp.take_along_axis(params[full], jnp.asarray(of.reshape(shape)), axis=axis)
            made[full] = x * share.reshape(shape) if name.startswith("up") else x
    return replace(config, intermediate_size=of.shape[1]), made
