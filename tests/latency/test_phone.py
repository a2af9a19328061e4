"""Phones through adb: the commands, and the whole flow against a small adb of our own."""

import dataclasses
import os
import shlex
import textwrap

import pytest
import tiny
from phone_logs import NEW, NNAPI_REFUSED, TIMES, replacing

from qnpu_jax.errors import UserError
from qnpu_jax.latency import adb, phone
from qnpu_jax.latency.phone import PhoneRequest, PhoneSignature
from qnpu_jax.tflite import cached, writer

CHUNK, CONTEXT = 4, 100

# Which phone.

HEADING = "List of devices attached\n"


@pytest.mark.parametrize(
    ("listing", "serial", "expected"),
    [
        (HEADING + "R5CT\tdevice\n\n", None, "R5CT"),
        ("* daemon started successfully\n" + HEADING + "R5CT\tdevice\n", None, "R5CT"),
        (HEADING + "R5CT\tdevice\nemulator-5554\toffline\n", "R5CT", "R5CT"),
        (HEADING + "10.0.0.7:5555\tdevice\n", "10.0.0.7:5555", "10.0.0.7:5555"),
    ],
)
def test_the_phone_that_is_meant(listing, serial, expected):
    assert adb.pick(listing, serial) == expected


@pytest.mark.parametrize(
    ("rows", "serial", "message"),
    [
        ("", None, r"adb: no device connected, got \[\]; expected one; connect a phone"),
        ("A\tdevice\n", "B", r"adb: device B is not connected, got \['A'\]; expected one"),
        ("A\tdevice\nB\tdevice\n", None, r"adb: 2 devices \(A, B\); .* choose with --serial"),
        ("A\tunauthorized\n", None, "adb: device A is unauthorized; .* accept its question"),
        ("A\toffline\n", None, "adb: device A is in state 'offline'; expected 'device'"),
        ("A\tno permissions (udev)\n", "A", r"in state 'no permissions \(udev\)'; expected"),
    ],
)
def test_phones_that_cannot_be_used(rows, serial, message):
    with pytest.raises(UserError, match=message) as error:
        adb.pick(HEADING + rows, serial)
    assert "\n" not in str(error.value)


# Files and commands.


@pytest.fixture
def request_(tmp_path):
    model = tmp_path / "my model.tflite"
    cached.build_cached(tiny.quantized("gqa_llama3", "w8a8"), CHUNK, CONTEXT).write(model)
    binary = tmp_path / "android_aarch64_benchmark_model"
    binary.write_bytes(b"\x7fELF")
    return PhoneRequest(model, binary)


def with_libraries(request, *names):
    paths = [request.model.parent / name for name in names]
    for path in paths:
        path.write_bytes(b"so")
    return dataclasses.replace(request, libraries=tuple(paths))


def test_the_signatures_of_a_file(request_):
    found = phone.signatures(request_.model)
    assert found == [PhoneSignature("prefill_4", 0, 4), PhoneSignature("decode", 1, 1)]


def test_a_file_without_a_cache_has_one_signature(tmp_path):
    path = tmp_path / "m.tflite"
    writer.write_prefill(tiny.quantized("gqa_llama3", "w8a8"), path, CHUNK)
    assert phone.signatures(path) == [PhoneSignature("prefill_4", 0, 4)]


def test_a_context_below_the_positions_that_are_made_up_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    cached.build_cached(tiny.quantized("gqa_llama3", "w8a8"), CHUNK, CONTEXT - 1).write(path)
    with pytest.raises(UserError, match="prefill_4 has a context of 99; expected at least 100"):
        phone.signatures(path)


@pytest.mark.parametrize(
    "data", [b"", b"nothing like it", b"\xff\xff\xff\x7fTFL3", b"\x08\0\0\0TFL3"]
)
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "m.tflite"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"no \.tflite whose signatures take ids; expected one"):
        phone.signatures(path)


