"""What transformers does with odd folders holds here too, or is refused by name.

Numbers of transformers 5.24 in these tests are what its `LlamaForCausalLM` held after loading the
same configuration.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from model_files import GOLDEN, read_model, refused, same_params, write_model
from plain_forward import frequencies

from qnpu_jax.config import LayerKind, RopeScaling
from qnpu_jax.errors import UserError
from qnpu_jax.models.checkpoint import load, load_params
from qnpu_jax.models.huggingface import read_config, weight_files

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# RoPE of config.json.


def kind_of(tmp_path: Path, **changes) -> LayerKind:
    config, _ = read_model("mha_tied")
    config = {k: v for k, v in config.items() if k != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 8, **changes}))
    (kind,) = read_config(tmp_path).kinds
    return kind


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # The original context beside the RoPE parameters, nowhere (max_position_embeddings then),
        # and in both places.
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
            [1.0, 0.031185457482933998, 0.005590170156210661, 0.0011821769876405597],
        ),
        (
            {"rope_scaling": LLAMA3},
            [1.0, 0.2114742398262024, 0.005590170156210661, 0.0011821769876405597],
        ),
        (
            {
                "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 32,
            },
            [1.0, 0.031185457482933998, 0.005590170156210661, 0.0011821769876405597],
        ),
    ],
)
def test_original_context(tmp_path, changes, expected):
    kind = kind_of(tmp_path, rope_theta=500.0, **changes)
    # float32 there, float64 here.
    np.testing.assert_allclose(frequencies(kind, 8), expected, rtol=1e-6)


def test_rope_scaling_wins_over_rope_parameters(tmp_path):
    linear, default = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}
    old = kind_of(tmp_path, rope_parameters={**default, "rope_theta": 77.0}, rope_scaling=linear)
    assert old == LayerKind(10000.0, RopeScaling("linear", 4.0))
    new = {"rope_parameters": {**linear, "rope_theta": 77.0}}
    assert kind_of(tmp_path, **new, rope_scaling=default, rope_theta=55.0) == LayerKind(55.0)
    assert kind_of(tmp_path, **new, rope_scaling={}).rope_theta == 77.0
    assert kind_of(tmp_path, rope_parameters=linear, rope_theta=55.0).rope_theta == 55.0


@pytest.mark.parametrize(
    ("changes", "expected", "attention_factor"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            [1.0, 0.2983545958995819, 0.08427499234676361, 0.02166237309575081],
            1.138629436111989,
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 0.5,
                    "truncate": False,
                    "beta_fast": None,
                },
                "original_max_position_embeddings": 16,
            },
            [1.0, 0.09180141240358353, 0.033709995448589325, 0.012378498911857605],
            1.0648216253695715,
        ),
    ],
)
def test_yarn(tmp_path, changes, expected, attention_factor):
    kind = kind_of(tmp_path, rope_theta=55.0, **changes)
    np.testing.assert_allclose(frequencies(kind, 8), expected, rtol=1e-6)
    assert kind.rope_scaling
    assert kind.rope_scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_longrope_outside_phi3(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope["original_max_position_embeddings"] = 32
    kind = kind_of(tmp_path, rope_parameters=rope)
    assert kind.rope_scaling
    assert kind.rope_scaling.divisors == (1.0,) * 4
    assert read_config(tmp_path).max_positions == 32
    (kind,) = read_config(tmp_path, context=33).kinds
    assert kind.rope_scaling
    assert kind.rope_scaling.divisors == (2.0,) * 4
    with pytest.raises(UserError, match="longrope has 4 factors; expected 6"):
        kind_of(tmp_path, rope_parameters=rope, head_dim=12)
    with pytest.raises(UserError, match="must be a list of positive numbers"):
        kind_of(tmp_path, rope_parameters={**rope, "short_factor": [1.0, "2"]})
    with pytest.raises(UserError, match="must be 2 or more; got 1"):
        kind_of(tmp_path, rope_parameters=rope, original_max_position_embeddings=1)


@pytest.mark.parametrize("context", [0, -1, 129])
def test_context_beyond_the_model(context):
    with pytest.raises(UserError, match=f"context is {context}; expected 1 to 128 tokens"):
        load_params(GOLDEN / "qwen3_tiny", context=context)
    assert load_params(GOLDEN / "qwen3_tiny", context=64)[0].max_positions == 64


# Keys that change the computation.


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mha_tied", {"is_causal": False}, "is_causal must be True; got False"),
        ("gemma3_tiny", {"use_bidirectional_attention": True}, "looks ahead"),
        ("gemma3_tiny", {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be 0"),
        ("gemma3_tiny", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be 0"),
        ("gemma3_tiny", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters must be"),
        ("gemma3_tiny", {"layer_types": ["full_attention"]}, "layer_types must be 4 times one of"),
        ("gemma3_tiny", {"hidden_activation": "gelu"}, "hidden_activation must be one of"),
        ("mha_tied", {"sliding_window": 64}, "LlamaForCausalLM is known without it only"),
        ("mha_tied", {"layer_types": ["sliding_attention"] * 2}, "layer_types must be"),
        ("mha_tied", {"embedding_multiplier": 12.0}, "embedding_multiplier must be 1"),
        ("mha_tied", {"num_local_experts": 8}, "num_local_experts must be 0 or 1"),
        ("mistral_tiny", {"attention_bias": True}, "attention_bias must be False"),
        ("qwen3_tiny", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar must be absent"),
        (
            "qwen3_tiny",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rotates whole heads only",
        ),
        (
            "qwen3_tiny",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}},
            "RoPE parameters differ by layer type",
        ),
        ("qwen2_tiny", {"use_sliding_window": False}, "sliding_window must be a positive integer"),
        ("qwen2_tiny", {"max_window_layers": -1}, "max_window_layers must be an integer"),
        ("smollm3_tiny", {"no_rope_layers": [1, 0]}, "no_rope_layers must be 4 times 0 or 1"),
        ("phi3_tiny", {"rope_parameters": {"partial_rotary_factor": 0.1}}, "a part of 12 channels"),
        ("granite_tiny", {"logits_scaling": 0.0}, "logits_scaling must be a positive number"),
        ("mha_tied", {"tie_word_embeddings": "yes"}, "must be true or false; got 'yes'"),
    ],
)
def test_unknown_computation(tmp_path, name, changes, message):
    config, tensors = read_model(name)
    assert message in refused(write_model(tmp_path, {**config, **changes}, tensors))


@pytest.mark.parametrize(
    "changes",
    [
        {"is_causal": True, "sliding_window": None, "layer_types": ["full_attention"] * 2},
        {"sliding_window": 128, "partial_rotary_factor": 1.0, "attention_multiplier": None},
        {"architectures": "LlamaForCausalLM", "quantization_config": {}, "num_experts": 0},
        {"hidden_act": "swish", "num_key_value_heads": None, "some_other_key": 3},
    ],
)
def test_neutral_values(tmp_path, changes):
    config, tensors = read_model("mha_tied")
    folder = write_model(tmp_path, {**config, **changes}, tensors)
    assert load_params(folder)[0] == load_params(GOLDEN / "mha_tied")[0]


@pytest.mark.parametrize(
    ("kind", "architecture", "message"),
    [
        (
            "gemma3",
            "Gemma3ForConditionalGeneration",
            "a model of text and images; expected its text",
        ),
        ("gemma2", "Gemma2ForCausalLM", "architecture 'Gemma2ForCausalLM' (model_type 'gemma2')"),
        ("qwen2_moe", "Qwen2MoeForCausalLM", "is unknown; expected one of Gemma3ForCausalLM"),
        ("olmo3", "Olmo3ForCausalLM", "use a model of these families"),
    ],
)
def test_other_architectures(tmp_path, kind, architecture, message):
    config, tensors = read_model("mha_tied")
    config |= {"model_type": kind, "architectures": [architecture]}
    assert message in refused(write_model(tmp_path, config, tensors))


def test_defaults_of_transformers(tmp_path):
    """The keys that a configuration may leave out, against transformers' own classes."""
    transformers = pytest.importorskip("transformers")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = dict.fromkeys(required, 96) | {"num_hidden_layers": 12, "num_attention_heads": 32}
    for kind in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma3_text",
        "smollm3",
        "granite",
        "olmo2",
    ):
        theirs = transformers.AutoConfig.for_model(kind, **sizes)
        name = {"gemma3_text": "Gemma3", "smollm3": "SmolLM3"}.get(kind, kind.capitalize())
        config = {"model_type": kind, "architectures": [f"{name}ForCausalLM"], **sizes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if not hasattr(theirs, "head_dim"):
            theirs.head_dim = 96 // 32
        config["head_dim"] = theirs.head_dim + theirs.head_dim % 2  # 3 is odd
        if config["head_dim"] != theirs.head_dim:
            (tmp_path / "config.json").write_text(json.dumps(config))
        ours = read_config(tmp_path)
        assert ours.num_kv_heads == theirs.num_key_value_heads, kind
        assert ours.max_positions == theirs.max_position_embeddings, kind
        assert ours.rms_norm_eps == theirs.rms_norm_eps, kind
        assert ours.tie_embeddings == theirs.tie_word_embeddings, kind
        rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
        thetas = {k.rope_theta for k in ours.kinds} - {None}
        assert rope["rope_theta"] in thetas, kind
        if types := getattr(theirs, "layer_types", None):
            windows = [ours.kinds[k].window for k in ours.layer_kinds]
            assert [w is not None for w in windows] == [t == "sliding_attention" for t in types]
        if kind in ("mistral", "gemma3_text"):
            assert theirs.sliding_window in {k.window for k in ours.kinds}


# Weights of Hugging Face folders.


def test_a_head_that_differs_is_not_tied(tmp_path):
    config, tensors = read_model("mha_tied")
    tensors[HEAD] = tensors[EMBED] * np.float32(0.5)
    cfg, params = load_params(write_model(tmp_path, config, tensors))
    assert not cfg.tie_embeddings
    np.testing.assert_array_equal(params["head.weight"], tensors[HEAD])
    tensors[HEAD] = tensors[EMBED].copy()
    cfg, params = load_params(write_model(tmp_path, config, tensors))
    assert cfg.tie_embeddings
    assert "head.weight" not in params


def test_a_head_alone_is_the_embedding_too(tmp_path):
    config, tensors = read_model("mha_tied")
    tensors[HEAD] = tensors.pop(EMBED)
    same_params(write_model(tmp_path, config, tensors), GOLDEN / "mha_tied")


@pytest.mark.parametrize("shards", [True, False])
def test_stale_index(tmp_path, shards):
    """A whole file counts, with an index of another save beside it, its shards there or not."""
    config, tensors = read_model("mha_tied")
    write_model(tmp_path, config, tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if shards:
        other = {name: x + np.float32(1.0) for name, x in tensors.items()}
        safetensors.numpy.save_file(other, tmp_path / "model-00001-of-00001.safetensors")
    same_params(tmp_path, GOLDEN / "mha_tied")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


def test_index_that_names_the_whole_file(tmp_path):
    config, tensors = read_model("mha_tied")
    norm = tensors.pop("model.norm.weight")
    write_model(tmp_path, config, tensors)
    safetensors.numpy.save_file({"model.norm.weight": norm}, tmp_path / "more.safetensors")
    names = {**dict.fromkeys(tensors, "model.safetensors"), "model.norm.weight": "more.safetensors"}
    index = {"weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same_params(tmp_path, GOLDEN / "mha_tied")


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter(tmp_path, weights, config, name):
    data, tensors = read_model("mha_tied")
    write_model(tmp_path, data, tensors)
    if not weights:
        (tmp_path / "model.safetensors").unlink()
    if not config:
        (tmp_path / "config.json").unlink()
    (tmp_path / name).write_bytes(b"{}")
    for function in (load, load_params):
        with pytest.raises(UserError, match=r"is of an adapter \(LoRA\).*merge it first"):
            function(tmp_path)


def test_float64(tmp_path):
    config, tensors = read_model("mha_tied")
    wide = {name: x.astype(np.float64) for name, x in tensors.items()}
    same_params(write_model(tmp_path, config, wide), GOLDEN / "mha_tied")
    wide["model.norm.weight"][3] = 1e200
    assert "model.norm.weight holds 1 NaN or Inf of 48" in refused(
        write_model(tmp_path, config, wide)
    )


@pytest.mark.parametrize("value", [2e38, -2e38, 1e19])
def test_a_weight_whose_square_overflows(tmp_path, value):
    config, tensors = read_model("mha_tied")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 3] = value
    message = refused(write_model(tmp_path, config, tensors))
    assert f"tensor model.layers.1.mlp.up_proj.weight holds {value:.3g}, whose square" in message
