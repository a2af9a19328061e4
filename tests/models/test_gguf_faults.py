"""What llama.cpp does with odd GGUF files holds here too, or is refused by name."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import GOLDEN, refused, same_params, write_gguf
from plain_forward import forward, frequencies

from qnpu_jax.config import LayerKind, RopeScaling
from qnpu_jax.models.checkpoint import load_params


def gguf_kind(tmp_path: Path, extra, name: str = "mha_tied") -> LayerKind:
    (kind,) = load_params(write_gguf(tmp_path / "m.gguf", name, extra))[0].kinds
    return kind


def test_gguf_scaling_without_a_type_is_linear(tmp_path):
    kind = gguf_kind(tmp_path, lambda w: w.add_rope_scaling_factor(4.0))
    assert kind.rope_scaling == RopeScaling("linear", 4.0)
    kind = gguf_kind(tmp_path, lambda w: w.add_float32("llama.rope.scale_linear", 2.0))
    assert kind.rope_scaling == RopeScaling("linear", 2.0)


def test_gguf_scaling_of_type_none(tmp_path):
    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_float32("llama.rope.scale_linear", 2.0)
        writer.add_rope_scaling_factor(4.0)

    assert gguf_kind(tmp_path, extra).rope_scaling is None


@pytest.mark.parametrize(("mix", "kind"), [(1.0, "yarn"), (0.0, "linear"), (-1.0, "linear")])
def test_gguf_yarn_ext_factor_counts_more_than_the_type(tmp_path, mix, kind):
    def extra(writer):
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_yarn_ext_factor(mix)
        writer.add_rope_scaling_orig_ctx_len(32)

    scaling = gguf_kind(tmp_path, extra).rope_scaling
    assert scaling
    assert (scaling.kind, scaling.factor) == (kind, 4.0)
    if kind == "yarn":
        assert scaling.original_max_positions == 32
        assert scaling.attention_factor == pytest.approx(1.138629436111989, rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_gguf_attn_factor_scales_cos_and_sin(tmp_path, factor):
    def extra(writer):
        writer.add_rope_scaling_attn_factors(1.5)
        writer.add_rope_scaling_factor(factor)

    kind = gguf_kind(tmp_path, extra)
    assert kind.rope_scaling
    assert kind.rope_scaling.attention_factor == 1.5
    expected = frequencies(LayerKind(10000.0), 12) / factor
    np.testing.assert_allclose(frequencies(kind, 12), expected, rtol=1e-15)


def test_gguf_head_of_zeros(tmp_path):
    def change(tensors):
        tensors["output.weight"] = np.zeros_like(tensors["output.weight"])

    cfg, params = load_params(write_gguf(tmp_path / "m.gguf", "gqa_llama3", change=change))
    assert (forward(cfg, params, np.arange(8)) == 0.0).all()


def test_gguf_split(tmp_path):
    one = write_gguf(tmp_path / "m.gguf", "mha_tied", lambda w: w.add_uint16("split.count", 1))
    same_params(one, GOLDEN / "mha_tied")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.kv_data[0].clear()  # later parts have no architecture
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = refused(tmp_path / "part.gguf")
    assert "part 2 of 3; expected a whole model" in message
    assert "llama-gguf-split --merge" in message


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("mha_tied", lambda w: w.add_causal_attention(False), "attention.causal must be true"),
        ("mha_tied", lambda w: w.add_sliding_window(64), "llama.attention.sliding_window must be"),
        ("mha_tied", lambda w: w.add_logit_scale(2.0), "llama.logit_scale must be absent"),
        ("mha_tied", lambda w: w.add_float32("llama.unheard_of", 2.0), "may change what the model"),
        (
            "gemma3_tiny",
            lambda w: w.add_final_logit_softcapping(30.0),
            "gemma3.final_logit_softcapping must be absent",
        ),
        (
            "mha_tied",
            lambda w: w.add_rope_scaling_yarn_ext_factor(0.5),
            "yarn_ext_factor must be -1, 0 or 1; got 0.5",
        ),
        (
            "yarn_tiny",
            lambda w: w.add_rope_scaling_yarn_attn_factor(1.5),
            "yarn_attn_factor must be 1.13863",
        ),
        (
            "yarn_tiny",
            lambda w: w.add_rope_scaling_yarn_log_mul(0.1),
            "yarn_log_multiplier must be 0",
        ),
        (
            "mha_tied",
            lambda w: w.add_rope_scaling_yarn_attn_factor(1.5),
            "yarn_attn_factor must be 1.0 without YaRN",
        ),
        ("gqa_llama3", lambda w: w.add_rope_scaling_factor(2.0), "beside rope_freqs.weight"),
        ("phi3_tiny", lambda w: w.add_rope_dimension_count(7), "rope.dimension_count must be even"),
        ("granite_tiny", lambda w: w.add_rope_scaling_finetuned(False), "without RoPE"),
        (
            "olmo2_tiny",
            lambda w: w.add_sliding_window(64),
            "olmo2.attention.sliding_window must be",
        ),
        ("qwen2_tiny", lambda w: w.add_string("general.architecture", "qwen2moe"), "'qwen2moe'"),
    ],
)
def test_gguf_refusals(tmp_path, name, extra, message):
    assert message in refused(write_gguf(tmp_path / "m.gguf", name, extra))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("rope_factors_short.weight"), "rope_factors_short.weight is missing"),
        (
            lambda t: t.update({"rope_factors_short.weight": np.zeros(4, np.float32)}),
            "(shape [4]) must be 4 positive numbers",
        ),
        (
            lambda t: t.update({"rope_factors_short.weight": np.ones(5, np.float32)}),
            "(shape [5]) must be 4 positive numbers",
        ),
    ],
)
def test_gguf_longrope_tensors(tmp_path, change, message):
    assert message in refused(write_gguf(tmp_path / "m.gguf", "phi3_tiny", change=change))
