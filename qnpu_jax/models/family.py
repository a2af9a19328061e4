"""Families of checkpoints: what each calls its things, and how it departs from Llama.

One small file defines a family for both loaders. What a model computes goes into `ModelConfig` as
facts; afterwards nothing asks for the family.

Reference: transformers/models/<model_type>/configuration_<model_type>.py; llama.cpp conversion/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qnpu_jax.config import LayerKind
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.rope_scaling import rope_parameters

MOST_LAYERS = 4096

Facts = Mapping[str, Any]
"""Fields of `ModelConfig` by name."""


def no_facts(_: Fields) -> Facts:
    return {}


def alike(_: Fields, kind: LayerKind, count: int) -> Sequence[LayerKind]:
    """Makes all layers of one kind."""
    return [kind] * count


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
      name: for people; transformers' `model_type`, without what marks a part of a larger model.
      model_type, architecture: names in config.json.
      gguf: `general.architecture`, and what the names of its metadata begin with.
      defaults: values that transformers assumes for keys absent in config.json.
      reads: keys of `huggingface.NEUTRAL` that it reads; of the others it takes neutral values
        only.
      facts: what all its models share.
      permuted: whether conversion to GGUF reorders the rows of q and k (`gguf.unpermute`).
      fused: whether files hold q, k and v as one tensor, gate and up as another.
      gamma_offset: what Hugging Face files leave out of every gamma; GGUF files hold it.
      gguf_reads: keys of the metadata that it has beyond `gguf_config.KNOWN`, without its name.
      rope: finds the RoPE parameters of layers with full attention in config.json.
      hf_facts, gguf_facts: read more facts from config.json, from the metadata.
      hf_layers, gguf_layers: list the kind of every layer, given that of layers with full
        attention and how many there are.
    """

    name: str
    model_type: str
    architecture: str
    gguf: str
    defaults: Facts = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    facts: Facts = field(default_factory=dict)
    permuted: bool = False
    fused: bool = False
    gamma_offset: float = 0.0
    gguf_reads: frozenset[str] = frozenset()
    rope: Callable[[Fields], Fields] = rope_parameters
    hf_facts: Callable[[Fields], Facts] = no_facts
    hf_layers: Callable[[Fields, LayerKind, int], Sequence[LayerKind]] = alike
    gguf_facts: Callable[[Fields], Facts] = no_facts
    gguf_layers: Callable[[Fields, LayerKind, int], Sequence[LayerKind]] = alike


def kinds_of(layers: Sequence[LayerKind]) -> Facts:
    """Gives the distinct kinds of these layers, in order, and which one each layer is of."""
    kinds = tuple(dict.fromkeys(layers))
    of_layer = () if len(kinds) == 1 else tuple(kinds.index(kind) for kind in layers)
    return {"kinds": kinds, "kind_of_layer": of_layer}


def layer_types(config: Fields, count: int, windowed: Sequence[bool]) -> Sequence[str]:
    """Reads `layer_types` of config.json: `full_attention` or `sliding_attention` for each layer.

    Args:
      windowed: which layers are `sliding_attention` where the file does not say.

    Raises:
      UserError: another type, or not one for each layer.
    """
    known = ("full_attention", "sliding_attention")
    got = config.get("layer_types", [known[w] for w in windowed])
    if not isinstance(got, list) or len(got) != count or any(t not in known for t in got):
        raise config.bad("layer_types", f"{count} times one of {known}")
    return got


def require_window(config: Fields, types: Sequence[str], window: int | None) -> None:
    """Raises UserError where layers slide and no window is given: transformers refuses it too."""
    if window is None and "sliding_attention" in types:
        raise config.bad("sliding_window", "a positive integer, as layer_types has windows")


def layer_count(fields: Fields, key: str) -> int:
    """Reads the number of layers. A damaged one may be 2^32, too many to list."""
    count = fields.count(key)
    if count > MOST_LAYERS:
        raise fields.bad(key, f"{MOST_LAYERS} at most")
    return count
