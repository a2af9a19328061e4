"""Latency on an Android phone, through `adb` and the `benchmark_model` that the user has.

Two programs have that name: TFLite's (CPU, NNAPI, and Qualcomm's delegate as an external one), and
LiteRT's (CPU, and models compiled for an NPU). A delegate that cannot take a graph leaves it to the
CPU, and the program prints that time as if nothing had happened; so a row without the log's word
that the delegate took nodes is an error here.

Reference: LiteRT, tflite/tools/benchmark/README.md, benchmark_tflite_model.cc (what the log says);
litert/tools/benchmark_litert_model.h.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ai_edge_litert import schema_py_generated as schema

from qnpu_jax.choices import Delegate
from qnpu_jax.errors import UserError
from qnpu_jax.latency import phone_log
from qnpu_jax.latency.adb import RunCommand, adb, call, pick, quoted, shell
from qnpu_jax.latency.phone_log import PhoneTiming

DELEGATES: tuple[Delegate, ...] = get_args(Delegate)
"""XNNPACK; Android's NNAPI; Qualcomm's TFLite delegate; a file that `qnpu compile` wrote."""
FOLDER = "/data/local/tmp/qnpu"
"""On the phone; it is emptied before and removed afterwards."""
MODEL, BINARY = f"{FOLDER}/model.tflite", f"{FOLDER}/benchmark_model"
QNN_DELEGATE = "libQnnTFLiteDelegate.so"
DISPATCH = "libLiteRtDispatch_Qualcomm.so"
LIBRARIES: dict[Delegate, str] = {"qnn": QNN_DELEGATE, "dispatch": DISPATCH}
"""What must be among the libraries of a delegate that the phone does not have."""
RANDOM = 100
"""benchmark_model fills int32 inputs with 0 to 99 (tflite/tools/utils.cc, GetDataRangesForType), so
the tables of ids and of positions need as many rows."""


@dataclass(frozen=True)
class PhoneSignature:
    """A signature of a file: its key, the index of its subgraph, and the tokens it takes."""

    key: str
    subgraph: int
    tokens: int


@dataclass(frozen=True)
class PhoneRequest:
    """What to run on a phone.

    Attributes:
      model: the .tflite.
      binary: `benchmark_model` for the phone's processor (android_aarch64).
      libraries: files that are pushed beside it: for `qnn` Qualcomm's delegate and runtime
        (libQnnTFLiteDelegate.so, libQnnHtp*.so, libQnnSystem.so), for `dispatch` LiteRT's
        libLiteRtDispatch_Qualcomm.so with that runtime.
      serial: of the phone; None where only one is connected.
      threads: of the CPU.
      runs: at least so many are timed.
    """

    model: Path
    binary: Path
    delegates: tuple[Delegate, ...] = ("cpu",)
    libraries: tuple[Path, ...] = ()
    serial: str | None = None
    threads: int = 4
    runs: int = 50


def setup(request: PhoneRequest) -> list[list[str]]:
    """Empties the folder on the phone and fills it."""
    s = request.serial
    pushed = [(request.model, MODEL), (request.binary, BINARY)]
    pushed += [(path, f"{FOLDER}/{path.name}") for path in request.libraries]
    return [
        cleanup(request),
        shell(s, "mkdir", "-p", FOLDER),
        *(adb(s, "push", str(path), target) for path, target in pushed),
        shell(s, "chmod", "755", BINARY),
    ]


def cleanup(request: PhoneRequest) -> list[str]:
    """Removes the folder from the phone."""
    return shell(request.serial, "rm", "-rf", FOLDER)


def benchmark(request: PhoneRequest, delegate: Delegate, key: str) -> list[str]:
    """Times one signature with one delegate."""
    flags: dict[Delegate, list[str]] = {
        "cpu": ["--use_xnnpack=true"],
        # Without it NNAPI may use its own CPU reference, and the log would say NNAPI.
        "nnapi": ["--use_nnapi=true", "--disable_nnapi_cpu=true"],
        "qnn": [
            f"--external_delegate_path={FOLDER}/{QNN_DELEGATE}",
            "--external_delegate_options=backend_type:htp",
        ],
        "dispatch": ["--use_npu=true", f"--dispatch_library_path={FOLDER}"],
    }
    paths = [f"{name}={FOLDER}" for name in ("LD_LIBRARY_PATH", "ADSP_LIBRARY_PATH")]
    return shell(
        request.serial,
        *(["env", *paths] if delegate in LIBRARIES else []),
        BINARY,
        f"--graph={MODEL}",
        f"--signature_to_run_for={key}",
        f"--num_threads={request.threads}",
        f"--num_runs={request.runs}",
        *flags[delegate],
    )


def commands(request: PhoneRequest, signatures: Sequence[PhoneSignature]) -> list[list[str]]:
    """Returns the commands of `time_on_phone` after the first (`adb devices`): what --dry-run shows."""
    work = [benchmark(request, d, s.key) for d in request.delegates for s in signatures]
    return [*setup(request), *work, cleanup(request)]


def time_on_phone(request: PhoneRequest, run_command: RunCommand = call) -> Generator[PhoneTiming]:
    """Times every signature with every delegate; one row after the other, as they are measured.

    What was measured before an error has been given by then. The folder on the phone is removed
    whatever happens, also when the caller stops early; if that fails too, the next run removes it.

    Raises:
      UserError: a file is missing; no adb, no phone or several, one that does not let us in; a
        command fails; benchmark_model fails, says nothing that can be read, or a delegate left the
        graph to the CPU.
    """
    check_request(request)
    found = signatures(request.model)
    pick(run_command(adb(None, "devices")).stdout, request.serial)
    try:
        for command in setup(request):
            _checked(command, run_command)
        for delegate in request.delegates:
            for s in found:
                log = _checked(benchmark(request, delegate, s.key), run_command)
                yield phone_log.timing(log, delegate, s.key, s.tokens, s.subgraph)
    finally:
        with contextlib.suppress(UserError):
            run_command(cleanup(request))


def _checked(command: list[str], run_command: RunCommand) -> str:
    """What a command said.

    Raises:
      UserError: it failed.
    """
    done = run_command(command)
    if done.returncode:
        raise UserError(
            f"{quoted(command)}: exit status {done.returncode}, it said"
            f" {phone_log.complaint(done.stdout)!r}; expected 0; run it by hand to see all it says"
        )
    return done.stdout


def check_request(request: PhoneRequest) -> None:
    """Raises UserError for a file that is missing here, or a delegate's library that is not among
    those given."""
    if not request.binary.is_file():
        raise UserError(
            f"{request.binary}: no such file; expected benchmark_model for Android (aarch64); get"
            " it from LiteRT's releases or build //tflite/tools/benchmark:benchmark_model"
        )
    for path in (request.model, *request.libraries):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected one to push; correct the path")
    for delegate in request.delegates:
        needed = LIBRARIES.get(delegate)
        if needed and needed not in (p.name for p in request.libraries):
            raise UserError(
                f"{delegate}: {needed} is not among the libraries; expected it with Qualcomm's"
                " runtime (libQnnHtp*.so, libQnnSystem.so); add them with --library"
            )


def signatures(path: Path) -> list[PhoneSignature]:
    """The signatures of a .tflite, compiled or not, in the order of their subgraphs.

    Raises:
      UserError: missing, not a .tflite of ours, or with a context shorter than the positions that
        benchmark_model makes up.
    """
    try:
        data = path.read_bytes()
        shapes = _shapes(schema.Model.GetRootAs(data, 0)) if data[4:8] == b"TFL3" else {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from None
    except (struct.error, IndexError, ValueError):
        shapes = {}
    if not shapes or any("ids" not in inputs for inputs in shapes.values()):
        raise UserError(
            f"{path}: no .tflite whose signatures take ids; expected one; write it with"
            " `qnpu export`"
        )
    found = [PhoneSignature(key, index, x["ids"][0]) for (index, key), x in sorted(shapes.items())]
    for s in found:
        cache = shapes[s.subgraph, s.key].get("kv_cache_k_0")
        if cache and (context := cache[1] + s.tokens) < RANDOM:
            raise UserError(
                f"{path}: {s.key} has a context of {context}; expected at least {RANDOM}, because"
                " benchmark_model makes up positions below that; export it with a longer --context"
            )
    return found


def _shapes(model: Any) -> dict[tuple[int, str], dict[str, list[int]]]:
    """Shapes of the inputs by name, by subgraph and key of the signatures."""
    found = {}
    for definition in map(model.SignatureDefs, range(model.SignatureDefsLength())):
        graph = model.Subgraphs(definition.SubgraphIndex())
        ports = map(definition.Inputs, range(definition.InputsLength()))
        found[definition.SubgraphIndex(), definition.SignatureKey().decode()] = {
            p.Name().decode(): graph.Tensors(p.TensorIndex()).ShapeAsNumpy().tolist() for p in ports
        }
    return found
