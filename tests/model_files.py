"""Model files for tests: the golden models, and copies of them written with a change."""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from qnpu_jax.config import RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.rope_factors import llama3_factors

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["mha_tied", "gqa_llama3", "mqa_linear_bias"]
FAMILIES = ["qwen2", "qwen3", "gemma3", "smollm3", "granite", "phi3", "olmo2", "mistral", "yarn"]
"""Names of the golden models without `_tiny`, one of each family beyond Llama; and YaRN."""


def read_model(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return config, safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")


def write_model(folder: Path, config: dict, tensors: dict, file="model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / file)
    return folder


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp stores them: new row 2i + h of a head is row i + h * K/2. By index."""
    size = len(x) // heads
    rows = [
        n * size + i + h * size // 2 for n in range(heads) for i in range(size // 2) for h in (0, 1)
    ]
    return x[rows]


def gguf_metadata(metadata: dict) -> GgufFile:
    """A GGUF file of which only the metadata are there."""
    return GgufFile(Path("m.gguf"), 0, metadata, {})


def write_gguf(
    path: Path, name: str, extra=lambda writer: None, change=lambda tensors: None
) -> Path:
    """A golden model as convert_hf_to_gguf.py would write it, names from the gguf package's map."""
    config, stored = read_model(name)
    arch = str(GGUF_NAMES.get(config["model_type"], config["model_type"]))
    writer = gguf.GGUFWriter(path, arch)
    write_shape(writer, config)
    WRITE_FACTS.get(arch, lambda writer, config: None)(writer, config)
    tensors = gguf_tensors(config, arch, stored)
    write_scaling(writer, config, tensors)
    extra(writer)
    change(tensors)
    for key, x in tensors.items():
        writer.add_tensor(key, *(x if isinstance(x, tuple) else (x,)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}
PERMUTED = ("llama", "mistral", "granite", "smollm3")


def head_size(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def full_rope(config: dict) -> dict:
    """RoPE parameters of layers with full attention."""
    return config["rope_parameters"].get("full_attention", config["rope_parameters"])


def write_shape(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(full_rope(config)["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])


def write_gemma3(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_value_length(config["head_dim"])
    writer.add_sliding_window(config["sliding_window"])
    local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
    writer.add_rope_freq_base_swa(local)
    writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)


def write_granite(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def write_phi3(writer: gguf.GGUFWriter, config: dict) -> None:
    part = config["rope_parameters"]["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(part * head_size(config)))
    writer.add_sliding_window(config["sliding_window"] or 0)


WRITE_FACTS = {"gemma3": write_gemma3, "granite": write_granite, "phi3": write_phi3}


def gguf_tensors(config: dict, arch: str, stored: dict[str, np.ndarray]) -> dict:
    number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, x in stored.items():
        part = name.split(".")[-2]
        if part in heads and config["model_type"] in PERMUTED:
            x = permute(x, heads[part])
        if arch == "gemma3" and name.endswith("norm.weight"):
            x = x + 1
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert key, name
        tensors[key] = x
    return tensors


def write_scaling(writer: gguf.GGUFWriter, config: dict, tensors: dict) -> None:
    rope = full_rope(config)
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "llama3":
            original = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            scaling = RopeScaling("llama3", rope["factor"], low, high, original)
            factors = llama3_factors(scaling, head_size(config), rope["rope_theta"])
            tensors["rope_freqs.weight"] = factors.astype(np.float32)
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        case "longrope":
            original = rope["original_max_position_embeddings"]
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(scale) / math.log(original))
            )
            for kind in ("short", "long"):
                factors = np.array(rope[f"{kind}_factor"], np.float32)
                tensors[f"rope_factors_{kind}.weight"] = factors


def refused(source: Path) -> str:
    """The one line that loading raises."""
    with pytest.raises(UserError) as error:
        load_params(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def same_params(source: Path, expected: Path) -> None:
    """Checks that two sources give the same parameters."""
    params, other = load_params(source)[1], load_params(expected)[1]
    assert params.keys() == other.keys()
    for name, x in params.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)
