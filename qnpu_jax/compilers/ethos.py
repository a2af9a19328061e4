"""Compilation for Arm's Ethos-U NPUs by vela (PyPI's ethos-u-vela, the extra `ethos`), with vela's
estimate of cycles, traffic and latency.

vela reports on one signature at a time, so every signature is a file of its own. It runs in a
process of its own, because a file that it cannot handle may crash it.

Reference: ethos-u-vela 5.2, ethosu/vela/stats_writer.py, `write_summary_metrics_csv_common`;
ethosu/config_files/Arm/vela.ini.
"""

from __future__ import annotations

import csv
import mmap
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ai_edge_litert import schema_py_generated as schema

from qnpu_jax import extras
from qnpu_jax.artifacts import new_file
from qnpu_jax.choices import EthosU
from qnpu_jax.errors import UserError
from qnpu_jax.tflite import open_interpreter

PACKAGE, WANTED = "ethos-u-vela", "5.2."
"""Package, and the version of it whose reports this module reads."""
EXTRA = "ethos"
CONFIG = "Arm/vela.ini"
"""File of system configurations in vela's package."""
MEMORY_MODE, SRAM = "Dedicated_Sram", 2**21
"""Memory mode of `CONFIG` with weights, tables and arena in DRAM, and bytes of SRAM that the NPU
has for itself. In the 512 KiB of `CONFIG`'s largest mode vela cannot place a whole prefill of
SmolLM2 in one part; with 1 MiB it searches for minutes."""
_SYSTEMS = {"ethos-u65": "Ethos_U65_High_End", "ethos-u85": "Ethos_U85_SYS_DRAM_Mid"}
ACCELERATORS: tuple[str, ...] = get_args(EthosU)
"""Ethos-U configurations, by their MACs a cycle. U65 has no 16-bit products of activations."""
_BUILTINS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}


@dataclass(frozen=True)
class VelaEstimate:
    """Arm's estimate of one inference, from vela's summary.

    It comes from a model of an Ethos-U, not from a measurement, and says nothing about a phone. Ops
    that the CPU runs are not part of it.

    Attributes:
      system, memory_mode: names in vela's configuration file.
      clock: Hz.
      sram: bytes of SRAM that the NPU has.
      sram_rate, dram_rate: design peaks, in bytes per second.
      seconds: `cycles` at the clock.
      npu_cycles: cycles of the NPU's units alone.
      cycles: cycles with waits for memory.
      sram_bytes, dram_bytes: bytes moved to and from each memory.
      weights: bytes of the weights in the source.
      encoded: bytes of the weights after vela's coder.
    """

    system: str
    memory_mode: str
    clock: float
    sram: int
    sram_rate: float
    dram_rate: float
    seconds: float
    npu_cycles: int
    cycles: int
    sram_bytes: int
    dram_bytes: int
    weights: int
    encoded: int


@dataclass(frozen=True)
class Placement:
    """Division of a file between NPU and CPU, and its memory.

    Attributes:
      ops: number of ops in the source.
      on_cpu: number of ops left to the CPU, by their name in TFLite.
      parts: parts of the graph on the NPU, each one op of the compiled file.
      constants: bytes of constants in DRAM.
      arena: bytes of activations in DRAM.
      sram: bytes of activations in the SRAM.
    """

    ops: int
    on_cpu: Mapping[str, int]
    parts: int
    constants: int
    arena: int
    sram: int

    @property
    def on_npu(self) -> int:
        """Number of ops that the NPU takes."""
        return self.ops - sum(self.on_cpu.values())

    @property
    def whole(self) -> bool:
        """Whether the NPU takes every op, in one part."""
        return not self.on_cpu and self.parts == 1


@dataclass(frozen=True)
class CompiledForArm:
    """Signature compiled for an Ethos-U.

    Attributes:
      path: a .tflite whose custom ops `ethos-u` hold the NPU's commands.
      placement: division of the ops between NPU and CPU.
      estimate: vela's estimate of one inference.
      reasons: vela's reason for leaving an op to the CPU, by the op's name in TFLite.
      size: bytes of the file.
      compile_seconds: time that vela took.
    """

    path: Path
    placement: Placement
    estimate: VelaEstimate
    reasons: Mapping[str, str]
    size: int
    compile_seconds: float


def compile_file(source: Path, accelerator: str, target: Path) -> CompiledForArm:
    """Compiles a .tflite of one signature.

    Args:
      source: the file to compile.
      accelerator: one of ACCELERATORS.
      target: the file to write.

    Raises:
      UserError: the extra is missing or of another version, an unknown accelerator, a damaged
        source, or a source that vela cannot compile; nothing is written then.
    """
    check_accelerator(accelerator)
    check_installed()
    open_interpreter(source, "ref")  # refuses what would crash the compiler
    with new_file(target) as partial, tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        log = _run(source, accelerator, Path(folder))
        seconds = time.monotonic() - began
        made = Path(folder) / f"{source.stem}_vela.tflite"
        summary = Path(folder) / f"{source.stem}_summary_{_system(accelerator)}.csv"
        if not (made.is_file() and summary.is_file()):
            raise UserError(
                f"{source}: vela wrote no model or no summary for {accelerator}: {_complaint(log)};"
                " check the file, or write it again with `qnpu compile`"
            )
        placement, estimate = placed(source, made), read_summary(summary.read_text())
        shutil.copyfile(made, partial)
        size = partial.stat().st_size
        return CompiledForArm(target, placement, estimate, read_reasons(log), size, seconds)


