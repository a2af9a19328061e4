"""A decoder LLM made fully static and integer-only, for NPUs, in JAX.

    import qnpu_jax as qnpu
    checkpoint = qnpu.load("smollm2-135m")
    model = qnpu.quantize(checkpoint, "w8a8", effort="fast")
    qnpu.write_tflite(model, "model.tflite", tokens=128)

Every name is imported when it is first used, so that `import qnpu_jax` waits neither for JAX nor
for NumPy. Folders below hold the parts, each with a face of its own; CONTRIBUTING.md draws them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnpu_jax.api import (
        divergence,
        generate,
        perplexity,
        quantize,
        simulate,
        verify,
        write_tflite,
    )
    from qnpu_jax.config import BitPlan
    from qnpu_jax.errors import UserError
    from qnpu_jax.integer import IntegerModel
    from qnpu_jax.models import load
    from qnpu_jax.plan import ties
    from qnpu_jax.recipes import EFFORTS, RECIPES, Effort, Recipe, Stage
    from qnpu_sim import Npu

__all__ = [
    "EFFORTS",
    "RECIPES",
    "BitPlan",
    "Effort",
    "IntegerModel",
    "Npu",
    "Recipe",
    "Stage",
    "UserError",
    "divergence",
    "generate",
    "load",
    "perplexity",
    "quantize",
    "simulate",
    "ties",
    "verify",
    "write_tflite",
]

_HOMES = {
    "qnpu_jax.api": "divergence generate perplexity quantize simulate verify write_tflite",
    "qnpu_jax.config": "BitPlan",
    "qnpu_jax.errors": "UserError",
    "qnpu_jax.integer": "IntegerModel",
    "qnpu_jax.models": "load",
    "qnpu_jax.plan": "ties",
    "qnpu_jax.recipes": "EFFORTS RECIPES Effort Recipe Stage",
    "qnpu_sim": "Npu",
}


if not TYPE_CHECKING:  # a type checker that sees it takes every name for one of ours

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names.split():
                return getattr(import_module(home), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
