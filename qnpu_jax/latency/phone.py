"""Latency on an Android phone, by `adb` and a `benchmark_model` that the user provides.

Two programs have that name: TFLite's (for CPU, NNAPI, and Qualcomm's delegate as an external one)
and LiteRT's (for CPU, and models compiled for an NPU). A delegate that cannot take a graph leaves
it to the CPU, and the program prints the CPU's time without a word. So a run whose log does not say
that the delegate took nodes is an error here.

Reference: LiteRT, tflite/tools/benchmark/README.md and benchmark_tflite_model.cc (messages of the
log); litert/tools/benchmark_litert_model.h.
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
"""Delegates to choose from: XNNPACK; Android's NNAPI; Qualcomm's TFLite delegate; LiteRT's
dispatch, for a file of `qnpu compile`."""
FOLDER = "/data/local/tmp/qnpu"
"""Folder on the phone, which is emptied before the runs and removed after them."""
MODEL, BINARY = f"{FOLDER}/model.tflite", f"{FOLDER}/benchmark_model"
QNN_DELEGATE = "libQnnTFLiteDelegate.so"
DISPATCH = "libLiteRtDispatch_Qualcomm.so"
LIBRARIES: dict[Delegate, str] = {"qnn": QNN_DELEGATE, "dispatch": DISPATCH}
"""Library that a delegate needs and that phones do not have."""
RANDOM = 100
"""Rows that the tables of ids and of positions need: benchmark_model fills int32 inputs with 0 to
99 (tflite/tools/utils.cc, `GetDataRangesForType`)."""


@dataclass(frozen=True)
class PhoneSignature:
    """Signature of a file: its name, the index of its subgraph, and the tokens that it takes."""

    key: str
    subgraph: int
    tokens: int


@dataclass(frozen=True)
class PhoneRequest:
    """Benchmark to run on a phone.

    Attributes:
      model: the .tflite.
      binary: `benchmark_model` for the phone's processor (android_aarch64).
      delegates: delegates to time one after the other, of DELEGATES.
      libraries: files to push beside the binary. `qnn` needs Qualcomm's delegate and runtime
        (libQnnTFLiteDelegate.so, libQnnHtp*.so, libQnnSystem.so); `dispatch` needs LiteRT's
        libLiteRtDispatch_Qualcomm.so and that runtime.
      serial: serial of the phone; None for the only one.
      threads: threads on the CPU.
      runs: least number of timed runs.
    """

    model: Path
    binary: Path
    delegates: tuple[Delegate, ...] = ("cpu",)
    libraries: tuple[Path, ...] = ()
    serial: str | None = None
    threads: int = 4
    runs: int = 50


def setup(request: PhoneRequest) -> list[list[str]]:
    """Returns the commands that empty the folder on the phone and fill it."""
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
    """Returns the command that removes the folder from the phone."""
    return shell(request.serial, "rm", "-rf", FOLDER)


def benchmark(request: PhoneRequest, delegate: Delegate, key: str) -> list[str]:
    """Returns the command that times one signature with one delegate."""
    flags: dict[Delegate, list[str]] = {
        "cpu": ["--use_xnnpack=true"],
        # Otherwise NNAPI may use a CPU implementation of its own, and the log would say NNAPI.
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
    """Returns the commands of `time_on_phone` after `adb devices`, which --dry-run shows."""
    work = [benchmark(request, d, s.key) for d in request.delegates for s in signatures]
    return [*setup(request), *work, cleanup(request)]


def time_on_phone(request: PhoneRequest, run_command: RunCommand = call) -> Generator[PhoneTiming]:
    """Times every signature with every delegate, and yields each timing when it is measured.

    Timings before an error are yielded. The folder on the phone is removed in any case, also when
    the caller stops early. Where even that fails, the next run removes it.

    Args:
      run_command: runs a command on this machine.

    Raises:
      UserError: a file is missing; adb is missing, no phone is connected, several are, or the phone
        refuses this computer; a command fails; benchmark_model's output cannot be read; or a
        delegate left the graph to the CPU.
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
    """Runs a command and returns its output.

    Raises:
      UserError: the command failed.
    """
    done = run_command(command)
    if done.returncode:
        raise UserError(
            f"{quoted(command)}: exit status {done.returncode}, it said"
            f" {phone_log.complaint(done.stdout)!r}; expected 0; run it by hand to see all it says"
        )
    return done.stdout


def check_request(request: PhoneRequest) -> None:
    """Raises UserError for a file that does not exist, or a delegate without its library."""
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
    """Reads the signatures of a .tflite, compiled or not, in the order of their subgraphs.

    Raises:
      UserError: the file is missing, has a signature without ids, or has a context shorter than the
        positions that benchmark_model makes up (RANDOM).
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
    """Reads shapes of the inputs by name, for each signature's subgraph and name."""
    found = {}
    for definition in map(model.SignatureDefs, range(model.SignatureDefsLength())):
        graph = model.Subgraphs(definition.SubgraphIndex())
        ports = map(definition.Inputs, range(definition.InputsLength()))
        found[definition.SubgraphIndex(), definition.SignatureKey().decode()] = {
            p.Name().decode(): graph.Tensors(p.TensorIndex()).ShapeAsNumpy().tolist() for p in ports
        }
    return found
