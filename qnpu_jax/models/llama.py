"""Table of all tensors of a Llama checkpoint: names (ours, Hugging Face's, GGUF's) and shapes.

Both loaders and their checks read this table; names and shapes stand nowhere else.

Reference: transformers/models/llama/modeling_llama.py; llama.cpp gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from qnpu_jax.config import ModelConfig


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold, or one per layer where its names contain `{i}`.

    Attributes:
      param: name in `Checkpoint.params`, where tensors of the layers are stacked on axis 0.
      shape: shape in the file, for one layer; weights are (out, in).
      hf, gguf: names in safetensors and GGUF files.
    """

    param: str
    shape: tuple[int, ...]
    hf: str
    gguf: str

    @property
    def per_layer(self) -> bool:
        return self.param.startswith("layers.")


def expected_tensors(cfg: ModelConfig) -> tuple[ExpectedTensor, ...]:
    """Lists all tensors of a model of this configuration."""
    v, d, f = cfg.vocab_size, cfg.hidden_size, cfg.intermediate_size
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    return (
        ExpectedTensor("embed.weight", (v, d), "model.embed_tokens.weight", "token_embd.weight"),
        _norm("attn", d, "input_layernorm", "attn_norm"),
        *_linear("attn.q", (q, d), "self_attn.q_proj", "attn_q", "attn.q" in cfg.biases),
        *_linear("attn.k", (kv, d), "self_attn.k_proj", "attn_k", "attn.k" in cfg.biases),
        *_linear("attn.v", (kv, d), "self_attn.v_proj", "attn_v", "attn.v" in cfg.biases),
        *_linear("attn.o", (d, q), "self_attn.o_proj", "attn_output", "attn.o" in cfg.biases),
        _norm("mlp", d, "post_attention_layernorm", "ffn_norm"),
        *_linear("mlp.gate", (f, d), "mlp.gate_proj", "ffn_gate", "mlp.gate" in cfg.biases),
        *_linear("mlp.up", (f, d), "mlp.up_proj", "ffn_up", "mlp.up" in cfg.biases),
        *_linear("mlp.down", (d, f), "mlp.down_proj", "ffn_down", "mlp.down" in cfg.biases),
        ExpectedTensor("head.norm.gamma", (d,), "model.norm.weight", "output_norm.weight"),
        *(() if cfg.tie_embeddings else (ExpectedTensor("head.weight", (v, d), *HEAD),)),
    )


ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
"""Linears of the two blocks of a layer."""
HEAD = ("lm_head.weight", "output.weight")
"""Names of the head's weight, which tied embeddings leave out: Hugging Face's, GGUF's."""


def _norm(block: str, size: int, hf: str, gguf: str) -> ExpectedTensor:
    return ExpectedTensor(
        f"layers.{block}.norm.gamma",
        (size,),
        f"model.layers.{{i}}.{hf}.weight",
        f"blk.{{i}}.{gguf}.weight",
    )


def _linear(
    name: str, shape: tuple[int, int], hf: str, gguf: str, bias: bool
) -> tuple[ExpectedTensor, ...]:
    shapes = {"weight": shape, "bias": shape[:1]} if bias else {"weight": shape}
    return tuple(
        ExpectedTensor(
            f"layers.{name}.{kind}",
            s,
            f"model.layers.{{i}}.{hf}.{kind}",
            f"blk.{{i}}.{gguf}.{kind}",
        )
        for kind, s in shapes.items()
    )
