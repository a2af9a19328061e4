"""Table of the families that the loaders know."""

from __future__ import annotations

from collections.abc import Iterable

from qnpu_jax.models.family import Family
from qnpu_jax.models.gemma3 import GEMMA3
from qnpu_jax.models.granite import GRANITE
from qnpu_jax.models.llama import LLAMA
from qnpu_jax.models.mistral import MISTRAL
from qnpu_jax.models.olmo2 import OLMO2
from qnpu_jax.models.phi3 import PHI3
from qnpu_jax.models.qwen2 import QWEN2
from qnpu_jax.models.qwen3 import QWEN3
from qnpu_jax.models.smollm3 import SMOLLM3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, SMOLLM3, GRANITE, PHI3, OLMO2)


def named(names: Iterable[object]) -> str:
    """Lists names for a message, each once, sorted."""
    return ", ".join(sorted({str(name) for name in names}))


def by_model_type(model_type: str) -> Family | None:
    """Finds the family that config.json calls so."""
    return next((f for f in FAMILIES if f.model_type == model_type), None)


def by_gguf(architecture: object) -> Family | None:
    """Finds the family that GGUF files call so; of two with one name, the first."""
    return next((f for f in FAMILIES if f.gguf == architecture), None)
