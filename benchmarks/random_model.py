"""SmolLM2-135M's shapes with random integers: codes change no speed, and nothing has to be read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.graph.decoder import decoder
from qnpu_jax.graph.ops import WIDENING, Requantize
from qnpu_jax.integer.model import IntegerModel, QTensor
from qnpu_jax.recipes import RECIPES

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    tie_embeddings=True,
)


def random_model(recipe: str | BitPlan, config: ModelConfig = SMOLLM2) -> IntegerModel:
    """A model of these shapes in the bits of a recipe or plan, with a prefix of two tokens.

    Weights have the bits of layer 0's.
    """
    plan = RECIPES[recipe].bits if isinstance(recipe, str) else recipe
    rng = np.random.default_rng(0)
    graphs = [
        g for logits in ("all", "last") for g in decoder(config, plan, 1, 2, 1, logits).graphs
    ]
    tensors: dict[str, QTensor] = {}
    for graph in graphs:
        stack = (config.num_layers,) if graph.layered else ()
        for spec in graph.tensors:
            name = graph.prefix + spec.name
            if name in tensors:
                continue
            channels = () if spec.quant.axis is None else (spec.shape[spec.quant.axis],)
            fixed = np.asarray(spec.fixed or (0.01,))  # by layer, or the same in all
            value = fixed.reshape(-1, *(1 for _ in channels)) if stack else fixed[0]
            codes = None
            if spec.kind == "param":
                bias = name.endswith("bias")
                top = 127 if bias else 2 ** (spec.quant.bits[0] - 1) - 1
                dtype = np.int32 if bias else np.int8
                codes = rng.integers(-top, top + 1, stack + spec.shape).astype(dtype)
            tensors[name] = QTensor(
                scale=np.full(stack + channels, value, np.float32),
                zero_point=np.zeros(stack, np.int32),
                codes=codes,
            )
        for node in graph.nodes:
            if not isinstance(node.op, Requantize):
                continue
            source, made = (np.array(graph[x].quant.bits) for x in (node.inputs[0], node.output))
            if (source < made).any():
                # Exact, as in a model that `freeze` made.
                wider = (source < made) if graph.layered else (source < made)[0]
                scale = tensors[graph.prefix + node.inputs[0]].scale
                name = graph.prefix + node.output
                finer = np.where(wider, scale / np.float32(WIDENING), scale)
                tensors[name] = replace(tensors[name], scale=finer)
    return IntegerModel(config, plan, (0, 0), tensors)
