"""Arm's compiler: the form of the file and what is read of vela without the extra, and with it a
tiny model."""

import subprocess
from dataclasses import asdict
from importlib import metadata

import numpy as np
import pairwise
import pytest
import tiny
from ai_edge_litert.interpreter import Interpreter
from extras import needs

from qnpu_jax.compilers import ethos, ethos_form
from qnpu_jax.compilers.ethos import VelaEstimate, read_reasons, read_summary
from qnpu_jax.errors import UserError
from qnpu_jax.tflite import cached, forms, writer
from qnpu_jax.tflite.interpreter import open_interpreter

PREFILL, CONTEXT = 4, 24
SIGNATURES = {"prefill_4": PREFILL, "decode": 1}
SUMMARY = """experiment,network,accelerator_configuration,system_config,memory_mode,core_clock,arena_cache_size,sram_bandwidth,dram_bandwidth,on_chip_flash_bandwidth,off_chip_flash_bandwidth,weights_storage_area,feature_map_storage_area,inferences_per_second,batch_size,inference_time,passes_before_fusing,passes_after_fusing,sram_memory_used,dram_memory_used,on_chip_flash_memory_used,off_chip_flash_memory_used,total_original_weights,total_npu_encoded_weights,sram_feature_map_read_bytes,sram_feature_map_write_bytes,sram_weight_read_bytes,sram_weight_write_bytes,sram_total_bytes,dram_feature_map_read_bytes,dram_feature_map_write_bytes,dram_weight_read_bytes,dram_weight_write_bytes,dram_total_bytes,on_chip_flash_feature_map_read_bytes,on_chip_flash_feature_map_write_bytes,on_chip_flash_weight_read_bytes,on_chip_flash_weight_write_bytes,on_chip_flash_total_bytes,off_chip_flash_feature_map_read_bytes,off_chip_flash_feature_map_write_bytes,off_chip_flash_weight_read_bytes,off_chip_flash_weight_write_bytes,off_chip_flash_total_bytes,nn_macs,nn_tops,cycles_npu,cycles_sram_access,cycles_dram_access,cycles_on_chip_flash_access,cycles_off_chip_flash_access,cycles_total
default,w8a8-decode,Ethos_U85_2048,Ethos_U85_SYS_DRAM_Mid,Dedicated_Sram_512KB,1000000000.0,512.0,29.802322387695312,11.175870895385742,14.901161193847656,14.901161193847656,DRAM,DRAM,42.90110300451869,1,0.023309424,2743,2743,294.515625,158264.578125,0.0,0.0,134479872,125522192,6814628,16215416,0,0,23030044,48569424,947232,125522192,0,177218176,0,0,0,0,0,0,0,0,0,0,164862673,0.014145581031946564,11338791,901844,19411693,0,0,23309424
"""  # noqa: E501 - as vela writes it, of SmolLM2-135M in w8a8
LOG = """
Warning (supported operators) operator: GATHER, ofm: 'embed.out'
Reason: Unsupported opType

Warning (supported operators) operator: BATCH_MATMUL, ofm: 'layers.0.attn.norm.squares'
Reason: Matmul with unsupported IFM type
IF Matmul or (FC with dynamic weights): IFM precision must be Int8

Warning (supported operators) operator: GATHER, ofm: 'rope.sin'
Reason: another
"""


needs_extra = needs(ethos.check_installed)


def inputs(interpreter: Interpreter, key: str) -> dict[str, np.ndarray]:
    """Random ids and caches, the rest 0."""
    rng = np.random.default_rng(0)
    details = interpreter.get_signature_runner(key).get_input_details()
    values = {n: np.zeros(d["shape"], d["dtype"]) for n, d in details.items()}
    for name, x in values.items():
        if name == "ids":
            x[:] = rng.integers(0, 96, x.shape)
        if name.startswith("kv_cache"):
            x[:] = rng.integers(-127, 128, x.shape)
    return values


