"""Families: facts and parameters as loaded give the logits of transformers, through the graph too.

Tolerances are in parts of the range of a model's logits. transformers computes in float32, where
rounding made 1.05e-6 of it at most here (SmolLM3); a departure left out makes 3e-3 and more.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import FAMILIES, GOLDEN, NAMES, read_model, write_gguf
from plain_forward import forward

from qnpu_jax.config import LayerKind, ModelConfig, bit_plan
from qnpu_jax.measure.perplexity import float_logits
from qnpu_jax.models.checkpoint import load_params
from qnpu_jax.models.fields import Fields
from qnpu_jax.models.gemma3 import gguf_facts
from qnpu_jax.models.huggingface import read_config
from qnpu_jax.models.llama import ATTENTION, MLP
from qnpu_jax.transform import fold_norms

ROUNDING = 3e-6


def golden(name: str, kind: str = "") -> tuple[np.ndarray, np.ndarray]:
    data = np.load(GOLDEN / f"{name}.npz")
    return data[f"{kind}tokens"], data[f"{kind}logits"]


def distance(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.ptp(expected))


# Facts and parameters.


@pytest.mark.parametrize("name", [*NAMES, *(f"{f}_tiny" for f in FAMILIES)])
def test_facts_give_transformers_logits(name):
    tokens, expected = golden(name)
    assert distance(forward(*load_params(GOLDEN / name), tokens), expected) < ROUNDING


def test_long_factors_beyond_the_original_context():
    tokens, expected = golden("phi3_tiny", "long_")
    cfg, params = load_params(GOLDEN / "phi3_tiny", context=len(tokens))
    assert cfg.max_positions == 40
    assert distance(forward(cfg, params, tokens), expected) < ROUNDING
    short = load_params(GOLDEN / "phi3_tiny")[0]
    assert short.max_positions == 24
    assert distance(forward(short, params, tokens), expected) > 0.01
    assert load_params(GOLDEN / "phi3_tiny", context=20)[0] == dataclasses.replace(
        short, max_positions=20
    )


def without_windows(cfg: ModelConfig) -> ModelConfig:
    kinds = tuple(dataclasses.replace(kind, window=None) for kind in cfg.kinds)
    return dataclasses.replace(cfg, kinds=kinds)


WINDOWS: dict[str, Any] = {}
"""Stands for `without_windows`."""
UNSCALED = {"kinds": (LayerKind(100.0, window=20),)}
DEPARTURES: dict[str, list[dict[str, Any]]] = {
    "qwen2": [WINDOWS, {"biases": ()}],
    "qwen3": [{"qk_norm": None}],
    "gemma3": [
        WINDOWS,
        {"norms": "before"},
        {"qk_norm": None},
        {"activation": "silu"},
        {"embed_scale": 1.0},
        {"query_scale": None},
        {"kind_of_layer": (0, 0, 0, 0)},
        {"kind_of_layer": (1, 1, 1, 1)},
    ],
    "smollm3": [{"kind_of_layer": ()}],
    "granite": [
        {"embed_scale": 1.0},
        {"query_scale": None},
        {"residual_scale": 1.0},
        {"logits_scale": 1.0},
    ],
    "phi3": [WINDOWS, {"rotary_dim": None, **UNSCALED}, UNSCALED],
    "olmo2": [{"qk_norm": None}],
    "mistral": [WINDOWS],
    "yarn": [{"kinds": (LayerKind(100.0),)}],
}
"""Facts of each family, with what Llama has in their place."""


@pytest.mark.parametrize(
    ("family", "llama"), [(f, d) for f, departures in DEPARTURES.items() for d in departures]
)
def test_every_departure_shows(family, llama):
    tokens, expected = golden(f"{family}_tiny")
    cfg, params = load_params(GOLDEN / f"{family}_tiny")
    other = without_windows(cfg) if llama is WINDOWS else dataclasses.replace(cfg, **llama)
    if other.biases != cfg.biases:
        params = {name: x for name, x in params.items() if not name.endswith(".bias")}
    # A thousand times what rounding does.
    assert distance(forward(other, params, tokens), expected) > 1000 * ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_params_are_the_stored_tensors(family):
    cfg, params = load_params(GOLDEN / f"{family}_tiny")
    _, stored = read_model(f"{family}_tiny")
    assert all(x.dtype == np.float32 for x in params.values())
    assert sum(x.size for x in params.values()) == sum(x.size for x in stored.values())
    layer, one = "model.layers.1.", np.float32(1.0 if family == "gemma3" else 0.0)
    names = {
        "attn.o.weight": "self_attn.o_proj.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
        "attn.norm.gamma": "input_layernorm.weight",
        "mlp.norm.gamma": "post_attention_layernorm.weight",
    }
    if cfg.norms != "before":
        names |= {
            "attn.post_norm.gamma": "post_attention_layernorm.weight",
            "mlp.norm.gamma": "pre_feedforward_layernorm.weight",
            "mlp.post_norm.gamma": "post_feedforward_layernorm.weight",
        }
    if cfg.norms == "after":
        names = {k: v for k, v in names.items() if not k.endswith("norm.gamma") or "post" in k}
    if cfg.qk_norm:
        names |= {f"attn.{x}_norm.gamma": f"self_attn.{x}_norm.weight" for x in "qk"}
    for name, file_name in names.items():
        offset = one if name.endswith("gamma") else np.float32(0.0)
        expected = stored[layer + file_name] + offset
        np.testing.assert_array_equal(params[f"layers.{name}"][1], expected, err_msg=name)
    gammas = {n.removeprefix("layers.") for n in params if n.endswith(".gamma")}
    assert gammas == {n for n in names if n.endswith(".gamma")} | {"head.norm.gamma"}


def test_fused_linears_are_split():
    cfg, params = load_params(GOLDEN / "phi3_tiny")
    _, stored = read_model("phi3_tiny")
    qkv = stored["model.layers.2.self_attn.qkv_proj.weight"]
    assert qkv.shape == (48 + 24 + 24, 48)
    np.testing.assert_array_equal(params["layers.attn.q.weight"][2], qkv[:48])
    np.testing.assert_array_equal(params["layers.attn.k.weight"][2], qkv[48:72])
    np.testing.assert_array_equal(params["layers.attn.v.weight"][2], qkv[72:])
    gate_up = stored["model.layers.0.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(params["layers.mlp.gate.weight"][0], gate_up[:64])
    np.testing.assert_array_equal(params["layers.mlp.up.weight"][0], gate_up[64:])
    assert cfg.biases == ()


# config.json as transformers 4 wrote it, which is what most models have.


def with_config(tmp_path: Path, family: str, change: Callable[[dict], object]) -> ModelConfig:
    config, _ = read_model(f"{family}_tiny")
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


def old_rope(config: dict, **scaling) -> None:
    """Moves the base out of the RoPE parameters and calls them `rope_scaling`."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope, **scaling}


