"""The named recipes: ours, and the published methods in our static graph.

They differ in nothing but their values: no method has code of its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qnpu_jax import artifacts
from qnpu_jax.config import bit_plan
from qnpu_jax.errors import UserError
from qnpu_jax.recipes.recipe import EFFORTS, Effort, Recipe, Stage

_SCALES = (("rotated", 0.01), ("unrotated", 0.01), ("weights", 0.005))
_TOGETHER = Stage(
    learn=(
        ("rotation", 0.002),
        *_SCALES,
        ("biases", 3e-4),
        ("diagonal", 0.006),
        ("prefix", 0.003),
    )
)
_NUDGED = dataclasses.replace(_TOGETHER, learn=(*_TOGETHER.learn, ("rounding", 2.0)))
"""8-bit weights learn too: by sign descent, fast, each within half a code of where it began."""
_DISTILLED = Stage(
    learn=(
        ("rounding", 0.002),
        ("rotated", 0.003),
        ("unrotated", 0.003),
        ("weights", 0.001),
        ("biases", 3e-4),
        ("prefix", 0.001),
    ),
    gptq=True,
    rounding_optimizer="adam",
)
"""4-bit weights learn by Adam, from where GPTQ left them to any code: half a code is not enough."""
_LOUD: dict[int, dict[str, Any]] = {8: {"peak_limit": 1.0}, 4: {"split_channels": 64}}
"""What is done about the few loud channels of `down`'s input, which cost all others their codes, by
the bits of the weights. A factor is free, and makes a column of `down` louder: 8 bits bear that.
For 4 bits there are copies (benchmarks/README.md, "Loud channels")."""


def _ours(weights: int, activations: int, scores: int = 16, stream: int = 16) -> Recipe:
    """Everything at once, 8-bit weights too; at 4 bits GPTQ, and then the weights themselves with
    all that is no rotation or diagonal scale: learning those before GPTQ gained nothing or lost.

    With 8-bit weights and 16-bit activations nothing learns: calibrated, the model is as good as
    float, and every step made it worse (benchmarks/README.md).
    """
    stages: tuple[Stage, ...] = (_NUDGED,)
    if weights < 8:
        stages = (_DISTILLED,)
    elif activations > 8:
        stages = ()
    suffix = "i8" if stream == 8 else "s8" if scores == 8 else ""
    plan = bit_plan(weights, activations, scores, stream)
    loud = _LOUD[weights] if activations == 8 else {}
    return Recipe(name=f"w{weights}a{activations}{suffix}", bits=plan, stages=stages, **loud)


_KEYS: dict[str, Any] = {"centre_keys": False, "double_norms": False, "smooth_stream": 0.0}
_PLAIN: dict[str, Any] = {
    **_KEYS,
    "rotation": "none",
    "prefix": "none",
    "activation_init": "minmax",
}
_WEIGHTS_LEARN: dict[str, Any] = {"learn": (("rounding", 2e-4),), "rounding_optimizer": "adam"}
"""2e-5 a step, the published rate, in 4-bit codes of SmolLM2-135M, which are .1 wide."""
METHODS: dict[str, dict[str, Any]] = {
    "rtn-minmax": {**_PLAIN, "weight_init": "minmax"},
    "smoothquant": {**_PLAIN, "weight_init": "minmax", "smooth": 0.5, "smooth_stream": 0.5},
    "quarot": {**_KEYS, "prefix": "none", "activation_init": "minmax"},
    "spinquant": {
        **_KEYS,
        "prefix": "none",
        "activation_init": "minmax",
        "stages": (
            Stage(learn=(("rotation", 0.15),), loss="ce", rotation_optimizer="cayley_sgd"),
            Stage(calibrate="all"),
        ),
    },
    "prefixquant": {**_KEYS},
    "mobilequant": {
        **_PLAIN,
        "stages": (Stage(learn=(*_SCALES, ("diagonal", 0.002)), loss="hidden"),),
    },
    "torchao-qat": {
        **_PLAIN,
        "weight_init": "minmax",
        "stages": (Stage(**_WEIGHTS_LEARN, loss="ce"),),
    },
    "executorch-qad": {
        **_PLAIN,
        "weight_init": "minmax",
        "stages": (Stage(**_WEIGHTS_LEARN),),
    },
    "quant-npu": {
        **_KEYS,
        "prefix": "none",
        "activation_init": "sigma-rotated",
        "weight_init": "sigma",
        "stages": (
            Stage(
                learn=(("rotation", 0.1), ("rotated", 0.01), ("weights", 0.005)),
                quantized="rotated",
                loss="ce",
                warmup=0.25,
                rotation_optimizer="cayley_sgd",
            ),
            Stage(calibrate="unrotated"),
        ),
    },
}
"""What published methods do, in our static graph with every tensor quantized. `smoothquant` and
`mobilequant` have the diagonal scales that merge into this graph (up->down, v->o, q/k): its norms
have no gamma that could take those of their outputs. `spinquant` learns with everything quantized,
where its authors quantize dynamically; Cayley-SGD at their rate of 1.5 does worse here than at
0.15. `torchao-qat` and `executorch-qad` learn the weights alone, on cross-entropy and on KL (.99 of
it as published, with .01 of cross-entropy); torchao's activations are dynamic and its weights have
a scale for each 32, ExecuTorch's activations are static as here. `quant-npu` is arXiv 2605.20295
with Adam and masked gradients, the best of eight settings tried: SGD at its rate of 0.01 and
unmasked gradients diverge here (benchmarks/README.md)."""

RECIPES: dict[str, Recipe] = {f"w{w}a{a}": _ours(w, a) for w in (8, 4) for a in (8, 16)}
RECIPES |= {r.name: r for w in (8, 4) for r in (_ours(w, 8, 8), _ours(w, 8, 8, 8))}
RECIPES |= {
    f"{method}-{bits}": Recipe(name=f"{method}-{bits}", bits=ours.bits, **settings)
    for method, settings in METHODS.items()
    for bits, ours in RECIPES.items()
}


def load_recipe(name: str | Path) -> Recipe:
    """A named recipe, or one from a JSON file of one's own.

    Args:
      name: `w8a8`, `w4a8`, `w8a16`, `w4a16`, `w8a8s8`, `w4a8s8`, `w8a8i8`, `w4a8i8`, one of METHODS
        before any of these (`quarot-w4a8`), or the path of a file.

    Raises:
      UserError: no such recipe, or a file that holds none.

    Example:
      >>> load_recipe("w4a8").bits.bits("layers.0.attn.q.weight")
      4
    """
    if name in RECIPES:
        return RECIPES[str(name)]
    path = Path(name)
    if not path.is_file():
        ours = [n for n in RECIPES if "-" not in n]
        raise UserError(
            f"{name}: no such recipe; expected one of {ours}, one of {[*METHODS]} before any of"
            " these (quarot-w4a8), or a JSON file that exists"
        )
    try:
        data = artifacts.parse_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{name}: not valid JSON ({error}); correct the file") from None
    if not isinstance(data, dict):
        raise UserError(f"{name}: expected a JSON object of recipe keys, got {type(data).__name__}")
    return Recipe.from_json(data, str(name))


def load_effort(name: str) -> Effort:
    """An effort by its name.

    Raises:
      UserError: no such effort.

    Example:
      >>> load_effort("fast").steps
      60
    """
    if name not in EFFORTS:
        raise UserError(
            f"{name}: no such effort; expected one of {[*EFFORTS]}, or an `Effort` of one's own"
        )
    return EFFORTS[name]