def check_accelerator(name: str) -> None:
    """Raises UserError for a name that is not one of ACCELERATORS."""
    if name not in ACCELERATORS:
        raise UserError(f"--soc {name}: not an Ethos-U; expected one of {[*ACCELERATORS]}")


def check_installed() -> None:
    """Raises UserError where the extra is missing or of another version."""
    extras.check(PACKAGE, WANTED, EXTRA)


def _system(accelerator: str) -> str:
    return _SYSTEMS[accelerator.rsplit("-", 1)[0]]


def _run(source: Path, accelerator: str, folder: Path) -> str:
    """Compiles into a folder and returns what vela prints.

    Raises:
      UserError: it fails or crashes.
    """
    command = [
        sys.executable, "-m", "ethosu.vela", str(source.absolute()), f"--output-dir={folder}",
        f"--accelerator-config={accelerator}", f"--config={CONFIG}",
        f"--system-config={_system(accelerator)}", f"--memory-mode={MEMORY_MODE}",
        f"--arena-cache-size={SRAM}",
    ]  # fmt: skip
    # Started in a folder of its own, because Python imports from the working folder first.
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, check=False
    )
    log = done.stdout.decode(errors="replace")
    if done.returncode < 0:
        raise UserError(
            f"{source}: vela crashed for {accelerator} ({signal.Signals(-done.returncode).name});"
            " expected a file that it can compile, with 4-bit weights in INT8 tensors; compile the"
            " model's folder with `qnpu compile`"
        )
    if done.returncode:
        raise UserError(
            f"{source}: vela failed for {accelerator} (status {done.returncode}):"
            f" {_complaint(log)}; check the file, or write it again with `qnpu compile`"
        )
    return log


def _complaint(log: str) -> str:
    """Returns the last line that names an error, or else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [s for s in lines if re.search(r"\w*Error\b|\b[Ff]ailed\b", s)]
    return (said or lines or ["it said nothing"])[-1][:200]


_REASON = re.compile(r"^Warning \(supported operators\) operator: (\w+),.*\nReason: (.*)$", re.M)


def read_reasons(log: str) -> dict[str, str]:
    """Reads from vela's log why ops are left to the CPU: the first reason of each, by op name."""
    return {op: reason.strip() for op, reason in reversed(_REASON.findall(log))}


def read_summary(text: str) -> VelaEstimate:
    """Reads the summary that vela writes as CSV: a line of labels and a line of values.

    Raises:
      UserError: a line or a column is missing, or a value is no number.
    """
    rows = [*csv.DictReader(text.splitlines())]
    try:
        (row,) = rows
        gib = 2**30  # stats_writer.py divides rates by 1024^3
        return VelaEstimate(
            system=row["system_config"],
            memory_mode=row["memory_mode"],
            clock=float(row["core_clock"]),
            sram=int(float(row["arena_cache_size"]) * 1024),
            sram_rate=float(row["sram_bandwidth"]) * gib,
            dram_rate=float(row["dram_bandwidth"]) * gib,
            seconds=float(row["inference_time"]),
            npu_cycles=int(row["cycles_npu"]),
            cycles=int(row["cycles_total"]),
            sram_bytes=int(row["sram_total_bytes"]),
            dram_bytes=int(row["dram_total_bytes"]),
            weights=int(row["total_original_weights"]),
            encoded=int(row["total_npu_encoded_weights"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"vela's summary: cannot be read ({error}) in {len(rows)} rows; expected that of"
            f" {PACKAGE} {WANTED}*; {extras.remedy(EXTRA)}"
        ) from None


def placed(source: Path, compiled: Path) -> Placement:
    """Reads from a source and its compiled file where the ops run."""
    ops, parts, sizes = sum(_ops(source)[0].values()), 0, Counter[str]()
    left, tensors = _ops(compiled)
    for name, size in tensors:
        sizes[name] = max(sizes[name], size)
    parts = left.pop("ethos-u", 0)
    return Placement(
        ops, dict(left), parts, sizes["read_only"], sizes["scratch"], sizes["scratch_fast"]
    )


def _ops(path: Path) -> tuple[Counter[str], list[tuple[str, int]]]:
    """Counts a file's ops by name, and lists name and size of the NPU's memory areas.

    vela describes these areas by tensors with fixed names, one byte an element.
    """
    ops, tensors = Counter[str](), []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model: Any = schema.Model.GetRootAs(bytes(data), 0)
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for op in (graph.Operators(i) for i in range(graph.OperatorsLength())):
            code = model.OperatorCodes(op.OpcodeIndex())
            custom = code.CustomCode()
            ops[custom.decode() if custom else _BUILTINS[code.BuiltinCode()]] += 1
        for tensor in (graph.Tensors(i) for i in range(graph.TensorsLength())):
            name = tensor.Name().decode()
            if name in ("read_only", "scratch", "scratch_fast"):
                tensors.append((name, int(tensor.Shape(0))))
    return ops, tensors
