"""Model files for tests: the golden models, and copies of them written with a change."""

import json
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy

from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.models.gguf_file import GgufFile
from qnpu_jax.models.llama import expected_tensors
from qnpu_jax.models.rope_factors import llama3_factors

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["mha_tied", "gqa_llama3", "mqa_linear_bias"]


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
    """A golden model as convert_hf_to_gguf.py would write it."""
    cfg, _ = load_params(GOLDEN / name)
    _, stored = read_model(name)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_positions)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    theta, scaling = cfg.kinds[0].rope_theta, cfg.kinds[0].rope_scaling
    assert theta is not None
    writer.add_rope_freq_base(theta)
    tensors = {}
    for tensor in expected_tensors(cfg):
        for i in range(cfg.num_layers if tensor.per_layer else 1):
            x = stored[tensor.hf.format(i=i)]
            if tensor.param.startswith(("layers.attn.q.", "layers.attn.k.")):
                x = permute(x, cfg.num_heads if ".q." in tensor.param else cfg.num_kv_heads)
            tensors[tensor.gguf.format(i=i)] = x
    if scaling and scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling:
        factors = llama3_factors(scaling, cfg.head_dim, theta)
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
    extra(writer)
    change(tensors)
    for key, x in tensors.items():
        writer.add_tensor(key, *(x if isinstance(x, tuple) else (x,)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