def old_gemma3(config: dict) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    del config["layer_types"]
    config["sliding_window_pattern"] = 2


def old_phi3(config: dict) -> None:
    config["partial_rotary_factor"] = config["rope_parameters"].pop("partial_rotary_factor")
    del config["rope_parameters"]["original_max_position_embeddings"]
    old_rope(config, type="su")


def old_layers(config: dict) -> None:
    for key in ("layer_types", "no_rope_layers"):
        config.pop(key, None)
    old_rope(config)


OLD = {"gemma3": old_gemma3, "phi3": old_phi3} | dict.fromkeys(("qwen2", "smollm3"), old_layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_4_configuration(tmp_path, family):
    expected = load_params(GOLDEN / f"{family}_tiny")[0]
    assert with_config(tmp_path, family, OLD.get(family, old_rope)) == expected


def test_gemma3_defaults_are_of_the_published_models(tmp_path):
    def bare(config):
        config["num_hidden_layers"] = 12
        for key in ("rope_parameters", "layer_types", "query_pre_attn_scalar", "sliding_window"):
            del config[key]

    cfg = with_config(tmp_path, "gemma3", bare)
    # The default window of 4096 is longer than these positions, and stays as the file has it.
    assert cfg.kinds == (LayerKind(1e4, window=4096), LayerKind(1e6))
    assert cfg.layer_kinds == (0, 0, 0, 0, 0, 1) * 2
    assert cfg.query_scale == 256**-0.5
    assert cfg.embed_scale == 32**0.5


def test_smollm3_windows_without_positions(tmp_path):
    windows = {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [0, 1, 1, 0]}
    windows["layer_types"] = None
    cfg = with_config(tmp_path, "smollm3", lambda config: config.update(windows))
    assert cfg.kinds == (LayerKind(None, window=5), LayerKind(2e6))
    assert cfg.kind_of_layer == (0, 1, 1, 0)


def test_biases_by_flag(tmp_path):
    flags = {"attention_bias": True, "mlp_bias": True}
    for family in ("qwen3", "gemma3", "olmo2"):
        cfg = with_config(tmp_path, family, lambda config: config.update(attention_bias=True))
        assert cfg.biases == ATTENTION, family
    for family in ("granite", "smollm3"):
        cfg = with_config(tmp_path, family, lambda config: config.update(flags))
        assert cfg.biases == (*ATTENTION, *MLP), family


# GGUF.


def as_gguf(family: str, cfg: ModelConfig) -> ModelConfig:
    """What of a configuration GGUF can say."""
    match family:
        case "mistral" | "qwen2":  # llama.cpp knows no window there
            cfg = without_windows(cfg)
            kinds = tuple(dict.fromkeys(cfg.kinds))
            return dataclasses.replace(
                cfg, family=family.replace("mistral", "llama"), kinds=kinds, kind_of_layer=()
            )
        case "gemma3":  # llama.cpp knows the scale by the model's size
            return dataclasses.replace(cfg, query_scale=cfg.head_dim**-0.5)
    return cfg


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_equals_huggingface(tmp_path, family):
    name = f"{family}_tiny"
    cfg, params = load_params(GOLDEN / name)
    got_cfg, got = load_params(write_gguf(tmp_path / "m.gguf", name))
    cfg = as_gguf(family, cfg)
    if family == "phi3":  # attn_factor is float32 there
        scaling, kind = cfg.kinds[0].rope_scaling, got_cfg.kinds[0]
        assert scaling and kind.rope_scaling
        factor = kind.rope_scaling.attention_factor
        assert math.isclose(factor, scaling.attention_factor, rel_tol=1e-7)
        scaling = dataclasses.replace(scaling, attention_factor=factor)
        kinds = (dataclasses.replace(cfg.kinds[0], rope_scaling=scaling),)
        cfg = dataclasses.replace(cfg, kinds=kinds)
    assert got_cfg == cfg
    assert got.keys() == params.keys()
    for key, x in params.items():
        np.testing.assert_array_equal(got[key], x, err_msg=key)


def test_gguf_long_factors(tmp_path):
    tokens, expected = golden("phi3_tiny", "long_")
    path = write_gguf(tmp_path / "m.gguf", "phi3_tiny")
    cfg, params = load_params(path, context=len(tokens))
    assert distance(forward(cfg, params, tokens), expected) < ROUNDING
    assert load_params(path)[0].max_positions == 24


def test_gguf_gemma3_layers(tmp_path):
    def kinds(extra) -> tuple[int, ...]:
        path = write_gguf(tmp_path / "m.gguf", "gemma3_tiny", extra)
        cfg = load_params(path)[0]
        return tuple(cfg.kinds[k].window or 0 for k in cfg.layer_kinds)

    key = "gemma3.attention.sliding_window_pattern"
    assert kinds(lambda w: w.add_uint32(key, 6)) == (6, 6, 6, 6)
    assert kinds(lambda w: w.add_array(key, [False, True, True, False])) == (0, 6, 6, 0)
    assert kinds(lambda w: w.add_sliding_window(0)) == (0, 0, 0, 0)


def test_gguf_gemma3_27b_has_another_query_scale(tmp_path):

    sizes = {"attention.head_count": 32, "embedding_length": 5376, "attention.key_length": 128}
    facts = gguf_facts(Fields({**sizes, "block_count": 62}, "m"))
    assert facts["query_scale"] == 168**-0.5
    facts = gguf_facts(Fields({**sizes, "block_count": 48}, "m"))
    assert facts["query_scale"] == 128**-0.5


# The graph.

GRAPH = 5e-6
"""Two float32 computations differ by 1.7e-6 at most here (SmolLM3), of other orders of sums."""


@pytest.mark.parametrize("name", [*NAMES, *(f"{f}_tiny" for f in FAMILIES)])
def test_the_graph_gives_transformers_logits(name):
    tokens, expected = golden(name)
    cfg, params = load_params(GOLDEN / name)
    folded = fold_norms(cfg, params)
    logits = np.asarray(float_logits(cfg, bit_plan(8, 8), folded)(tokens))
    assert distance(logits, expected) < GRAPH


def test_the_graph_with_long_factors():
    tokens, expected = golden("phi3_tiny", "long_")
    cfg, params = load_params(GOLDEN / "phi3_tiny", context=len(tokens))
    logits = np.asarray(float_logits(cfg, bit_plan(8, 8), fold_norms(cfg, params))(tokens))
    assert distance(logits, expected) < GRAPH
