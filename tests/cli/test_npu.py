"""`qnpu compile`, `compare` and `bench` as a user meets them."""

from importlib import metadata

import pairwise
import pytest
from extras import needs

from qnpu_jax import artifacts
from qnpu_jax.compilers import ethos, hexagon

needs_qnn, needs_ethos = needs(hexagon.check_installed), needs(ethos.check_installed)


@pytest.mark.parametrize("command", ["compile out", "compare --npu out"])
def test_without_the_extra_it_is_named(refused, no_packages, command):
    assert 'pip install "qnpu[qnn]"' in refused(*command.split())


def test_without_the_extra_for_arm_it_is_named(refused, no_packages):
    assert 'pip install "qnpu[ethos]"' in refused("compile", "out", "--soc", "ethos-u85-256")


def test_both_families_are_named(refused):
    said = refused("compile", "out", "--soc", "ethos-u85")
    assert "'SM8650'" in said and "'ethos-u85-2048'" in said


def test_weights_are_shared_by_snapdragons_only(refused):
    said = refused("compile", "out", "--soc", "ethos-u85-256", "--share-weights")
    assert said.startswith("--share-weights: not for ethos-u85-256")


@pytest.mark.parametrize("command", ["compile out", "compare out"])
def test_an_unknown_soc_is_refused(refused, command):
    assert "--soc SM1: the compiler does not know it" in refused(*command.split(), "--soc", "SM1")


