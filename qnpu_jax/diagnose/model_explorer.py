"""Numbers by tensor name as an overlay for Model Explorer, Google's viewer of .tflite files.

Reference: PyPI's ai-edge-model-explorer, model_explorer/node_data_builder.py, `ModelNodeData`: by
graph id, then by the name of a node's output tensor. Thresholds colour values up to theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GRAPH = "main"
"""Model Explorer's id of a graph is the name of its subgraph, which `writer.build` gives."""

Colours = Sequence[tuple[float, str]]
"""The highest value of a colour, rising; above the last there is none."""
SQNR: Colours = ((10.0, "#a50026"), (20.0, "#e34a33"), (30.0, "#fc8d59"), (40.0, "#fee8c8"))
"""Of decibels: the lower, the darker."""
SHARE: Colours = (
    (0.05, "#ffffff"), (0.2, "#fee8c8"), (0.5, "#fdbb84"), (1.0, "#fc8d59"), (3.0, "#e34a33"),
    (100.0, "#a50026"),
)  # fmt: skip
"""Of percent: the higher, the darker."""


def node_data(name: str, values: Mapping[str, float], colours: Colours) -> dict[str, Any]:
    """What Model Explorer reads as node data.

    Args:
      values: by tensor name.
    """
    return {
        GRAPH: {
            "name": name,
            "results": {tensor: {"value": value} for tensor, value in values.items()},
            "thresholds": [{"value": v, "bgColor": colour} for v, colour in colours],
        }
    }
