"""The graph in float, and on the integer grid with straight-through gradients."""

from qnpu_jax.fakequant.compiling import BRIEF, Options, jit_brief
from qnpu_jax.fakequant.edged_pass import (
    decoder_logits,
    recorded_logits,
    under_roots,
    with_errors,
)
from qnpu_jax.fakequant.evaluate import Edge, evaluate
from qnpu_jax.fakequant.fake_quant import fake_quant, lsq_factor, round_ste, scale_gradient
from qnpu_jax.fakequant.forward import (
    Hidden,
    Reading,
    forward,
    head,
    hidden,
    scanned_inputs,
    shared_inputs,
    token_nll,
)
from qnpu_jax.fakequant.passes import EdgeOfBits, graph_tensors, passes, windows_at_once

__all__ = [
    "BRIEF",
    "Edge",
    "EdgeOfBits",
    "Hidden",
    "Options",
    "Reading",
    "decoder_logits",
    "evaluate",
    "fake_quant",
    "forward",
    "graph_tensors",
    "head",
    "hidden",
    "jit_brief",
    "lsq_factor",
    "passes",
    "recorded_logits",
    "round_ste",
    "scale_gradient",
    "scanned_inputs",
    "shared_inputs",
    "token_nll",
    "under_roots",
    "windows_at_once",
    "with_errors",
]
