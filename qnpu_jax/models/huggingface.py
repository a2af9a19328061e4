"""Hugging Face folders: config.json (of transformers 4 or 5) and safetensors to float32 parameters.

Reference: https://github.com/huggingface/safetensors#format; transformers LlamaConfig,
MistralConfig.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qnpu_jax import artifacts
from qnpu_jax.config import LayerKind, ModelConfig, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.models.file_tensors import (
    BLOCK,
    FloatArray,
    FloatParams,
    StoredTensor,
    check_room,
    fill_params,
)
from qnpu_jax.models.llama import ATTENTION, HEAD, MLP
from qnpu_jax.models.tokenizer import read_json

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
POSITIONS = "max_position_embeddings"
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def load_huggingface(folder: Path) -> tuple[ModelConfig, FloatParams]:
    """Loads configuration and float32 parameters of a folder.

    Raises:
      UserError: see `read_config`, `weight_files`, `fill_params`; a damaged safetensors file.
    """
    cfg = read_config(folder)
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        tensors = _open_safetensors(path)
        if twice := sorted(tensors.keys() & stored.keys()):
            raise UserError(
                f"{path.name}: tensor {twice[0]} is in {stored[twice[0]].file} too;"
                " expected it once; remove the file that is not part of the model"
            )
        stored.update(tensors)
    for name in [n for n in stored if n.endswith("rotary_emb.inv_freq")]:
        del stored[name]  # saved by old versions of transformers; the configuration gives it
    if cfg.tie_embeddings:
        stored.pop(HEAD[0], None)  # transformers, too, replaces it by the embedding when tied
    return cfg, fill_params(cfg, stored, "hf", folder.name)


def weight_files(folder: Path) -> list[Path]:
    """Lists a folder's safetensors files: those its index names, else model.safetensors, else all.

    Raises:
      UserError: there are none, or one that the index names is missing.
    """
    index = read_json(folder / INDEX).get("weight_map")
    if isinstance(index, dict):
        files = [folder / str(name) for name in sorted(set(map(str, index.values())))]
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]  # the same weights may lie beside it under other names
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


def read_config(folder: Path) -> ModelConfig:
    """Reads the model's shape from config.json, with transformers' defaults for absent keys.

    Raises:
      UserError: no config.json, another architecture, quantized weights, a sliding window,
        unsupported RoPE scaling or activation, a missing or impossible value.
    """
    data = read_json(folder / "config.json")
    where = f"{folder.name}/config.json"
    if not data:
        raise UserError(
            f"{where} is missing or empty; expected the model's configuration; copy it there"
        )
    data = {**_defaults(data, where), **{k: v for k, v in data.items() if v is not None}}
    _check_supported(data, where)
    heads, hidden = _count(data, "num_attention_heads", where), _count(data, "hidden_size", where)
    kv_heads = _count(data, "num_key_value_heads", where, heads)
    head_dim = _count(data, "head_dim", where, hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(
            f"{where}: {heads} heads of size {head_dim} over {kv_heads} key/value heads;"
            " expected a multiple and an even size;"
            " correct num_attention_heads, num_key_value_heads or head_dim"
        )
    theta, scaling = _rope(data, where)
    return ModelConfig(
        family="llama",
        vocab_size=_count(data, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=_count(data, "intermediate_size", where),
        num_layers=_count(data, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=_count(data, POSITIONS, where),
        rms_norm_eps=_real(data, "rms_norm_eps", where),
        kinds=(LayerKind(theta, scaling),),
        tie_embeddings=bool(data["tie_word_embeddings"]),
        biases=(
            *(ATTENTION if data.get("attention_bias") else ()),
            *(MLP if data.get("mlp_bias") else ()),
        ),
    )


def _defaults(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks the architecture, and gives the values that transformers assumes for absent keys."""
    kind, names = str(data.get("model_type")), data.get("architectures") or []
    if kind not in ARCHITECTURES or names not in ([], [ARCHITECTURES[kind]]):
        got = names[0] if isinstance(names, list) and names else names or kind
        raise UserError(
            f"{where}: architecture {got!r} (model_type {kind!r}) is unknown; expected one of"
            f" {sorted(ARCHITECTURES.values())}; only the Llama family is supported"
        )
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    if kind == "llama":
        return {**common, POSITIONS: 2048}
    mistral = {"num_key_value_heads": 8, POSITIONS: 131072}
    # null in the file means no window; no such key at all means 4096.
    return {**common, **mistral, **({} if "sliding_window" in data else {"sliding_window": 4096})}


