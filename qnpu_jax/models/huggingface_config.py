"""config.json of a Hugging Face folder: what a model computes, with transformers' defaults.

Reference: transformers/models/<model_type>/configuration_<model_type>.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qnpu_jax.config import LayerKind, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.models.families import FAMILIES, by_model_type, named
from qnpu_jax.models.family import Facts, Family, kinds_of, layer_count
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.rope_scaling import POSITIONS, layer_kind, positions
from qnpu_jax.models.tokenizer import read_json

DEFAULTS: Facts = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
"""Values that transformers assumes for absent keys, unless a family says otherwise."""
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
MULTIMODAL = {
    "gemma3": "text = Gemma3ForCausalLM(whole.config.text_config); text.model ="
    " whole.model.language_model; text.save_pretrained(folder)"
}
"""Models of text and images, by model_type: how to save their text part."""
NULL_IS_NONE = ("num_key_value_heads", "sliding_window")
"""Keys whose null does not mean the default: as many heads as queries have, and no window."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": ({},),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "query_pre_attn_scalar": (),
    "clip_qkv": (0,),
    "attention_chunk_size": (0,),
    "attn_temperature_tuning": (False, 0),
    "alibi": (False,),
    "partial_rotary_factor": (1,),
    "rope_local_base_freq": (),
    "no_rope_layers": (),
    "no_rope_layer_interval": (0,),
    "sliding_window": (0,),
    "sliding_window_pattern": (1,),
    "use_sliding_window": (False,),
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0, 1),
}
"""Keys that change what some model computes, with the values that change nothing.

A family takes any value of the keys that it reads, and these values of the others.
"""


WAYS_OUT = {
    "quantization_config": "use the model it was quantized from",
    "partial_rotary_factor": "this family rotates whole heads only: use a model that does",
    "is_causal": "a model that looks ahead generates no text: use one that does not",
    "use_bidirectional_attention": "a model that looks ahead generates no text: use another",
}
"""What to do about some of these keys."""


def read_family(folder: Path) -> Family:
    """Finds the family of a folder's model.

    Raises:
      UserError: no config.json, or another architecture.
    """
    data, where = _read(folder)
    kind, names = str(data.get("model_type")), data.get("architectures") or []
    names = [names] if isinstance(names, str) else names
    family = by_model_type(kind)
    if family and names in ([], [family.architecture]):
        return family
    got = names[0] if isinstance(names, list) and names else names or kind
    if kind in MULTIMODAL:
        raise UserError(
            f"{where}: architecture {got!r} (model_type {kind!r}) is a model of text and images;"
            f" expected its text part alone; with transformers: {MULTIMODAL[kind]}, or use a size"
            " without images"
        )
    raise UserError(
        f"{where}: architecture {got!r} (model_type {kind!r}) is unknown; expected one of"
        f" {named(f.architecture for f in FAMILIES)}; use a model of these families"
    )


def read_config(folder: Path, context: int | None = None) -> ModelConfig:
    """Reads what the model computes from config.json.

    Args:
      context: tokens that the model must hold, see `rope_scaling.positions`.

    Raises:
      UserError: no config.json, another architecture, a missing or impossible value, or one that
        changes the computation in a way that is not known here.
    """
    family = read_family(folder)
    config = _fields(folder, family)
    _check_neutral(config, family)
    count = layer_count(config, "num_hidden_layers")
    shape = _shape(config)
    rope = family.rope(config)
    shape |= _rotary_dim(config, family, rope, shape["head_dim"])
    kind = layer_kind(config, rope, context)
    layers = kinds_of(family.hf_layers(config, kind, count))
    _check_divisors(config, layers["kinds"], shape["rotary_dim"] or shape["head_dim"])
    return ModelConfig(
        family=family.name,
        num_layers=count,
        max_positions=positions(config.where, config.count(POSITIONS), layers["kinds"], context),
        **{**shape, **layers, **family.facts, **family.hf_facts(config), **_activation(config)},
    )


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    data, where = read_json(folder / "config.json"), f"{folder.name}/config.json"
    if not data:
        raise UserError(
            f"{where} is missing or empty; expected the model's configuration; copy it there"
        )
    return data, where


def _fields(folder: Path, family: Family) -> Fields:
    """Reads config.json with the family's defaults for keys that are absent or null."""
    data, where = _read(folder)
    none = {key for key in NULL_IS_NONE if key in data and data[key] is None}
    given = {key: value for key, value in data.items() if value is not None}
    data = {**DEFAULTS, **family.defaults, **given}
    return Fields({key: value for key, value in data.items() if key not in none}, where)


def _check_neutral(config: Fields, family: Family) -> None:
    """Raises UserError for a key that changes the computation and is not of this family."""
    way_out = f"{family.architecture} is known without it only: use a model without it"
    for key, neutral in NEUTRAL.items():
        if key in family.reads or key not in config or config.get(key) in neutral:
            continue
        wide = key == "sliding_window" and config.count(key) >= config.count(POSITIONS)
        if not wide:
            expected = " or ".join(map(repr, neutral)) or "absent"
            raise config.bad(key, expected, WAYS_OUT.get(key, way_out))
    types = config.get("layer_types", [])
    if "layer_types" not in family.reads and any(t != "full_attention" for t in types):
        raise config.bad("layer_types", "full_attention alone", way_out)


def _shape(config: Fields) -> dict[str, Any]:
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    kv_heads = config.count("num_key_value_heads", heads)
    head_dim = config.count("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(
            f"{config.where}: {heads} heads of size {head_dim} over {kv_heads} key/value heads;"
            " expected a multiple and an even size;"
            " correct num_attention_heads, num_key_value_heads or head_dim"
        )
    return {
        "vocab_size": config.count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.count("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config.real("rms_norm_eps"),
        "tie_embeddings": config.flag("tie_word_embeddings"),
    }


def _rotary_dim(config: Fields, family: Family, rope: Fields, head_dim: int) -> dict[str, Any]:
    """Reads how many channels of a head rotate, for families that may rotate a part."""
    key = "partial_rotary_factor"
    found = rope if key in rope else config
    part = found.real(key, 1.0)
    rotary_dim = int(head_dim * part)
    if part != 1.0 and key not in family.reads:
        raise found.bad(key, "1.0", f"{family.architecture} rotates whole heads only")
    if part > 1.0 or rotary_dim < 2 or rotary_dim % 2:
        raise found.bad(key, f"a part of {head_dim} channels that is even")
    return {"rotary_dim": None if rotary_dim == head_dim else rotary_dim}


def _check_divisors(config: Fields, kinds: Sequence[LayerKind], rotated: int) -> None:
    for kind in kinds:
        scaling = kind.rope_scaling
        if scaling and scaling.kind == "longrope" and len(scaling.divisors) != rotated // 2:
            raise UserError(
                f"{config.where}: longrope has {len(scaling.divisors)} factors; expected"
                f" {rotated // 2}, one of each pair of {rotated} channels; correct"
                " short_factor and long_factor"
            )


def _activation(config: Fields) -> dict[str, Any]:
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    if config.get(key) not in ACTIVATIONS:
        raise config.bad(key, f"one of {named(ACTIVATIONS)}", "use a model with one of these")
    return {"activation": ACTIVATIONS[config.get(key)]}
