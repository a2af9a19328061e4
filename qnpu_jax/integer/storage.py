"""An `IntegerModel` on disk: safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from qnpu_jax import artifacts
from qnpu_jax.config import BitPlan, ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.integer.model import IntegerModel, QTensor

FORMAT = 4
"""Version of the files; `load` refuses any other."""


def save(model: IntegerModel, folder: Path) -> None:
    """Writes `integer_model.safetensors` (codes, scales, zero points) and `integer_model.json`
    (model shape, bit plan, prefix ids)."""
    arrays = {
        **{f"codes/{n}": x for n, x in model.codes.items()},
        **{f"scale/{n}": t.scale for n, t in model.tensors.items()},
        **{f"zero_point/{n}": t.zero_point for n, t in model.tensors.items()},
    }
    arrays = {n: np.asarray(x, order="C") for n, x in arrays.items()}  # keeps 0-d arrays 0-d
    codes, settings = folder / "integer_model.safetensors", folder / "integer_model.json"
    safetensors.numpy.save_file(arrays, codes)
    meta = {
        "format": FORMAT,
        "config": model.config.to_json(),
        "bits": [list(r) for r in model.plan.rules],
        "prefix": list(model.prefix),
    }
    settings.write_text(json.dumps(meta, indent=1) + "\n")
    shutil.copymode(settings, codes)  # safetensors lets nobody else read its files


def load(folder: str | Path) -> IntegerModel:
    """Reads what `save` wrote.

    Raises:
      UserError: a missing, truncated or foreign file.
    """
    folder = Path(folder)
    path, tensors = folder / "integer_model.json", folder / "integer_model.safetensors"
    for file in (path, tensors):
        if not file.is_file():
            raise UserError(
                f"{file}: missing; expected an output folder of `qnpu quantize`; run it again"
            )
    try:
        meta = artifacts.parse_json(path.read_text())
        arrays = safetensors.numpy.load_file(tensors)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error}); run `qnpu quantize` again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        got = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise UserError(f"{path}: format {got}, expected {FORMAT}; run `qnpu quantize` again")

    try:
        plan = BitPlan(tuple((str(p), int(b)) for p, b in meta["bits"]))
        config, prefix = ModelConfig.from_json(meta["config"]), tuple(meta["prefix"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error!r}); run `qnpu quantize` again") from None
    model = IntegerModel(config, plan, prefix, _tensors(arrays))
    for graph in model.decoder(1, 1).graphs:
        for spec in graph.tensors:
            kinds = ("codes",) * (spec.kind == "param") + ("scale", "zero_point")
            for name in (f"{kind}/{graph.prefix}{spec.name}" for kind in kinds):
                if name not in arrays:
                    raise UserError(
                        f"{tensors}: has no {name}, which {path.name} speaks of; the two are not of"
                        " one run; run `qnpu quantize` again"
                    )
    return model


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, QTensor]:
    """Joins the arrays `codes/<name>`, `scale/<name>`, `zero_point/<name>` to tensors by name; one
    that lacks its scale or zero point is left out."""
    names = [n.removeprefix("scale/") for n in arrays if n.startswith("scale/")]
    return {
        n: QTensor(
            scale=arrays[f"scale/{n}"],
            zero_point=arrays[f"zero_point/{n}"],
            codes=arrays.get(f"codes/{n}"),
        )
        for n in names
        if f"zero_point/{n}" in arrays
    }
