"""Overlays of numbers by tensor name for Model Explorer, Google's viewer of .tflite files.

Reference: PyPI's ai-edge-model-explorer, model_explorer/node_data_builder.py, `ModelNodeData`:
values by graph id, then by the name of a node's output tensor. A threshold colours values up to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GRAPH = "main"
"""Graph id of a file of `writer.build_prefill`: Model Explorer takes the name of the subgraph."""

Colours = Sequence[tuple[float, str]]
"""Pairs of a value and the colour of values up to it, rising. Above the last there is no colour."""
SQNR: Colours = ((10.0, "#a50026"), (20.0, "#e34a33"), (30.0, "#fc8d59"), (40.0, "#fee8c8"))
"""Colours of decibels: lower is darker."""
SHARE: Colours = (
    (0.05, "#ffffff"), (0.2, "#fee8c8"), (0.5, "#fdbb84"), (1.0, "#fc8d59"), (3.0, "#e34a33"),
    (100.0, "#a50026"),
)  # fmt: skip
"""Colours of percentages: higher is darker."""


def node_data(name: str, values: Mapping[str, float], colours: Colours) -> dict[str, Any]:
    """Returns the JSON object that Model Explorer reads as node data.

    Args:
      name: title of the overlay.
      values: by tensor name.
    """
    return {
        GRAPH: {
            "name": name,
            "results": {tensor: {"value": value} for tensor, value in values.items()},
            "thresholds": [{"value": v, "bgColor": colour} for v, colour in colours],
        }
    }
