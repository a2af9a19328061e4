"""What `benchmark_model` says of a run: times, memory, and who really ran the graph.

Formats: TFLite's, old (no percentiles; `Peak memory footprint`) and new, and that of LiteRT's
program, which gives milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qnpu_jax.errors import UserError

KERNELS = {
    "cpu": "TfLiteXNNPackDelegate",
    "nnapi": "TfLiteNnapiDelegate",
    "qnn": "TfLiteQnnDelegate",
    "dispatch": "DispatchDelegate",
}
"""By delegate of a request, who the log says takes nodes."""
PROVIDERS = {"cpu": "XNNPACK", "nnapi": "NNAPI", "qnn": "EXTERNAL"}
"""What TFLite's program calls the delegate when it sums up; LiteRT's does not sum up."""


@dataclass(frozen=True)
class Delegation:
    """How much of a graph a delegate took.

    Attributes:
      whole: all of it; None where the log does not say.
      replaced, nodes: of the graph, so many are the delegate's; None where the log does not say.
      partitions: pieces that the graph falls into, as the log counts them.
    """

    whole: bool | None
    replaced: int | None = None
    nodes: int | None = None
    partitions: int | None = None

    def __str__(self) -> str:
        if self.replaced is not None:
            return f"{self.replaced} of {self.nodes} nodes"
        return {True: "all", False: "a part", None: "not said"}[self.whole]


@dataclass(frozen=True)
class PhoneTiming:
    """One signature with one delegate, in seconds.

    Attributes:
      runs: that were timed, after the warm-up; None where the log does not say.
      init: loading, and compiling where the delegate does.
      first: the first run, a part of the warm-up.
      p5, median, p95: None from older programs and from LiteRT's.
      memory_mb: that the tool's footprint grew by, in all.
      delegation: what the delegate took; the rest ran on the CPU.
    """

    delegate: str
    signature: str
    tokens: int
    average: float
    delegation: Delegation
    runs: int | None = None
    init: float | None = None
    first: float | None = None
    p5: float | None = None
    median: float | None = None
    p95: float | None = None
    memory_mb: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """By the median where there is one."""
        return self.tokens / (self.median or self.average)


_NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
_SUMMARY = re.compile(
    rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER},"
    rf" Warmup \(avg\): {_NUMBER}, Inference \(avg\): {_NUMBER}"
)
_MEMORY = re.compile(rf"emory footprint[^\n]*\(MB\): init={_NUMBER} overall={_NUMBER}")
_LITERT = {
    "init": rf"Model initialization: +{_NUMBER} ms",
    "first": rf"Warmup \(first\): +{_NUMBER} ms",
    "average": rf"Inference \(avg\): +{_NUMBER} ms",
}
_REPLACED = re.compile(
    r"Replacing (\d+)(?: out of (\d+))? node\(s\) with delegate \((\w+)\)(?: node, yielding (\d+)"
    r" partitions(?: for (?:the whole graph|subgraph (\d+)))?)?"
)
_APPLIED = "Explicitly applied {} delegate, and the model graph will be (completely|partial)"
_IGNORED = re.compile(
    r"Unconsumed cmdline flags: .*--(signature_to_run_for|use_nnapi|external_delegate_path|use_npu)"
)
_GONE = re.compile(
    r"Failed to create a dispatch delegate kernel|No usable Dispatch runtime"
    r"|Restored original execution plan after delegate application failure"
)
"""Said after `Replacing`, when the delegate failed all the same."""


def timing(log: str, delegate: str, signature: str, tokens: int, subgraph: int) -> PhoneTiming:
    """Reads a run of one signature.

    Args:
      subgraph: index of the signature's, whose delegation counts.

    Raises:
      UserError: there are no times in it, the program ignored a flag that matters, or the delegate
        took nothing.
    """
    if ignored := _IGNORED.search(log):
        raise UserError(
            f"benchmark_model: does not know --{ignored[1]}; expected a current one, TFLite's for"
            " cpu, nnapi and qnn, LiteRT's for dispatch; give another benchmark_model"
        )
    times = _litert(log) if "BENCHMARK RESULTS" in log else _tflite(log)
    if "average" not in times:
        raise UserError(
            f"benchmark_model, {delegate} {signature}: no times, it said {complaint(log)!r};"
            " expected 'Inference (avg)'; run the command that --dry-run shows to see all it says"
        )
    return PhoneTiming(
        delegate, signature, tokens, delegation=taken(log, delegate, subgraph), **times
    )


def taken(log: str, delegate: str, subgraph: int) -> Delegation:
    """What a delegate took of a subgraph.

    TFLite sums up for the signature's graph. `Replacing N out of M` comes once per subgraph, with
    its index in newer programs; of lines without, that of the smallest share counts. `cpu` is never
    refused: without XNNPACK it is still the CPU.

    Raises:
      UserError: nothing, or nothing that the log says.
    """
    provider, kernel = PROVIDERS.get(delegate, "no"), KERNELS[delegate]
    rows = [m.groups() for m in _REPLACED.finditer(log) if m[3] == kernel]
    counts = [
        (int(taken), int(nodes), int(partitions) if partitions else None)
        for taken, nodes, _, partitions, index in rows
        if nodes and int(taken) and (index is None or int(index) == subgraph)
    ]
    said = re.search(_APPLIED.format(provider), log)
    refused = f"Though {provider} delegate is explicitly applied" in log or _GONE.search(log)
    if refused or not (counts or said):
        if delegate == "cpu":
            return Delegation(False if refused else None)
        raise UserError(
            f"{delegate}: {kernel} took no node, so what was timed is the CPU; expected it to take"
            " some; check that the phone has the driver or library and that it takes models of"
            " this form, or measure cpu"
        )
    whole = said[1] == "completely" if said else None
    if not counts:
        return Delegation(whole)
    replaced, nodes, partitions = min(counts, key=lambda c: c[0] / c[1])
    return Delegation(replaced == nodes if whole is None else whole, replaced, nodes, partitions)


def _tflite(log: str) -> dict[str, Any]:
    """Times in seconds; the last `count=` line is of the timed runs, that before of the warm-up."""
    found: dict[str, Any] = {}
    if m := _SUMMARY.search(log):
        init, first, _, average = (float(x) / 1e6 for x in m.groups())
        found = {"init": init, "first": first, "average": average}
    if lines := re.findall(r"count=\d+ .*", log):
        values = dict(re.findall(rf"(\w+)={_NUMBER}", lines[-1]))
        found["runs"] = int(values["count"])
        found |= {k: float(values[k]) / 1e6 for k in ("p5", "median", "p95") if k in values}
    if m := _MEMORY.search(log):
        found["memory_mb"] = float(m[2])
    return found


def _litert(log: str) -> dict[str, Any]:
    matches = {name: re.search(pattern, log) for name, pattern in _LITERT.items()}
    found: dict[str, Any] = {k: float(m[1]) / 1e3 for k, m in matches.items() if m}
    if m := re.search(r"Inference \(avg\): .*\((\d+) runs\)", log):
        found["runs"] = int(m[1])
    if m := re.search(rf"Overall footprint: +{_NUMBER} MB", log):
        found["memory_mb"] = float(m[1])
    return found


def complaint(log: str) -> str:
    """The line that says what went wrong: the first error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [s for s in lines if re.search(r"\berror\b|\bfailed\b|disallowed", s, re.IGNORECASE)]
    return (errors or lines[-1:] or ["nothing"])[0][:200]