def dtypes(interpreter: Interpreter) -> set[str]:
    return {str(np.dtype(d["dtype"])) for d in interpreter.get_tensor_details()}


@pytest.mark.slow
@pytest.mark.parametrize("respell", [True, False])
@pytest.mark.parametrize(
    "plan", pairwise.often(["w8a8", "w4a8", "w4a16", "w4a8s8", "w8a8i8"], ["w4a8", "w4a16"])
)
@pytest.mark.parametrize("key", SIGNATURES)
def test_both_forms_give_the_same_bits(tmp_path, key, plan, respell):
    model, paths = tiny.quantized("gqa_llama3", plan), [tmp_path / "a", tmp_path / "b"]
    cached.build_cached(model, PREFILL, CONTEXT).write(paths[0])
    form = ethos_form.arm_form(model, respell=respell)
    ethos_form.build_signature(model, form, SIGNATURES[key], CONTEXT, key).write(paths[1])
    ours, arms = (open_interpreter(p, "ref") for p in paths)
    values = inputs(ours, key)
    expected, got = (i.get_signature_runner(key)(**values) for i in (ours, arms))
    assert expected.keys() == got.keys() and len(got) == 5
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    names = {d["name"] for d in arms.get_tensor_details()}
    assert ("head.norm.root/table" in names) == respell
    assert len(np.unique(got["logits"])) > 8  # that the logits say something


def test_four_bit_codes_lie_in_int8_tensors():
    """The same codes and scales; only the type differs."""
    model = tiny.quantized("gqa_llama3", "w4a8")
    graph = model.decoder(1).layer
    packed, wide = forms.Integers(model), ethos_form.arm_form(model, respell=False)
    narrow, held = (asdict(f.tensor_type(graph, 1, "attn.q.weight")) for f in (packed, wide))
    assert [x.pop("dtype") for x in (narrow, held)] == ["int4", "int8"]
    np.testing.assert_equal(held, narrow)
    residual, same = (asdict(f.tensor_type(graph, 1, "mlp.residual")) for f in (packed, wide))
    np.testing.assert_equal(same, residual)
    codes = wide.constants(graph, 1)["attn.q.weight"]
    assert codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7


def test_the_summary_is_read():
    assert read_summary(SUMMARY) == VelaEstimate(
        system="Ethos_U85_SYS_DRAM_Mid",
        memory_mode="Dedicated_Sram_512KB",
        clock=1e9,
        sram=512 * 1024,
        sram_rate=32e9,
        dram_rate=12e9,
        seconds=0.023309424,
        npu_cycles=11338791,
        cycles=23309424,
        sram_bytes=23030044,
        dram_bytes=177218176,
        weights=134479872,
        encoded=125522192,
    )


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", SUMMARY.replace("177218176", "many"), SUMMARY[: SUMMARY.index("default")]],
)
def test_another_summary_is_refused(text):
    with pytest.raises(UserError, match=r"vela's summary: cannot be read .* expected that of"):
        read_summary(text)


def test_reasons_are_the_first_of_each_op():
    assert read_reasons(LOG) == {
        "BATCH_MATMUL": "Matmul with unsupported IFM type",
        "GATHER": "Unsupported opType",
    }


def test_an_unknown_accelerator_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--soc ethos-u9: not an Ethos-U; expected one of"):
        ethos.compile_file(tmp_path / "m.tflite", "ethos-u9", tmp_path / "out.tflite")


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.0")
    with pytest.raises(UserError, match=r'vela: version 4.0.0, expected 5.2.\*; install .*"ethos"'):
        ethos.check_installed()


