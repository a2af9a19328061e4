"""Metadata of a GGUF file: what a model computes, as llama.cpp reads it.

Biases and tied embeddings are not stated there: the file has them where it has their tensors.

Reference: llama.cpp src/llama-model.cpp, `load_hparams`; gguf-py/gguf/constants.py, `Keys`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qnpu_jax.config import LayerKind, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.models.families import FAMILIES, by_gguf, named
from qnpu_jax.models.family import Family, kinds_of, layer_count
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.gguf_rope import rope_scaling
from qnpu_jax.models.llama import HEAD, LINEARS
from qnpu_jax.models.rope_scaling import positions

WAY_OUT = "use another conversion of the model, or its Hugging Face folder"
KNOWN = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "tensor_data_layout",
        "pooling_type",
        *(
            "attention." + key
            for key in ("head_count", "head_count_kv", "key_length", "value_length")
        ),
        *("attention." + key for key in ("layer_norm_rms_epsilon", "causal")),
        *("rope." + key for key in ("freq_base", "dimension_count", "scale_linear")),
        *("rope.scaling." + key for key in ("type", "factor", "attn_factor", "finetuned")),
        "rope.scaling.original_context_length",
        *("rope.scaling.yarn_" + key for key in ("ext_factor", "attn_factor", "log_multiplier")),
        *("rope.scaling.yarn_" + key for key in ("beta_fast", "beta_slow")),
    }
)
"""Keys of every family, without its name before them.

Any other key must be 0 or empty, unless the family reads it: it may change the computation.
"""


def read_family(file: GgufFile) -> Family:
    """Finds the family of a file's model.

    Raises:
      UserError: one part of a model, or another architecture.
    """
    name, meta = file.path.name, file.metadata
    # Parts after the first have no architecture of their own.
    parts, part = meta.get("split.count", 0), meta.get("split.no", 0)
    if parts not in (0, 1):
        raise UserError(
            f"{name}: part {part + 1} of {parts}; expected a whole model;"
            " join the parts with llama-gguf-split --merge"
        )
    got = meta.get("general.architecture")
    if (family := by_gguf(got)) is None:
        raise UserError(
            f"{name}: architecture {got!r}; expected one of {named(f.gguf for f in FAMILIES)};"
            " use a model of these families"
        )
    return family


def read_config(file: GgufFile, context: int | None = None) -> ModelConfig:
    """Reads what the model computes from the metadata.

    Args:
      context: tokens that the model must hold, see `rope_scaling.positions`.

    Raises:
      UserError: another architecture, a missing or impossible value, or a key that is not known.
    """
    family = read_family(file)
    meta = fields(file, family)
    _check_known(meta, family)
    count = layer_count(meta, "block_count")
    shape = _shape(file, meta, family)
    rotated = shape["rotary_dim"] or shape["head_dim"]
    theta = meta.real("rope.freq_base", 10000.0)
    kind = LayerKind(theta, rope_scaling(file, meta, rotated, theta, context))
    layers = kinds_of(family.gguf_layers(meta, kind, count))
    trained = meta.count("context_length")
    biases = tuple(n for n, (_, gguf) in LINEARS.items() if f"blk.0.{gguf}.bias" in file.tensors)
    return ModelConfig(
        family=family.name,
        num_layers=count,
        max_positions=positions(meta.where, trained, layers["kinds"], context),
        **{**shape, **layers, **family.facts, **family.gguf_facts(meta), "biases": biases},
    )


def fields(file: GgufFile, family: Family) -> Fields:
    """Gives the metadata of the model, by keys without the family's name."""
    prefix = f"{family.gguf}."
    data = {
        key.removeprefix(prefix): _shortest(value)
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    return Fields(data, file.path.name, prefix, WAY_OUT)


def _shortest(value: Any) -> Any:
    # GGUF stores float32: 1e-5 comes back as 9.999999747e-06. The shortest decimal was meant.
    if isinstance(value, float) and abs(value) <= np.finfo(np.float32).max:
        return float(str(np.float32(value)))
    return value


def _check_known(meta: Fields, family: Family) -> None:
    known = KNOWN | family.gguf_reads
    for key, value in meta.data.items():
        if key not in known and value not in (0, False, "", []):
            raise meta.bad(key, "absent, as it may change what the model computes")
    if not meta.flag("attention.causal", True):
        raise meta.bad("attention.causal", "true", "a model that looks ahead generates no text")
    if not meta.flag("rope.scaling.finetuned", True) and family.name == "granite":
        raise meta.bad("rope.scaling.finetuned", "true: without RoPE this family is not known")


def _shape(file: GgufFile, meta: Fields, family: Family) -> dict[str, Any]:
    heads, hidden = meta.count("attention.head_count"), meta.count("embedding_length")
    kv_heads = meta.count("attention.head_count_kv", heads)
    head_dim = meta.count("attention.key_length", hidden // heads)
    if heads % kv_heads:
        raise meta.bad("attention.head_count_kv", f"a divisor of {heads}")
    if head_dim < 2 or head_dim % 2:
        raise meta.bad("attention.key_length", "even")
    if meta.count("attention.value_length", head_dim) != head_dim:
        raise meta.bad("attention.value_length", f"the head size {head_dim}")
    rotated = meta.count("rope.dimension_count", head_dim)
    if rotated != head_dim and "partial_rotary_factor" not in family.reads:
        raise meta.bad("rope.dimension_count", f"the head size {head_dim}")
    if rotated > head_dim or rotated % 2:
        raise meta.bad("rope.dimension_count", f"even and {head_dim} at most")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return {
        "vocab_size": meta.count("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": hidden,
        "intermediate_size": meta.count("feed_forward_length"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": None if rotated == head_dim else rotated,
        "rms_norm_eps": meta.real("attention.layer_norm_rms_epsilon", 1e-5),
        "tie_embeddings": HEAD[1] not in file.tensors,
    }