def _check_supported(data: Mapping[str, Any], where: str) -> None:
    def refuse(key: str, expected: str, way_out: str) -> UserError:
        return UserError(f"{where}: {key} is {data[key]!r}; expected {expected}; {way_out}")

    if data["hidden_act"] not in ("silu", "swish"):
        raise refuse("hidden_act", "'silu'", "only SwiGLU models are supported")
    if data.get("quantization_config"):
        raise refuse("quantization_config", "float weights", "use the model it was quantized from")
    if data.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("partial_rotary_factor", "1.0", "only full RoPE is supported")
    windowed = data["model_type"] == "mistral" and data.get("sliding_window") is not None
    if windowed and _count(data, "sliding_window", where) < _count(data, POSITIONS, where):
        raise refuse(
            "sliding_window", "none", "use a model with full attention (Mistral v0.2 or later)"
        )


def _rope(data: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Reads theta and scaling: `rope_parameters` (transformers 5), or keys of transformers 4."""
    scaling = data.get("rope_parameters", data.get("rope_scaling")) or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: RoPE scaling must be an object; got {scaling!r}; correct it")
    scaling = {"rope_theta": data.get("rope_theta", 10000.0), **scaling}
    theta = _real(scaling, "rope_theta", where)
    match scaling.get("rope_type", scaling.get("type", "default")):
        case "default":
            return theta, None
        case "linear":
            return theta, RopeScaling("linear", _real(scaling, "factor", where))
        case "llama3":
            low, high = (_real(scaling, f"{k}_freq_factor", where) for k in ("low", "high"))
            if low >= high:
                raise UserError(
                    f"{where}: low_freq_factor must be below high_freq_factor;"
                    f" got {low} and {high}; correct them"
                )
            context = _count(scaling, "original_max_position_embeddings", where)
            return theta, RopeScaling("llama3", _real(scaling, "factor", where), low, high, context)
        case kind:
            raise UserError(
                f"{where}: RoPE scaling {kind!r} is not supported;"
                " expected 'default', 'linear' or 'llama3'; use a model without it"
            )


def _count(data: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    got = data.get(key, default)
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        raise UserError(f"{where}: {key} must be a positive integer; got {got!r}; correct it")
    return got


def _real(data: Mapping[str, Any], key: str, where: str) -> float:
    got = data.get(key)
    if not isinstance(got, int | float) or isinstance(got, bool) or not (0 < got < math.inf):
        raise UserError(f"{where}: {key} must be a positive number; got {got!r}; correct it")
    return float(got)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file: 8 bytes with its length, JSON; then come the data.

    The library of that name would map the file into memory, which doubles the peak.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        check_room(path.name, "the header", 8, length, size)
        text = file.read(length)
    try:
        header = artifacts.parse_json(text)
        header.pop("__metadata__", None)
        return {name: _entry(path, name, e, 8 + length, size) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path.name}: damaged safetensors header ({error}); download it again"
        ) from None


def _entry(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> StoredTensor:
    """Checks an entry of the header; data begin at byte `data` of a file of `size` bytes."""
    dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
    begin, end = map(int, entry["data_offsets"])
    if dtype not in _BYTES:
        raise UserError(
            f"{path.name}: tensor {name} has type {dtype}; expected one of {sorted(_BYTES)};"
            " use the float checkpoint of the model"
        )
    check_room(path.name, f"tensor {name}", data + begin, end - begin, size)
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise ValueError(f"tensor {name}: {end - begin} bytes for shape {list(shape)} of {dtype}")
    return StoredTensor(path.name, shape, _reader(path, dtype, data + begin))


def _reader(path: Path, dtype: str, offset: int) -> Callable[[FloatArray], None]:
    def read(out: FloatArray) -> None:
        flat = out.reshape(-1)
        with path.open("rb") as file:
            file.seek(offset)
            for start in range(0, flat.size, BLOCK):
                part = flat[start : start + BLOCK]
                match dtype:
                    case "F32":
                        file.readinto(part.data.cast("B"))
                    case "F16":
                        part[...] = np.fromfile(file, "<f2", part.size)
                    case _:  # bfloat16 is the upper half of a float32
                        raw = np.fromfile(file, "<u2", part.size)
                        part.view(np.uint32)[...] = raw.astype(np.uint32) << 16

    return read