def test_the_commands_are_these(request_):
    request = with_libraries(request_, phone.QNN_DELEGATE, "libQnnHtp.so")
    request = dataclasses.replace(
        request, delegates=("cpu", "nnapi", "qnn"), serial="R5", threads=2, runs=9
    )
    lines = [adb.quoted(c) for c in phone.commands(request, [PhoneSignature("decode", 1, 1)])]
    folder, common = request.model.parent, "--num_threads=2 --num_runs=9"
    run = (
        "/data/local/tmp/qnpu/benchmark_model --graph=/data/local/tmp/qnpu/model.tflite"
        f" --signature_to_run_for=decode {common}"
    )
    assert lines == [
        "adb -s R5 shell 'rm -rf /data/local/tmp/qnpu'",
        "adb -s R5 shell 'mkdir -p /data/local/tmp/qnpu'",
        f"adb -s R5 push '{folder}/my model.tflite' /data/local/tmp/qnpu/model.tflite",
        f"adb -s R5 push {request.binary} /data/local/tmp/qnpu/benchmark_model",
        f"adb -s R5 push {folder}/{phone.QNN_DELEGATE} /data/local/tmp/qnpu/{phone.QNN_DELEGATE}",
        f"adb -s R5 push {folder}/libQnnHtp.so /data/local/tmp/qnpu/libQnnHtp.so",
        "adb -s R5 shell 'chmod 755 /data/local/tmp/qnpu/benchmark_model'",
        f"adb -s R5 shell '{run} --use_xnnpack=true'",
        f"adb -s R5 shell '{run} --use_nnapi=true --disable_nnapi_cpu=true'",
        "adb -s R5 shell 'env LD_LIBRARY_PATH=/data/local/tmp/qnpu"
        f" ADSP_LIBRARY_PATH=/data/local/tmp/qnpu {run}"
        f" --external_delegate_path=/data/local/tmp/qnpu/{phone.QNN_DELEGATE}"
        " --external_delegate_options=backend_type:htp'",
        "adb -s R5 shell 'rm -rf /data/local/tmp/qnpu'",
    ]


def test_a_compiled_model_runs_through_the_dispatch_library(request_):
    (line,) = phone.benchmark(request_, "dispatch", "decode")[2:]
    words = shlex.split(line)
    assert words[0] == "env" and words[3] == phone.BINARY
    assert words[-2:] == ["--use_npu=true", "--dispatch_library_path=/data/local/tmp/qnpu"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"binary": "gone"}, "gone: no such file; expected benchmark_model for Android"),
        ({"model": "gone"}, "gone: no such file; expected one to push"),
        ({"libraries": ["gone"]}, "gone: no such file; expected one to push"),
        ({"delegates": ("qnn",)}, "qnn: libQnnTFLiteDelegate.so is not among the libraries"),
        ({"delegates": ("dispatch",)}, "dispatch: libLiteRtDispatch_Qualcomm.so is not among"),
    ],
)
def test_files_are_checked_before_anything_runs(request_, tmp_path, change, message):
    for key, value in change.items():
        if value == "gone":
            change = {key: tmp_path / value}
        elif value == ["gone"]:
            change = {key: (tmp_path / "gone",)}
    with pytest.raises(UserError, match=message):
        next(
            phone.time_on_phone(
                dataclasses.replace(request_, **change), lambda command: pytest.fail("ran")
            )
        )


# The whole flow, against an adb that keeps the phone's files in a folder.

