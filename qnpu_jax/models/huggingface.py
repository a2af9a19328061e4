"""Hugging Face folders, of transformers 4 or 5: configuration and float32 parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from qnpu_jax.config import ModelConfig
from qnpu_jax.errors import UserError
from qnpu_jax.models.file_tensors import FloatParams, StoredTensor, fill_params
from qnpu_jax.models.huggingface_config import read_config, read_family
from qnpu_jax.models.llama import EMBED, HEAD
from qnpu_jax.models.safetensors_file import open_safetensors
from qnpu_jax.models.tokenizer import read_json

__all__ = ["load_huggingface", "read_config", "weight_files"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter (LoRA), which changes the weights of another model."""


def load_huggingface(folder: Path, context: int | None = None) -> tuple[ModelConfig, FloatParams]:
    """Loads configuration and float32 parameters of a folder.

    A head beside tied embeddings counts where it differs from them, as in transformers 5; where
    there is a head alone, embeddings are tied to it.

    Args:
      context: tokens that the model must hold, see `rope_scaling.positions`.

    Raises:
      UserError: see `read_config`, `weight_files`, `fill_params`; a damaged safetensors file.
    """
    files = weight_files(folder)
    cfg, family = read_config(folder, context), read_family(folder)
    stored: dict[str, StoredTensor] = {}
    for path in files:
        tensors = open_safetensors(path)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise UserError(
                f"{path.name}: tensor {twice[0]} is in {stored[twice[0]].file} too;"
                " expected it once; remove the file that is not part of the model"
            )
        stored.update(tensors)
    for name in [n for n in stored if n.endswith("rotary_emb.inv_freq")]:
        del stored[name]  # saved by old versions of transformers; the configuration gives it
    if cfg.tie_embeddings and HEAD[0] in stored:
        if EMBED[0] in stored:
            untied = dataclasses.replace(cfg, tie_embeddings=False)
            return _tied_if_equal(untied, fill_params(untied, stored, "hf", folder.name, family))
        stored[EMBED[0]] = stored.pop(HEAD[0])
    return cfg, fill_params(cfg, stored, "hf", folder.name, family)


def _tied_if_equal(cfg: ModelConfig, params: FloatParams) -> tuple[ModelConfig, FloatParams]:
    """Drops a head that is the embedding over again."""
    if not np.array_equal(params["embed.weight"], params["head.weight"]):
        return cfg, params
    del params["head.weight"]
    return dataclasses.replace(cfg, tie_embeddings=True), params


def weight_files(folder: Path) -> list[Path]:
    """Lists a folder's safetensors files: model.safetensors, else those of its index, else all.

    transformers takes them in this order, so an index that an earlier save left does not count.

    Raises:
      UserError: there are none, or one that the index names is missing; there is an adapter.
    """
    _check_no_adapter(folder)
    index = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    if (folder / SINGLE).is_file() and SINGLE not in names:
        files = [folder / SINGLE]  # the same weights may lie beside it under other names
    elif names:
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if any(file.parent != folder for file in files):
        raise UserError(
            f"{folder.name}: {INDEX} names files outside the folder; expected plain names;"
            " download it again"
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{folder.name}: {missing[0]} is missing, {INDEX} names it;"
            " the download is incomplete: run it again"
        )
    if not files:
        pickled = [p.name for p in folder.glob("*.bin")]
        got = f"only {pickled[0]}, a pickle, which is never opened" if pickled else "none"
        raise UserError(
            f"{folder.name}: expected *.safetensors, got {got}; convert with transformers:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    return files


def _check_no_adapter(folder: Path) -> None:
    """Raises UserError for an adapter, alone or beside weights: transformers would apply it."""
    if found := [name for name in ADAPTER if (folder / name).exists()]:
        raise UserError(
            f"{folder.name}: {found[0]} is of an adapter (LoRA), which changes another model's"
            " weights; expected whole weights; merge it first (peft:"
            " model.merge_and_unload().save_pretrained(folder)), or remove the adapter's files"
        )
