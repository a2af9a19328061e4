"""Ahead-of-time compilation for Qualcomm's Hexagon NPU, on Linux and x86-64 (extra `qnn`).

LiteRT's compiler plugin (of ai-edge-litert) calls the QNN compiler (of onnxruntime-qnn). The plugin
looks for QNN's libraries by name, so a folder in the user's cache directory links to those of the
installed wheel.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import IO, get_args

from qnpu_jax import extras
from qnpu_jax.artifacts import new_file
from qnpu_jax.choices import Snapdragon
from qnpu_jax.compilers import hexagon_file
from qnpu_jax.errors import UserError
from qnpu_jax.tflite import open_interpreter

WANTED = {"ai-edge-litert": "2.3.", "onnxruntime-qnn": "2.6."}
"""Versions that fit together: the plugin was built against the QNN of that wheel."""
EXTRA = "qnn"
SOCS: tuple[str, ...] = get_args(Snapdragon)
"""Snapdragons that the plugin of ai-edge-litert 2.3 compiles for."""


@dataclass(frozen=True)
class Traffic:
    """Bytes between DRAM and the NPU in one inference, by the compiler's count.

    Attributes:
      read, write: all bytes.
      spill, fill: bytes written and read again because the NPU's own memory is full; parts of
        `write` and `read`.
    """

    read: int
    write: int
    spill: int
    fill: int

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.write


@dataclass(frozen=True)
class HexagonSignature:
    """Signature of a compiled file.

    Attributes:
      name: of the signature.
      ops: number of ops in the graph.
      on_npu: number of ops that the NPU takes; the CPU runs the rest.
      partitions: parts of the graph on the NPU.
      traffic: of all partitions together.
    """

    name: str
    ops: int
    on_npu: int
    partitions: int
    traffic: Traffic

    @property
    def whole(self) -> bool:
        """Whether the NPU takes every op, in one part."""
        return self.on_npu == self.ops and self.partitions == 1


@dataclass(frozen=True)
class CompiledForHexagon:
    """A .tflite compiled for an SoC.

    Attributes:
      path: a .tflite that holds the NPU's binary.
      soc: one of SOCS.
      signatures: in the order of the source.
      size: bytes of the file.
      seconds: time that the compiler took.
      peak_bytes: largest resident memory of the compiler.
    """

    path: Path
    soc: str
    signatures: tuple[HexagonSignature, ...]
    size: int
    seconds: float
    peak_bytes: int


def compile_file(
    source: Path, soc: str, target: Path, *, share: bool = False
) -> CompiledForHexagon:
    """Compiles every signature of a .tflite.

    Args:
      source: the file to compile.
      soc: one of SOCS.
      target: the file to write.
      share: keep one copy of the weights for all signatures. LiteRT does not support such files on
        phones, and the emulator does not load them.

    Raises:
      UserError: the extra is missing or of another version, an unknown SoC, a damaged source, or a
        source that the compiler cannot compile; nothing is written then.
    """
    check_soc(soc)
    folder = check_installed()
    open_interpreter(source, "ref")  # refuses what would crash the compiler
    with tempfile.TemporaryFile() as log, new_file(target) as partial:
        command = [
            str(folder / "tools" / "apply_plugin_main"), "--cmd=apply", f"--model={source}",
            f"--o={partial}", "--soc_manufacturer=Qualcomm", f"--soc_model={soc}", "--err=--",
            f"--libs={folder / 'vendors' / 'qualcomm' / 'compiler'}",
            f"--qualcomm_enable_weight_sharing={str(share).lower()}",
        ]  # fmt: skip
        began = time.monotonic()
        status, peak = _run(command, log)
        seconds = time.monotonic() - began
        log.seek(0)
        text = log.read().decode(errors="replace")
        if status or not partial.is_file():
            raise UserError(
                f"{source}: Qualcomm's compiler failed for {soc} (status {status}):"
                f" {_complaint(text)}; check the file, or write it again with `qnpu export`"
            )
        signatures = read_log(text, hexagon_file.signatures(source))
        return CompiledForHexagon(target, soc, signatures, partial.stat().st_size, seconds, peak)


def check_soc(soc: str) -> None:
    """Raises UserError for an SoC that the compiler does not know."""
    if soc not in SOCS:
        raise UserError(f"--soc {soc}: the compiler does not know it; expected one of {[*SOCS]}")


def check_installed() -> Path:
    """Returns the folder of ai-edge-litert, which holds the compiler.

    Raises:
      UserError: the extra is missing or of another version.
    """
    for package, wanted in WANTED.items():
        extras.check(package, wanted, EXTRA)
    return _package("ai_edge_litert")


def _package(name: str) -> Path:
    found = util.find_spec(name)
    if found is None or found.origin is None:
        raise UserError(f"{name}: not installed; {extras.remedy(EXTRA)}")
    return Path(found.origin).parent


def libraries() -> Path:
    """Makes a folder of links to QNN's libraries, by the names that the compiler plugin loads."""
    package = _package("onnxruntime_qnn")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qnpu"
    tag = hashlib.sha256(str(package).encode()).hexdigest()[:12]
    folder = cache / f"qnn-{extras.version('onnxruntime-qnn', EXTRA)}-{tag}"
    files = [*package.glob("*.so"), *package.with_name("onnxruntime_qnn.libs").iterdir()]
    folder.mkdir(parents=True, exist_ok=True)
    # The plugin wants an LPAI library, which no wheel has and nothing here calls; any will do.
    links = {"libQnnLpai.so": package / "libQnnSystem.so"} | {f.name: f for f in files}
    for name, file in links.items():
        if not (folder / name).exists():
            fresh = folder / f"{name}.{os.getpid()}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(file)
            fresh.rename(folder / name)  # atomic: another process may do the same
    return folder


