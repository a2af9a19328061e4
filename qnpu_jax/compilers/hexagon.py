"""Ahead-of-time compilation for Qualcomm's Hexagon NPU: LiteRT's compiler plugin (ai-edge-litert)
over the QNN compiler (onnxruntime-qnn), the extra `qnn`. Linux on x86-64.

The plugin looks for the QNN libraries by name. A folder of links to those of the installed wheel,
in the user's cache directory, is what it finds.
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
"""Versions whose interfaces match: the plugin is built against the QNN of that wheel."""
EXTRA = "qnn"
SOCS: tuple[str, ...] = get_args(Snapdragon)
"""Snapdragons that the plugin of ai-edge-litert 2.3 compiles for."""


@dataclass(frozen=True)
class Traffic:
    """Bytes between DRAM and the NPU in one inference, by the compiler's count: read and written
    in all, and of that spilled and filled because the NPU's own memory is full."""

    read: int
    write: int
    spill: int
    fill: int

    @property
    def total(self) -> int:
        return self.read + self.write


@dataclass(frozen=True)
class HexagonSignature:
    """What became of a signature.

    Attributes:
      ops, on_npu: of the graph, and those that the NPU takes; the CPU runs the rest.
      partitions: parts on the NPU.
      traffic: of all partitions together.
    """

    name: str
    ops: int
    on_npu: int
    partitions: int
    traffic: Traffic

    @property
    def whole(self) -> bool:
        """All of it is on the NPU, in one part."""
        return self.on_npu == self.ops and self.partitions == 1


@dataclass(frozen=True)
class CompiledForHexagon:
    """A .tflite compiled for an SoC.

    Attributes:
      path: of a .tflite whose ops the NPU runs from the binary within.
      size: of that file in bytes.
      seconds, peak_bytes: what the compiler took, memory resident at its peak.
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
      soc: one of SOCS.
      target: the file to write.
      share: one copy of the weights for all signatures. LiteRT calls this unsupported on phones,
        and the emulator does not load it.

    Raises:
      UserError: the extra is missing or of another version, an SoC that the compiler does not know,
        a damaged source, or what the compiler cannot do; nothing is written then.
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
    """The folder of ai-edge-litert; links the QNN libraries for it.

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
    """A folder of the QNN libraries, by the names that the compiler plugin loads."""
    package = _package("onnxruntime_qnn")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qnpu"
    tag = hashlib.sha256(str(package).encode()).hexdigest()[:12]
    folder = cache / f"qnn-{extras.version('onnxruntime-qnn', EXTRA)}-{tag}"
    files = [*package.glob("*.so"), *package.with_name("onnxruntime_qnn.libs").iterdir()]
    folder.mkdir(parents=True, exist_ok=True)
    # The plugin lists an LPAI library, which no wheel has and nothing here calls: any will do.
    links = {"libQnnLpai.so": package / "libQnnSystem.so"} | {f.name: f for f in files}
    for name, file in links.items():
        if not (folder / name).exists():
            fresh = folder / f"{name}.{os.getpid()}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(file)
            fresh.rename(folder / name)  # atomic: another process may do the same
    return folder


def _run(command: list[str], log: IO[bytes]) -> tuple[int, int]:
    """Exit status and peak resident bytes of a process that writes to `log`."""
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
    """The first line that says what went wrong."""
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
    """Partitions and traffic of every signature.

    The compiler says of each subgraph how many partitions it has, and then of each partition, in
    the same order, what it moves.

    Raises:
      UserError: it does not say this of as many subgraphs as there are names.
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
