"""Published rates of language models on Snapdragons, which `roofline` fits.

Each is a model with 4-bit weights (SmolLM2: 8) and 16-bit activations at a short context, run by
Qualcomm's genie on the NPU alone, unless its row says otherwise. Rows of qai-hub-models come from
`perf.yaml` of each model in PyPI's wheel: version 0.65.0, or the last one that has the row.

Genie reads a prompt in chunks of CHUNK tokens, and `prefill_tokens_per_second` in those files is
that of a prompt of 32 or 56 tokens, which takes a whole chunk. So a chunk takes the time to the
first token, not CHUNK / `prefill_tokens_per_second`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

CHUNK = 128
"""Tokens that the published prefills take at a time."""


@dataclass(frozen=True)
class Published:
    """A published measurement of a model.

    Attributes:
      soc, model: names.
      bytes_per_token: bytes between DDR and the NPU in one decode step, by the compiler's count.
      decode: tokens per second.
      macs: MACs per token, one for each weight of all matrices, the head included. Attention is
        left out, because the context is not published.
      prefill: tokens per second of a whole chunk; None if none is published.
      activations: `float16` for a program that does not quantize them, which is slower.
    """

    soc: str
    model: str
    bytes_per_token: float
    decode: float
    macs: int | None = None
    prefill: float | None = None
    activations: Literal["int16", "float16"] = "int16"


class Both(NamedTuple):
    """Rates of one model on one SoC with 16-bit integer activations and with float16 ones.

    Attributes:
      decode: tokens per second: integer, float16.
      first: milliseconds to the first token: integer, float16.
    """

    soc: str
    model: str
    decode: tuple[float, float]
    first: tuple[float, float]


_SIZES = {
    "Qwen3-0.6B": (372e6, 595_984_384),
    "Llama-3.2-1B": (677e6, 1_235_746_816),
    "Qwen3-1.7B": (947e6, 1_720_451_072),
    "Llama-3.2-3B": (1726e6, 3_212_574_720),
    "Qwen3-4B": (2135e6, 4_022_272_000),
    "Qwen3-4B-2507": (2135e6, 4_022_272_000),
    "Llama-3-8B": (3907e6, 7_504_658_432),
    "Llama-3.1-8B": (3907e6, 7_504_658_432),
}
"""Bytes and MACs a token. The bytes were counted by Qualcomm's compiler for SM8750, and are taken
for the others too."""
_SMOL = 134.5e6
"""SmolLM2-135M's weights, of 8 bits."""


def _genie(
    soc: str,
    model: str,
    decode: float,
    first: float,
    activations: Literal["int16", "float16"] = "int16",
) -> Published:
    """A row of qai-hub-models: tokens per second, and milliseconds to the first token."""
    moved, macs = _SIZES[model]
    return Published(soc, model, moved, decode, macs, CHUNK * 1e3 / first, activations)


