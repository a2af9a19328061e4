"""Llama 1 to 3.2: the family that others depart from, and the table of a checkpoint's tensors.

Both loaders and their checks read this table; names and shapes stand nowhere else.

Reference: transformers/models/llama/; llama.cpp conversion/llama.py,
gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qnpu_jax.config import ModelConfig
from qnpu_jax.models.family import Facts, Family
from qnpu_jax.models.fields import Fields

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
MLP = ("mlp.gate", "mlp.up", "mlp.down")
"""Linears of the two blocks of a layer."""
EMBED = ("model.embed_tokens.weight", "token_embd.weight")
HEAD = ("lm_head.weight", "output.weight")
"""Names of the tables: Hugging Face's, GGUF's. Tied embeddings leave the head's out."""
LINEARS = {
    "attn.q": ("self_attn.q_proj", "attn_q"),
    "attn.k": ("self_attn.k_proj", "attn_k"),
    "attn.v": ("self_attn.v_proj", "attn_v"),
    "attn.o": ("self_attn.o_proj", "attn_output"),
    "mlp.gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up": ("mlp.up_proj", "ffn_up"),
    "mlp.down": ("mlp.down_proj", "ffn_down"),
}
"""Names of the linears of a layer in files."""
FUSED = {
    ("attn.q", "attn.k", "attn.v"): ("self_attn.qkv_proj", "attn_qkv"),
    ("mlp.gate", "mlp.up"): ("mlp.gate_up_proj", "ffn_up"),
}
"""Linears that some files hold as one, rows one below the other."""


def attention_biases(config: Fields) -> Facts:
    """Reads `attention_bias`: of all four linears of attention, or of none."""
    return {"biases": ATTENTION if config.flag("attention_bias") else ()}


def biases(config: Fields) -> Facts:
    """Reads `attention_bias` and `mlp_bias`."""
    mlp = MLP if config.flag("mlp_bias") else ()
    return {"biases": (*attention_biases(config)["biases"], *mlp)}


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    gguf="llama",
    defaults={"max_position_embeddings": 2048},
    reads=frozenset({"attention_bias", "mlp_bias"}),
    permuted=True,
    hf_facts=biases,
)


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold, or one per layer where its names contain `{i}`.

    Attributes:
      param: name in `Checkpoint.params`, where tensors of the layers are stacked on axis 0.
      shape: shape of the parameter, for one layer; weights are (out, in).
      hf, gguf: names in safetensors and GGUF files.
      stored_rows: rows in the file where it holds several parameters one below the other; those
        of one stored tensor follow each other in the table.
    """

    param: str
    shape: tuple[int, ...]
    hf: str
    gguf: str
    stored_rows: int | None = None

    @property
    def per_layer(self) -> bool:
        return self.param.startswith("layers.")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.stored_rows is None else (self.stored_rows, *self.shape[1:])


def expected_tensors(cfg: ModelConfig, fused: bool = False) -> tuple[ExpectedTensor, ...]:
    """Lists all tensors of a model of this configuration.

    Args:
      fused: whether files hold the linears of `FUSED` as one.
    """
    v, d = cfg.vocab_size, cfg.hidden_size
    return (
        ExpectedTensor("embed.weight", (v, d), *EMBED),
        *_norms(cfg, "attn"),
        *_linears(cfg, ATTENTION, fused),
        *_norms(cfg, "mlp"),
        *_linears(cfg, MLP, fused),
        ExpectedTensor("head.norm.gamma", (d,), "model.norm.weight", "output_norm.weight"),
        *(() if cfg.tie_embeddings else (ExpectedTensor("head.weight", (v, d), *HEAD),)),
    )


def _norms(cfg: ModelConfig, block: str) -> list[ExpectedTensor]:
    """Lists the norms of a block: before it, after it, and those of queries and keys."""
    d = cfg.hidden_size
    # Llama's norm before the MLP is called post_attention_layernorm, as it stands after attention.
    # Families with a norm of attention's output give that one the name.
    after_attention = "post_attention_layernorm"
    before_mlp = after_attention if cfg.norms == "before" else "pre_feedforward_layernorm"
    names = {
        "attn": (("input_layernorm", "attn_norm"), (after_attention, "post_attention_norm")),
        "mlp": ((before_mlp, "ffn_norm"), ("post_feedforward_layernorm", "post_ffw_norm")),
    }
    before, after = names[block]
    norms = []
    if cfg.norms != "after":
        norms.append(_layer_tensor(f"{block}.norm.gamma", (d,), *before))
    if cfg.norms != "before":
        norms.append(_layer_tensor(f"{block}.post_norm.gamma", (d,), *after))
    if block == "attn" and cfg.qk_norm:
        heads = (1, 1) if cfg.qk_norm == "head" else (cfg.num_heads, cfg.num_kv_heads)
        for x, count in zip("qk", heads, strict=True):
            names_of = (f"self_attn.{x}_norm", f"attn_{x}_norm")
            norms.append(_layer_tensor(f"attn.{x}_norm.gamma", (count * cfg.head_dim,), *names_of))
    return norms


def _linears(cfg: ModelConfig, linears: Sequence[str], fused: bool) -> list[ExpectedTensor]:
    d, f = cfg.hidden_size, cfg.intermediate_size
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    shapes = {"attn.q": (q, d), "attn.k": (kv, d), "attn.v": (kv, d), "attn.o": (d, q)}
    shapes |= {"mlp.gate": (f, d), "mlp.up": (f, d), "mlp.down": (d, f)}
    groups = {name: group for group in FUSED for name in group} if fused else {}
    tensors = []
    for name in linears:
        group = groups.get(name, ())
        names = FUSED[group] if group else LINEARS[name]
        rows = sum(shapes[other][0] for other in group) or None
        weight = _layer_tensor(f"{name}.weight", shapes[name], *names)
        tensors.append(replace(weight, stored_rows=rows))
        if name in cfg.biases:
            tensors.append(_layer_tensor(f"{name}.bias", shapes[name][:1], *names))
    return tensors


def _layer_tensor(param: str, shape: tuple[int, ...], hf: str, gguf: str) -> ExpectedTensor:
    """Makes the tensor of a layer; what its file calls it ends as a bias does, or a weight."""
    end = "bias" if param.endswith(".bias") else "weight"
    names = (f"model.layers.{{i}}.{hf}.{end}", f"blk.{{i}}.{gguf}.{end}")
    return ExpectedTensor(f"layers.{param}", shape, *names)