def test_without_the_extra_it_is_named(no_packages):
    with pytest.raises(UserError, match=r'not installed; install .* pip install "qnpu\[ethos\]"'):
        ethos.check_installed()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import os; os.kill(os.getpid(), 8)", r"vela crashed for ethos-u85-256 \(SIGFPE\)"),
        ("raise OSError('why')", r"vela failed .* \(status 1\): OSError: why; check the file"),
        ("print('nothing done')", "wrote no model or no summary .*: nothing done; check"),
    ],
)
def test_what_ends_vela_is_one_line(tmp_path, monkeypatch, script, said):
    run = subprocess.run
    monkeypatch.setattr(ethos, "check_installed", lambda: None)
    monkeypatch.setattr(
        ethos.subprocess, "run", lambda a, **named: run([a[0], "-c", script], **named)
    )
    path = tmp_path / "m.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w8a8"), path, PREFILL)
    with pytest.raises(UserError, match=said) as error:
        ethos.compile_file(path, "ethos-u85-256", tmp_path / "out.tflite")
    assert "\n" not in str(error.value) and [*tmp_path.iterdir()] == [path]


@needs_extra
def test_a_crash_leaves_nothing(tmp_path):
    """vela divides by zero on an INT4 tensor."""
    path = tmp_path / "m.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w4a8"), path, PREFILL)
    with pytest.raises(UserError, match=r"crashed .* \(SIGFPE\); expected .* weights in INT8"):
        ethos.compile_file(path, "ethos-u85-256", tmp_path / "out.tflite")
    assert [*tmp_path.iterdir()] == [path]


@needs_extra
def test_a_truncated_file_leaves_nothing(tmp_path):
    path = tmp_path / "m.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w8a8"), path, PREFILL)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="LiteRT cannot load it"):
        ethos.compile_file(path, "ethos-u85-256", tmp_path / "out.tflite")
    assert [*tmp_path.iterdir()] == [path]


@needs_extra
@pytest.mark.parametrize("plan", ["w8a8", "w4a8s8", "w4a16", "w8a8i8"])
@pytest.mark.parametrize("key", SIGNATURES)
def test_ethos_u85_takes_all_of_it(tmp_path, key, plan):
    model, source = tiny.quantized("gqa_llama3", plan), tmp_path / "m.tflite"
    ethos_form.build_signature(
        model, ethos_form.arm_form(model), SIGNATURES[key], CONTEXT, key
    ).write(source)
    made = ethos.compile_file(source, "ethos-u85-256", tmp_path / "out.tflite")
    assert made.path.stat().st_size == made.size
    assert made.placement.whole and made.placement.ops > 150 and not made.placement.on_cpu
    assert made.placement.constants > 0 and made.placement.sram > 0
    assert made.estimate.system == "Ethos_U85_SYS_DRAM_Mid"
    assert made.estimate.seconds == pytest.approx(made.estimate.cycles / 1e9)  # 1 GHz; a division


@needs_extra
def test_our_spelling_leaves_square_roots_to_the_cpu(tmp_path):
    model, source = tiny.quantized("gqa_llama3", "w8a8"), tmp_path / "m.tflite"
    form = ethos_form.arm_form(model, respell=False)
    ethos_form.build_signature(model, form, 1, CONTEXT, "decode").write(source)
    made = ethos.compile_file(source, "ethos-u85-256", tmp_path / "out.tflite")
    assert made.placement.on_cpu == {"SQRT": 5} and made.placement.parts == 6
    assert made.reasons == {"SQRT": "Unsupported opType"}
    assert made.placement.on_npu == made.placement.ops - 5


@needs_extra
def test_ethos_u65_leaves_16_bit_products_to_the_cpu(tmp_path):
    model, source = tiny.quantized("gqa_llama3", "w8a8"), tmp_path / "m.tflite"
    form = ethos_form.arm_form(model, respell=False)
    ethos_form.build_signature(model, form, 1, CONTEXT, "decode").write(source)
    made = ethos.compile_file(source, "ethos-u65-512", tmp_path / "out.tflite")
    assert made.placement.on_cpu == {"GATHER": 3, "BATCH_MATMUL": 9, "SQRT": 5}
    assert made.reasons["BATCH_MATMUL"] == "Matmul with unsupported IFM type"