PUBLISHED = (
    # ExecuTorch: measured (SM8750), and the least that its tests accept (SM8650).
    Published("SM8750", "SmolLM2-135M", _SMOL, 254.0),
    Published("SM8650", "SmolLM2-135M", _SMOL, 214.0),
    # Recorded before; no wheel of qai-hub-models looked at (0.24 to 0.65) has them.
    Published("SM8650", "Llama-3.2-1B", 677e6, 59.0, 1_235_746_816, 1877.0),
    Published("SM8650", "Llama-3-8B", 3907e6, 12.0, 7_504_658_432, 468.0),
    # Galaxy S25.
    _genie("SM8750", "Qwen3-0.6B", 125.03, 15.92),
    _genie("SM8750", "Llama-3.2-1B", 67.218, 31.467),
    _genie("SM8750", "Qwen3-1.7B", 56.728, 29.448),
    _genie("SM8750", "Llama-3.2-3B", 26.503, 76.98),
    _genie("SM8750", "Qwen3-4B", 26.132, 65.045),
    _genie("SM8750", "Qwen3-4B-2507", 26.662, 65.065),
    _genie("SM8750", "Llama-3-8B", 13.722, 129.698),
    _genie("SM8750", "Llama-3.1-8B", 13.053, 140.276),
    # Galaxy S26.
    _genie("SM8850", "Qwen3-0.6B", 132.8, 13.457),
    _genie("SM8850", "Llama-3.2-1B", 65.24, 34.486),
    _genie("SM8850", "Qwen3-1.7B", 58.295, 28.941),
    _genie("SM8850", "Llama-3.2-3B", 28.167, 72.227),
    _genie("SM8850", "Qwen3-4B", 28.636, 53.523),
    _genie("SM8850", "Qwen3-4B-2507", 27.985, 55.47),
    _genie("SM8850", "Llama-3-8B", 15.081, 102.728),
    _genie("SM8850", "Llama-3.1-8B", 13.042, 116.911),
    # Dragonwing IQ-9075 EVK.
    _genie("QCS9075", "Qwen3-0.6B", 88.246, 28.715),
    _genie("QCS9075", "Llama-3.2-1B", 41.568, 53.308),
    _genie("QCS9075", "Qwen3-1.7B", 37.216, 48.213),
    _genie("QCS9075", "Llama-3.2-3B", 16.846, 106.305),
    _genie("QCS9075", "Qwen3-4B", 17.717, 106.168),
    _genie("QCS9075", "Qwen3-4B-2507", 19.93, 101.793),
    _genie("QCS9075", "Llama-3-8B", 8.1276, 196.641),
    _genie("QCS9075", "Llama-3.1-8B", 7.8552, 200.741),
    # SA8255P ADP: 0.65.0 has measured SA8775P, the same NPU; 8B: 0.36.0.
    _genie("SA8255", "Llama-3.2-1B", 35.012, 56.225),
    _genie("SA8255", "Llama-3.2-3B", 17.47, 109.614),
    _genie("SA8255", "Llama-3-8B", 7.5584, 364.437),
    _genie("SA8255", "Llama-3.1-8B", 7.9319, 329.707),
    # SA8295P ADP, which is given float16 only; 3B: 0.56.0.
    _genie("SA8295", "Llama-3.2-1B", 13.102, 159.446, "float16"),
    _genie("SA8295", "Llama-3.2-3B", 3.523, 373.117, "float16"),
)
"""Published measurements."""
BOTH = (
    Both("SM8750", "Llama-3.2-1B", (67.218, 34.533), (31.467, 63.293)),
    Both("SM8750", "Llama-3.2-3B", (26.503, 14.322), (76.98, 141.308)),
    Both("SM8850", "Llama-3.2-1B", (65.24, 36.337), (34.486, 62.048)),
    Both("SM8850", "Llama-3.2-3B", (28.167, 15.567), (72.227, 126.388)),
    Both("QCS9075", "Llama-3.2-1B", (41.568, 18.828), (53.308, 146.154)),
    Both("QCS9075", "Llama-3.2-3B", (16.846, 8.1573), (106.305, 311.378)),
    Both("QCS8275", "Llama-3.2-1B", (38.555, 17.958), (53.002, 164.22)),
    Both("QCS8275", "Llama-3.2-3B", (16.668, 7.6005), (242.084, 397.159)),
    Both("X Elite", "Llama-3.2-1B", (34.176, 9.9243), (58.183, 143.123)),
    Both("X Elite", "Llama-3.2-3B", (12.249, 5.476), (117.666, 257.699)),
    Both("X2 Elite", "Llama-3.2-1B", (83.563, 35.452), (34.479, 52.402)),
    Both("X2 Elite", "Llama-3.2-3B", (39.842, 15.719), (99.425, 133.425)),
)
"""All models and SoCs of qai-hub-models 0.65.0 that have rates of both: how much a program with
float16 activations is slower (`roofline.fit`)."""