def _run(command: list[str], log: IO[bytes]) -> tuple[int, int]:
    """Runs a command that writes to `log`; returns exit status and peak resident bytes."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(libraries())}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def _complaint(log: str) -> str:
    """Returns the first line that says what went wrong, or else the first line."""
    lines = [line.strip() for line in log.splitlines()]
    said = [s for s in lines if re.search(r"\bERROR\b|\bfailed\b|could not (?!be loaded)", s)]
    return (said or lines or ["it said nothing"])[0][:200]


_PARTITIONED = re.compile(
    r"Partitioned subgraph<(\d+)>, selected (\d+) ops, from a total of (\d+) ops\. resulted in"
    r" (\d+) partitions"
)
_SUMMARY = re.compile(r"DDR bandwidth summary(.*?)read_total_bytes=\d+", re.DOTALL)
_BYTES = re.compile(r"(spill|fill|write_total|read_total)_bytes=(\d+)")


def read_log(log: str, names: tuple[str, ...]) -> tuple[HexagonSignature, ...]:
    """Reads partitions and traffic of every signature from the compiler's log.

    The log gives the number of partitions of each subgraph, and then, in the same order, the bytes
    that each partition moves.

    Args:
      names: of the signatures, in the order of their subgraphs.

    Raises:
      UserError: the numbers of subgraphs or partitions in the log do not match.
    """
    parts = [tuple(map(int, m.groups())) for m in _PARTITIONED.finditer(log)]
    moved = [dict(_BYTES.findall(m[0])) for m in _SUMMARY.finditer(log)]
    if len(parts) != len(names) or sum(p[3] for p in parts) != len(moved):
        raise UserError(
            f"Qualcomm's compiler: told of {len(parts)} subgraphs and the traffic of {len(moved)}"
            f" partitions; expected {len(names)} and {sum(p[3] for p in parts)};"
            f" {extras.remedy(EXTRA)}"
        )
    signatures, at = [], 0
    for name, (_, on_npu, ops, count) in zip(names, parts, strict=True):
        own, at = moved[at : at + count], at + count
        traffic = Traffic(*(sum(int(m[k]) for m in own) for k in _KEYS))
        signatures.append(HexagonSignature(name, ops, on_npu, count, traffic))
    return tuple(signatures)


_KEYS = ("read_total", "write_total", "spill", "fill")