FAKE = """
    #!/bin/sh
    here=$(dirname "$0")
    printf '%s\\n' "$*" >> "$here/calls"
    [ "$1" = -s ] && shift 2
    case "$1 $2" in
      devices*) printf 'List of devices attached\\n'; cat "$here/devices" ;;
      push*)
        [ -f "$here/full" ] && { echo "adb: error: failed to copy: No space left" >&2; exit 1; }
        cp "$2" "$here/phone/$(basename "$3")" ;;
      *mkdir*) mkdir "$here/phone" ;;
      *rm\\ -rf*) rm -rf "$here/phone" ;;
      *chmod*) [ -f "$here/phone/benchmark_model" ] ;;
      *benchmark_model*)
        [ -f "$here/phone/model.tflite" ] || exit 9
        for log in "$here"/log.*; do
          case "$2" in *"${log##*/log.}"*) cat "$log" ;; esac
        done
        [ -f "$here/status" ] && exit "$(cat "$here/status")"
        exit 0 ;;
      *) exit 8 ;;
    esac
"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with `adb`, on PATH: what is connected is in `devices`, what benchmark_model says
    in `log.<part of the command>`, all commands in `calls`."""
    folder = tmp_path / "desk"
    folder.mkdir()
    script = folder / "adb"
    script.write_text(textwrap.dedent(FAKE).lstrip())
    script.chmod(0o755)
    (folder / "devices").write_text("R5\tdevice\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_phone_is_measured_and_left_as_it_was(request_, desk):
    nnapi = replacing("TfLiteNnapiDelegate", 5, 64)
    (desk / "log.xnnpack").write_text(NEW)
    (desk / "log.nnapi=true").write_text(nnapi + TIMES)
    request = dataclasses.replace(request_, delegates=("cpu", "nnapi"))
    rows = list(phone.time_on_phone(request))
    assert [(r.delegate, r.signature, r.tokens) for r in rows] == [
        ("cpu", "prefill_4", 4),
        ("cpu", "decode", 1),
        ("nnapi", "prefill_4", 4),
        ("nnapi", "decode", 1),
    ]
    assert [r.delegation.replaced for r in rows] == [70, 60, 5, 5]
    assert [r.median or r.average for r in rows] == [0.899281, 0.899281, 14575.2e-6, 14575.2e-6]
    assert not (desk / "phone").exists()
    planned = phone.commands(request, phone.signatures(request.model))
    assert (desk / "calls").read_text().splitlines() == [
        "devices",
        *(" ".join(command[1:]) for command in planned),
    ]


def test_rows_before_a_fallback_are_given(request_, desk):
    (desk / "log.xnnpack").write_text(NEW)
    (desk / "log.nnapi=true").write_text(NNAPI_REFUSED + TIMES)
    rows = phone.time_on_phone(dataclasses.replace(request_, delegates=("cpu", "nnapi")))
    assert [next(rows).delegate for _ in range(2)] == ["cpu", "cpu"]
    with pytest.raises(UserError, match="nnapi: TfLiteNnapiDelegate took no node"):
        next(rows)
    assert not (desk / "phone").exists()


def test_a_caller_who_stops_early_leaves_nothing_behind(request_, desk):
    (desk / "log.xnnpack").write_text(NEW)
    rows = phone.time_on_phone(request_)
    next(rows)
    assert (desk / "phone").is_dir()
    rows.close()
    assert not (desk / "phone").exists()


def test_a_run_that_fails_says_what_the_program_said(request_, desk):
    (desk / "log.xnnpack").write_text("INFO: STARTING!\nERROR: Failed to apply XNNPACK delegate.\n")
    (desk / "status").write_text("134")
    message = (
        "decode|prefill_4.*exit status 134, it said 'ERROR: Failed to apply XNNPACK delegate.'"
    )
    with pytest.raises(UserError, match=message):
        list(phone.time_on_phone(request_))
    assert not (desk / "phone").exists()


def test_a_full_phone_is_an_error(request_, desk):
    (desk / "full").touch()
    with pytest.raises(UserError, match=r"push.*exit status 1, it said 'adb: error: failed to"):
        list(phone.time_on_phone(request_))
    assert not (desk / "phone").exists()


def test_no_phone_no_commands(request_, desk):
    (desk / "devices").write_text("")
    with pytest.raises(UserError, match="adb: no device connected"):
        list(phone.time_on_phone(request_))
    assert (desk / "calls").read_text() == "devices\n"


def test_the_serial_is_in_every_command(request_, desk):
    (desk / "devices").write_text("R5\tdevice\nR6\tdevice\n")
    (desk / "log.xnnpack").write_text(NEW)
    assert len(list(phone.time_on_phone(dataclasses.replace(request_, serial="R6")))) == 2
    first, *others = (desk / "calls").read_text().splitlines()
    assert first == "devices" and all(line.startswith("-s R6 ") for line in others)


def test_a_computer_without_adb(request_, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="adb: not found on PATH; expected Android's adb; install"):
        list(phone.time_on_phone(request_))


def test_a_command_without_an_end(monkeypatch):
    monkeypatch.setattr(adb, "TIMEOUT", 0.05)
    with pytest.raises(UserError, match=r"sleep 9: no end after 0.05 s; expected one; unlock"):
        adb.call(["sleep", "9"])
