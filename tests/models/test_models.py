"""Checkpoints: what is loaded equals what was stored, in bounded memory; what is wrong is said."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from model_files import GOLDEN, NAMES, read_model, write_gguf, write_model

from qnpu_jax.config import LayerKind, ModelConfig, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.models.huggingface import read_config
from qnpu_jax.models.llama import ATTENTION, MLP, expected_tensors
from qnpu_jax.models.rope_factors import llama3_factors, llama3_from_factors

# What is loaded is what was stored.


def test_golden_configurations():
    common = {"family": "llama", "vocab_size": 96, "intermediate_size": 96, "max_positions": 128}
    mha = ModelConfig(
        **common, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=12
    )
    assert load_params(GOLDEN / "mha_tied")[0] == dataclasses.replace(mha, tie_embeddings=True)
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    gqa = dataclasses.replace(
        mha, num_kv_heads=2, head_dim=24, kinds=(LayerKind(10000.0, scaling),)
    )
    assert load_params(GOLDEN / "gqa_llama3")[0] == gqa
    assert load_params(GOLDEN / "mqa_linear_bias")[0] == ModelConfig(
        **common,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        kinds=(LayerKind(50000.0, RopeScaling("linear", 4.0)),),
        biases=(*ATTENTION, *MLP),
    )


@pytest.mark.parametrize("name", NAMES)
def test_params_hold_every_stored_value(name):
    cfg, params = load_params(GOLDEN / name)
    _, stored = read_model(name)
    d, f, layers = cfg.hidden_size, cfg.intermediate_size, cfg.num_layers
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    assert params["layers.attn.q.weight"].shape == (layers, q, d)
    assert params["layers.attn.v.weight"].shape == (layers, kv, d)
    assert params["layers.attn.o.weight"].shape == (layers, d, q)
    assert params["layers.mlp.gate.weight"].shape == (layers, f, d)
    assert params["layers.mlp.down.weight"].shape == (layers, d, f)
    assert params["embed.weight"].shape == (cfg.vocab_size, d)
    assert ("head.weight" in params) == (not cfg.tie_embeddings)
    assert ("layers.attn.o.bias" in params) == ("attn.o" in cfg.biases)
    assert ("layers.mlp.up.bias" in params) == ("mlp.up" in cfg.biases)
    for i in range(layers):
        x = stored[f"model.layers.{i}.self_attn.k_proj.weight"]
        np.testing.assert_array_equal(params["layers.attn.k.weight"][i], x)
        x = stored[f"model.layers.{i}.post_attention_layernorm.weight"]
        np.testing.assert_array_equal(params["layers.mlp.norm.gamma"][i], x)
    assert all(x.dtype == np.float32 for x in params.values())
    assert sum(x.size for x in params.values()) == sum(x.size for x in stored.values())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    config, tensors = read_model("mha_tied")
    halves = {k: x.astype(dtype) for k, x in tensors.items()}
    _, params = load_params(write_model(tmp_path, config, halves))
    embed = halves["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed.weight"], embed)


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, index):
    config, tensors = read_model("mha_tied")
    names = sorted(tensors)
    shards = {"a-1.safetensors": names[:7], "a-2.safetensors": names[7:]}
    for file, part in shards.items():
        write_model(tmp_path, config, {n: tensors[n] for n in part}, file)
    if index:
        weight_map = {n: file for file, part in shards.items() for n in part}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "model.safetensors.index.json").write_text(text)
    _, params = load_params(tmp_path)
    for name, x in load_params(GOLDEN / "mha_tied")[1].items():
        np.testing.assert_array_equal(params[name], x)
    (tmp_path / "a-2.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        load_params(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_4_configuration(tmp_path, name):
    config, tensors = read_model(name)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    assert load_params(write_model(tmp_path, config, tensors))[0] == load_params(GOLDEN / name)[0]


def test_mistral_without_window(tmp_path):
    config, tensors = read_model("mha_tied")
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    folder = write_model(tmp_path, {**config, **mistral, "sliding_window": None}, tensors)
    expected = dataclasses.replace(load_params(GOLDEN / "mha_tied")[0], family="mistral")
    assert load_params(folder)[0] == expected
    write_model(tmp_path, {**config, **mistral, "sliding_window": 64}, tensors)
    kinds = (LayerKind(10000.0, window=64),)
    assert load_params(tmp_path)[0] == dataclasses.replace(expected, kinds=kinds)


def test_tied_head_and_rotary_buffer_in_the_file_are_no_error(tmp_path):
    config, tensors = read_model("mha_tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    assert "head.weight" not in load_params(write_model(tmp_path, config, tensors))[1]


@pytest.mark.parametrize("name", NAMES)
def test_gguf_equals_huggingface(tmp_path, name):
    cfg, params = load_params(GOLDEN / name)
    got_cfg, got = load_params(write_gguf(tmp_path / "m.gguf", name))
    if name == "gqa_llama3":  # the original context is not in the file, only its ratio to low, high
        assert got_cfg.kinds[0].rope_scaling == RopeScaling("llama3", 8.0, 256.0, 1024.0, 8192)
        cfg = dataclasses.replace(cfg, kinds=got_cfg.kinds)
    assert got_cfg == cfg
    assert got.keys() == params.keys()
    for key, x in params.items():
        np.testing.assert_array_equal(got[key], x, err_msg=key)


def dequantizable() -> list[gguf.GGMLQuantizationType]:
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds


@pytest.mark.parametrize("kind", dequantizable(), ids=lambda kind: kind.name)
def test_gguf_types(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = max(block, 64)
    # Bytes below 0x3c keep float16 scales finite.
    raw = np.random.default_rng(0).integers(0, 0x3C, (96, row // block * size), np.uint8)

    def change(tensors):
        tensors.clear()
        narrow = {
            "attn_norm": (row,),
            "ffn_norm": (row,),
            "ffn_down": (row, 2),
            "attn_output": (row, 4),
        }
        wide = dict.fromkeys(("attn_q", "attn_k", "attn_v"), (4, row))
        wide |= dict.fromkeys(("ffn_gate", "ffn_up"), (2, row))
        for key, shape in (narrow | wide).items():
            tensors[f"blk.0.{key}.weight"] = np.zeros(shape, np.float32)
        tensors["output_norm.weight"] = np.zeros(row, np.float32)
        tensors["token_embd.weight"] = (raw, None, kind)

    def extra(writer):
        writer.add_embedding_length(row)
        writer.add_block_count(1)
        writer.add_feed_forward_length(2)
        writer.add_head_count(1)
        writer.add_head_count_kv(1)
        writer.add_key_length(4)

    _, params = load_params(write_gguf(tmp_path / "m.gguf", "mha_tied", extra, change))
    np.testing.assert_array_equal(params["embed.weight"], gguf.dequantize(raw, kind))


@pytest.mark.parametrize(("factor", "theta", "head_dim"), [(8.0, 5e5, 128), (32.0, 5e5, 64)])
def test_llama_3_rope_factors(factor, theta, head_dim):
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    factors = llama3_factors(scaling, head_dim, theta).astype(np.float32)
    assert llama3_from_factors(factors, head_dim, theta, 8192, "m") == scaling
    assert llama3_from_factors(np.ones_like(factors), head_dim, theta, 8192, "m") is None
    with pytest.raises(UserError, match="no llama3"):
        llama3_from_factors(factors[::-1].copy(), head_dim, theta, 8192, "m")


# Memory.

MEASURE = """
import sys, resource
from pathlib import Path
from qnpu_jax.models import load_params
def peak():  # ru_maxrss of a child may begin at its parent's
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
params = load_params(sys.argv[1])[1]
print((peak() - before) / sum(x.nbytes for x in params.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_peak_memory(tmp_path, dtype):
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "vocab_size": 1000,
        "num_hidden_layers": 3,
    }
    config = {**read_model("mha_tied")[0], **sizes, "head_dim": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = read_config(tmp_path)
    tensors = {
        t.hf.format(i=i): np.ones(t.shape, dtype)
        for t in expected_tensors(cfg)
        for i in range(cfg.num_layers if t.per_layer else 1)
    }
    assert sum(x.size for x in tensors.values()) * 4 > 200e6
    write_model(tmp_path, config, tensors)
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=root)
    ratio = float(done.stdout)
    assert 1.0 <= ratio <= 1.3
