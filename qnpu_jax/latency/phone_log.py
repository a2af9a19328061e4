"""Reader of `benchmark_model`'s output: times, memory, and which delegate ran the graph.

It knows three formats: TFLite's old one (no percentiles; `Peak memory footprint`), TFLite's new
one, and that of LiteRT's program, which has milliseconds.
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
"""Name by which the log says that a delegate takes nodes."""
PROVIDERS = {"cpu": "XNNPACK", "nnapi": "NNAPI", "qnn": "EXTERNAL"}
"""Name of a delegate in the summary of TFLite's program. LiteRT's program prints no summary."""


@dataclass(frozen=True)
class Delegation:
    """Share of a graph that a delegate took. Fields are None where the log does not say.

    Attributes:
      whole: whether it took all of the graph.
      replaced: number of nodes that it took.
      nodes: number of nodes of the graph.
      partitions: pieces that the graph falls into.

    Example:
      >>> print(Delegation(False, 120, 124, 3))
      120 of 124 nodes
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
    """Times of one signature with one delegate, in seconds. Optional fields are None where the log
    does not say.

    Attributes:
      delegate, signature: names.
      tokens: tokens of one run.
      average: mean time of a run, after the warm-up.
      delegation: share of the graph that the delegate took; the rest ran on the CPU.
      runs: number of timed runs.
      init: time to load the model, and to compile it where the delegate does.
      first: time of the first run, which belongs to the warm-up.
      p5, median, p95: percentiles of the timed runs; only TFLite's newer program has them.
      memory_mb: growth of the program's memory, in MB.
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
        """Tokens of a run divided by its median time, or by its mean where there is no median."""
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
"""Messages after `Replacing`, when the delegate failed in the end."""


def timing(log: str, delegate: str, signature: str, tokens: int, subgraph: int) -> PhoneTiming:
    """Reads the output of a run of one signature.

    Args:
      tokens: tokens of one run.
      subgraph: index of the signature's subgraph, whose delegation counts.

    Raises:
      UserError: the output has no times, the program ignored a flag that matters, or the delegate
        took no node.
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
    """Reads what a delegate took of a subgraph.

    TFLite's program prints a summary for the signature's graph. `Replacing N out of M` appears once
    per subgraph, with its index in newer programs. Of lines without an index, the one with the
    smallest share counts. `cpu` never fails: without XNNPACK the CPU still ran it.

    Raises:
      UserError: the log does not say that the delegate took a node.
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
    """Reads TFLite's format, in seconds. The last `count=` line is that of the timed runs; the one
    before is that of the warm-up."""
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
    """Reads the format of LiteRT's program, in seconds."""
    matches = {name: re.search(pattern, log) for name, pattern in _LITERT.items()}
    found: dict[str, Any] = {k: float(m[1]) / 1e3 for k, m in matches.items() if m}
    if m := re.search(r"Inference \(avg\): .*\((\d+) runs\)", log):
        found["runs"] = int(m[1])
    if m := re.search(rf"Overall footprint: +{_NUMBER} MB", log):
        found["memory_mb"] = float(m[1])
    return found


def complaint(log: str) -> str:
    """Returns the line that says what went wrong: the first error, or else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [s for s in lines if re.search(r"\berror\b|\bfailed\b|disallowed", s, re.IGNORECASE)]
    return (errors or lines[-1:] or ["nothing"])[0][:200]