@pytest.mark.parametrize("command", ["compile out", "compare --npu out"])
def test_another_version_of_the_extra_is_refused(refused, monkeypatch, command):
    versions = {"ai-edge-litert": "2.3.0", "onnxruntime-qnn": "2.7.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    said = refused(*command.split())
    assert said.startswith("onnxruntime-qnn: version 2.7.0, expected 2.6.*; install qnpu's extra")


@pytest.mark.parametrize("command", ["compile out", "compare --npu out"])
def test_an_unknown_profile_is_refused(refused, command):
    said = refused(*command.split(), "--profile", "best")
    assert "'best' is not one of 'plain', 'unpacked', 'hexagon'" in said


@needs_qnn
def test_profiles_have_files_of_their_own(qnpu, here):
    """What `qnpu generate` runs is never what was written for the compiler."""
    for profile in ("plain", "hexagon"):
        arguments = f"compile out --prefill 4 --context 32 --profile {profile}"
        assert qnpu(*arguments.split())[0] == 0
    names = {p.name.split("-")[0] for p in (here / "out").glob("*-4-32.tflite")}
    assert names == {"generate", "hexagon", "SM8650"}
    assert len([*(here / "out").glob("SM8650-*-4-32.tflite")]) == 2
    artifacts.check_writable(here / "out", overwrite=True)  # nothing in it is foreign


@needs_qnn
def test_compile_reports_and_writes(qnpu, here):
    status, out, _ = qnpu("compile", "out", "--prefill", "4", "--context", "32")
    assert status == 0
    assert "prefill_4" in out and "decode" in out and "wrote" in out
    (file,) = (here / "out").glob("SM8650-*-4-32.tflite")
    assert file.stat().st_size > 0
    assert qnpu("compile", "out", "--prefill", "4", "--context", "32")[0] == 0  # replaced


@pytest.mark.parametrize("soc", ["ethos-u85-256", "ethos-u65-512"])
@needs_ethos
def test_compile_reports_arms_estimate(qnpu, here, soc):
    arguments = ["compile", "out", "--soc", soc, "--prefill", "4", "--context", "32"]
    status, out, err = qnpu(*arguments)
    whole = soc.startswith("ethos-u85")
    assert status == (0 if whole else 1), err
    assert ", not a phone" in out and "estimated tokens/s" in out and "Arm's compiler vela" in out
    assert ("BATCH_MATMUL on the CPU: Matmul with" in out) != whole
    files = sorted(p.name for p in (here / "out").glob(f"{soc}-*"))
    assert [f.split("-4-32-")[1] for f in files] == ["decode.tflite", "prefill_4.tflite"]
    assert qnpu(*arguments)[0] == status  # replaced
    artifacts.check_writable(here / "out", overwrite=True)  # nothing in it is foreign


@needs_ethos
def test_a_bad_length_for_arm_leaves_nothing(refused):
    said = refused("compile", "out", "--soc", "ethos-u85-256", "--prefill", "9", "--context", "9")
    assert said.startswith("context: 9 positions for 9 new tokens")


@needs_qnn
def test_compare_measures_ops_layers_and_perplexity(qnpu, here):
    arguments = "compare --npu out --layers 1 --tokens 16 --windows 2"
    status, out, err = qnpu(*arguments.split())
    assert status == 0, err
    assert "FullyConnected" in out and "relative error" in out
    assert "perplexity of 2 x 16 tokens, SM8650: simulator" in out and "standard error" in out


@needs_qnn
def test_a_layer_that_there_is_not_is_refused(refused):
    said = refused("compare", "out", "--layers", "2")
    assert said == "--layers 2: expected 0 to 1; choose others"


@pytest.mark.slow
@pytest.mark.parametrize("kernels", pairwise.often(["ref", "opt", "xnn"], ["xnn"]))
def test_verify_proves_the_signatures_over_a_cache(qnpu, here, kernels):
    arguments = "verify out --prefill 4 --context 32 --kernels"
    status, out, err = qnpu(*arguments.split(), kernels)
    assert status == 0, err
    assert "fed in steps of 4, 1, 1, 4, 1, 1 tokens" in out
    assert "0 of " in out and " elements differ, in 0 of " in out


@pytest.mark.parametrize("profile", ["plain", "unpacked"])
def test_bench_measures_here_and_estimates(qnpu, here, profile):
    arguments = f"bench out --prefill 4 --context 32 --rounds 2 --profile {profile}"
    status, out, _ = qnpu(*arguments.split())
    assert status == 0
    for text in ("times float32", "estimates, not measurements", "Llama-3.2-1B", "SM8750"):
        assert text in out


@pytest.mark.slow
def test_bench_prints_the_commands_for_a_phone(qnpu, here):
    (here / "benchmark_model").touch()
    arguments = "bench out --prefill 4 --context 128 --dry-run --binary benchmark_model"
    status, out, _ = qnpu(*arguments.split(), "--delegate", "nnapi")
    assert status == 0
    lines = out.splitlines()
    assert all(line.startswith("adb ") for line in lines)
    runs = [line for line in lines if "--use_nnapi=true" in line]
    assert [("decode" in r, "prefill_4" in r) for r in runs] == [(False, True), (True, False)]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate out --raw --prompt a --backend sim", "--backend sim, which reads no file"),
        ("bench out --dry-run --binary m --model m.tflite", "--model m.tflite, which has its own"),
        ("compile out --soc ethos-u85-256", "ethos-u85-256, which has a form of its own"),
    ],
)
def test_a_profile_that_nothing_would_read_is_refused(refused, command, said):
    expected = f"--profile unpacked: not for {said}; expected none; leave it out"
    assert refused(*command.split(), "--profile", "unpacked") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--dry-run --binary m --delegate foo", "--delegate foo: expected one of cpu, nnapi, qnn"),
        ("--delegate qnn --library l.so", "--delegate qnn: not for this CPU, without --adb"),
        ("--library l.so", "--library l.so: not for this CPU, without --adb"),
        ("--binary m", "--binary m: not for this CPU, without --adb"),
    ],
)
def test_bench_refuses_what_it_would_not_read(refused, given, message):
    assert refused("bench", "out", *given.split()).startswith(message)


def test_bench_on_a_phone_needs_the_program(refused):
    assert refused("bench", "out", "--adb").startswith("--binary: missing; expected")
